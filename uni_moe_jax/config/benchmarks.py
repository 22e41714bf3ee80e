"""The published pretraining tasks and benchmarks: sources, target sets, batches, evaluation.

Sources are TFDS data sets if TFDS has them, otherwise own data under these names; docs/guides/benchmarks.md says how to
obtain them. Sizes, weights, lengths and augmentations are those of the published configs; batches are those of one
process there. What differs is marked "ours".
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import schema

IMAGENET_NAMES = 'file:class_names/imagenet1k.tsv'
IMAGENET21K_NAMES = 'file:class_names/imagenet21k.tsv'
VQA_ANSWERS = 'file:class_names/vqa_answers.tsv'
CAPTIONS = '{captions}'
_SMOOTHING = dict(label_smoothing=0.1)
# Augmentation of classified images, of captioned images, and of videos.
_CLASSIFIED = dict(crop='random_resized_crop', random_flip=True, randaugment=9.0, random_erasing=0.25)
_FLIPPED, _VIDEO = dict(random_flip=True), dict(crop='jittered_crop', random_flip=True)

Edit = Callable[[ml_collections.ConfigDict], None]


@dataclasses.dataclass(frozen=True)
class Pairs:
  """A pretraining source of images with captions.

  Attributes:
    sampling_weight: of its caption task, and of its retrieval task.
    caption: template of a caption.
    max_len: tokens of texts.
  """
  source: str
  sampling_weight: float
  caption: str = CAPTIONS
  max_len: int = 50


# In the published order.
PRETRAINING_PAIRS = {
    'yfcc': Pairs('own:yfcc', 0.584),
    'cc12m': Pairs('own:cc12m', 0.5057),
    'cc3m': Pairs('own:cc3m', 0.26295),
    'visual_genome': Pairs('own:visual_genome', 0.1766, max_len=30),
    'coco': Pairs('tfds:coco_captions', 0.1144, '{captions/text}'),
    'sbu': Pairs('own:sbu', 0.1383),
}


def _task(task_type: str, source: str, **values: Any) -> ml_collections.ConfigDict:
  """A task in the published temperature group of its type."""
  return config.task(task_type, source, temperature=schema.PUBLISHED_GROUPS[task_type], **values)


def vocabulary(c: ml_collections.ConfigDict) -> str:
  """Add the target set of all words; return its name."""
  c.target_sets.vocabulary = config.target_set('vocabulary', family='words')
  return 'vocabulary'


def pretraining(c: ml_collections.ConfigDict) -> None:
  """Add sixteen tasks: images, two of videos, running text, captioning and retrieval of six sources.

  Moments in Time has three frames and Kinetics four, so that they are two groups of videos.
  """
  names = dict(family='names', max_len=32)
  c.target_sets.imagenet21k = config.target_set(IMAGENET21K_NAMES, **names)
  c.target_sets.kinetics700 = config.target_set('own:kinetics700/label', **names)
  c.target_sets.moments = config.target_set('own:moments/label', **names)
  words = vocabulary(c)
  c.tasks.imagenet21k = _task(
      'image_classification', 'own:imagenet21k', batch_size=720, loss_weight=1.0, sampling_weight=2.486,
      target_set='imagenet21k', label_column='label', mixup_alpha=0.8, cutmix_alpha=1.0, **_SMOOTHING, **_CLASSIFIED)
  for name, batch_size, num_frames, sampling_weight in (('kinetics700', 64, 4, 0.76), ('moments', 112, 3, 0.44)):
    c.tasks[name] = _task(
        'video_classification', f'own:{name}', batch_size=batch_size, loss_weight=0.1, sampling_weight=sampling_weight,
        target_set=name, label_column='label', num_frames=num_frames, **_SMOOTHING, **_VIDEO)
  c.tasks.bookswiki = _task(
      'text_mlm', 'own:bookswiki', batch_size=512, loss_weight=0.5, sampling_weight=2.75, target_set=words, max_len=128,
      max_predictions=20)
  for name, p in PRETRAINING_PAIRS.items():
    text = dict(sampling_weight=p.sampling_weight, caption_templates=(p.caption,), max_len=p.max_len, **_FLIPPED)
    c.tasks[f'{name}_caption'] = _task('image_caption', p.source, batch_size=300, loss_weight=1.0, target_set=words,
                                       **text)
    c.tasks[f'{name}_retrieval'] = _task(
        'image_retrieval', p.source, batch_size=512, loss_weight=0.5, **_SMOOTHING, **text)


@dataclasses.dataclass(frozen=True)
class Tuning:
  """Published fine-tuning of one benchmark: fields of config.tasks, train, model and optim.

  Attributes:
    batch_size: of one process.
    learning_rate, min_learning_rate: peak, and end.
    weight_decay: of kernels.
  """
  batch_size: int
  learning_rate: float
  warmup_steps: int
  steps: int
  max_len: int = 30
  loss_weight: float = 1.0
  drop_path: float = 0.1
  weight_decay: float = 1e-4
  b2: float = 0.95
  eps: float = 1e-6
  grad_clip_norm: float = 0.1
  min_learning_rate: float = 1e-6


def _glue_tuning(batch_size: int, warmup_steps: int, steps: int, learning_rate: float = 1e-5) -> Tuning:
  return Tuning(batch_size, learning_rate, warmup_steps, steps, max_len=256, weight_decay=0.1, b2=0.98, eps=1e-8,
                grad_clip_norm=0.5, min_learning_rate=1e-8)


# As published for the base size.
TUNING = {
    'imagenet1k': Tuning(128, 2e-5, 2_000, 20_000, weight_decay=1e-8, b2=0.999, min_learning_rate=1e-8),
    'kinetics400': Tuning(8, 5e-6, 2_000, 40_000),
    'coco_caption': Tuning(32, 2e-5, 500, 10_000, loss_weight=2.0),
    'coco_retrieval': Tuning(256, 5e-6, 500, 10_000),
    'flickr30k_caption': Tuning(32, 2e-6, 500, 4_000, drop_path=0.2),  # 0.1 without experts
    'flickr30k_retrieval': Tuning(256, 5e-6, 200, 5_000),
    'msvd_caption': Tuning(2, 2e-5, 100, 1_000, drop_path=0.2),
    'msvd_retrieval': Tuning(16, 5e-6, 200, 2_000, drop_path=0.2),
    # Only a config for debugging was published.
    'vqa': Tuning(64, 4e-5, 1_000, 20_000, max_len=23, loss_weight=0.1, weight_decay=0.05, b2=0.999, eps=1e-8,
                  grad_clip_norm=0.0, min_learning_rate=1e-8),
    'cola': _glue_tuning(16, 400, 5_600),
    'sst2': _glue_tuning(32, 1_500, 22_000),
    'mrpc': _glue_tuning(16, 150, 2_500),
    'qqp': _glue_tuning(32, 28_000, 115_000),
    'mnli': _glue_tuning(32, 7_500, 125_000),
    'qnli': _glue_tuning(16, 2_000, 34_000),
    'rte': _glue_tuning(16, 150, 2_500, 2e-5),
}
# Ours: of MSR-VTT only zero-shot evaluation was published.
TUNING |= {f'msrvtt_{task}': TUNING[f'msvd_{task}'] for task in ('caption', 'retrieval')}


def finetuning(c: ml_collections.ConfigDict, name: str) -> None:
  """Set the optimizer and steps of one benchmark; every parameter trains."""
  t = TUNING[name]
  c.optim.update(dict(
      schedule='published', learning_rate=t.learning_rate, final_lr_fraction=t.min_learning_rate / t.learning_rate,
      warmup_steps=t.warmup_steps, b1=0.9, b2=t.b2, eps=t.eps, grad_clip_norm=t.grad_clip_norm,
      param_groups=(*c.optim.param_groups[:-1], (r'.*', 1.0, t.weight_decay))))
  c.model.drop_path = t.drop_path
  c.train.update(dict(steps=t.steps, log_every=50, checkpoint_every=1000))


def _tuned(task_type: str, source: str, name: str, **values: Any) -> ml_collections.ConfigDict:
  """The task of a benchmark, with the sizes of its row in `TUNING`."""
  t = TUNING[name]
  return _task(task_type, source, batch_size=t.batch_size, loss_weight=t.loss_weight, **values)


@dataclasses.dataclass(frozen=True)
class Glue:
  """A GLUE task.

  Attributes:
    template: the published one; its suffix belongs to the first text.
    words: TFDS's name of a class → its label word. Of two classes, F1 is that of the second.
    splits: evaluated splits.
  """
  template: str
  words: tuple[tuple[str, str], ...]
  splits: tuple[str, ...] = ('validation',)


_ENTAILS = (('not_entailment', 'no'), ('entailment', 'yes'))
GLUE = {
    'cola': Glue('{sentence} This is <spe> . <eot>', (('unacceptable', 'incorrect'), ('acceptable', 'correct'))),
    'sst2': Glue('{sentence} <eot> It is <spe> . <eot>', (('negative', 'bad'), ('positive', 'wonderful'))),
    # The published code removes the full stop of the first sentence, and adds it as the suffix.
    'mrpc': Glue('{sentence1} <spe> , {sentence2} <eot>', (('not_equivalent', 'no'), ('equivalent', 'yes'))),
    'qqp': Glue('{question1} <eot> <spe> , {question2} <eot>', (('not_duplicate', 'no'), ('duplicate', 'yes'))),
    'mnli': Glue('{premise} <spe> , {hypothesis} <eot>',
                 (('contradiction', 'no'), ('neutral', 'maybe'), ('entailment', 'yes')),
                 ('validation_matched', 'validation_mismatched')),
    'qnli': Glue('{question} <eot> it is <spe> , {sentence} <eot>', _ENTAILS),
    'rte': Glue('{sentence1} ? <eot> it is <spe> , {sentence2} <eot>', _ENTAILS),
}


def glue(c: ml_collections.ConfigDict, name: str) -> None:
  """Add one GLUE task; the hidden labels of the test splits are not evaluated."""
  g = GLUE[name]
  c.target_sets[name] = config.target_set(g.words, family='words')
  c.tasks[name] = _tuned(
      'text_classification', f'tfds:glue/{name}', name, target_set=name, label_column='label',
      template=g.template, max_len=TUNING[name].max_len, **_SMOOTHING)
  for split in g.splits:
    c.evaluators[f'{name}, {split}'] = config.evaluator('glue', name, split=split)


def imagenet1k(c: ml_collections.ConfigDict) -> None:
  """Add the classification of images into 1000 classes."""
  c.target_sets.imagenet1k = config.target_set(IMAGENET_NAMES, family='names', max_len=32)
  c.preflight.target_lengths.imagenet1k = ((4, 500), (8, 500))  # here and below, the lengths are an assumption
  c.tasks.imagenet1k = _tuned(
      'image_classification', 'tfds:imagenet2012', 'imagenet1k', target_set='imagenet1k', label_column='label',
      **_SMOOTHING, **_CLASSIFIED)
  c.evaluators.imagenet1k = config.evaluator('classification', 'imagenet1k', split='validation')


def kinetics400(c: ml_collections.ConfigDict) -> None:
  """Add the classification of videos into 400 actions: eight frames, four views × three crops."""
  c.target_sets.kinetics400 = config.target_set('own:kinetics400/label', family='names', max_len=32)
  c.preflight.target_lengths.kinetics400 = ((4, 200), (8, 200))
  c.tasks.kinetics400 = _tuned(
      'video_classification', 'own:kinetics400', 'kinetics400', target_set='kinetics400', label_column='label',
      num_frames=8, **_VIDEO)
  c.evaluators.kinetics400 = config.evaluator(
      'classification', 'kinetics400', split='validation', batch_size=32, num_views=4, num_crops=3)


def _caption(name: str, source: str, split: str = 'train', column: str = CAPTIONS, num_frames: int = 0) -> Edit:
  def add(c: ml_collections.ConfigDict) -> None:
    c.tasks[name] = _tuned(
        'video_caption' if num_frames else 'image_caption', source, name, split=split, num_frames=num_frames,
        target_set=vocabulary(c), caption_templates=(column,), max_len=TUNING[name].max_len, **_SMOOTHING,
        **(_VIDEO if num_frames else _FLIPPED))
    c.evaluators[name] = config.evaluator('caption', name, split='test', batch_size=64, beam_size=2)
  return add


def _retrieval(name: str, source: str, split: str = 'train', column: str = CAPTIONS, num_frames: int = 0) -> Edit:
  def add(c: ml_collections.ConfigDict) -> None:
    c.tasks[name] = _tuned(
        'video_retrieval' if num_frames else 'image_retrieval', source, name, split=split, caption_templates=(column,),
        max_len=TUNING[name].max_len, num_frames=num_frames, **_SMOOTHING, **(_VIDEO if num_frames else _FLIPPED))
    c.evaluators[name] = config.evaluator('retrieval', name, split='test', batch_size=64)
  return add


def vqa(c: ml_collections.ConfigDict) -> None:
  """Add questions about images, with ten answers each.

  The target set has the answers of at least nine questions. Images are not mirrored: published training mirrors them,
  and swaps left and right in words.
  """
  c.target_sets.vqa_answers = config.target_set(VQA_ANSWERS, family='words', max_len=16)
  c.preflight.target_lengths.vqa_answers = ((4, 3129),)
  c.tasks.vqa = _tuned(
      'vqa', 'own:vqa', 'vqa', target_set='vqa_answers', label_column='answers', max_predictions=10,
      template='{question} <spe> <eot>', max_len=TUNING['vqa'].max_len)
  c.evaluators.vqa = config.evaluator('vqa', 'vqa', split='validation')


_COCO = dict(source='tfds:coco_captions', split='train+restval', column='{captions/text}')
# Benchmark → function that adds it to a config with a model.
DOWNSTREAM: dict[str, Edit] = {
    'imagenet1k': imagenet1k,
    'kinetics400': kinetics400,
    'coco_caption': _caption('coco_caption', **_COCO),
    'coco_retrieval': _retrieval('coco_retrieval', **_COCO),
    'flickr30k_caption': _caption('flickr30k_caption', 'own:flickr30k'),
    'flickr30k_retrieval': _retrieval('flickr30k_retrieval', 'own:flickr30k'),
    'msvd_caption': _caption('msvd_caption', 'own:msvd', num_frames=4),
    'msvd_retrieval': _retrieval('msvd_retrieval', 'own:msvd', num_frames=4),
    'msrvtt_caption': _caption('msrvtt_caption', 'own:msrvtt', num_frames=4),
    'msrvtt_retrieval': _retrieval('msrvtt_retrieval', 'own:msrvtt', num_frames=4),
    'vqa': vqa,
    **{name: (lambda c, name=name: glue(c, name)) for name in GLUE},
}
