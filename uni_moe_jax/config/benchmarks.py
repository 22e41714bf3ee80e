"""The published pretraining tasks and benchmarks: sources, target sets, batches, evaluation.

Sources are TFDS datasets if TFDS has them, otherwise own data under these names; docs/guides/benchmarks.md says how to
obtain them, and what differs from the published recipes. Sizes, weights, lengths and augmentations are those of the
published configs; batches are those of one process there.
"""

import dataclasses
from typing import Any

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import presets, schema
from uni_moe_jax.tasks.router_names import DENSE

CAPTIONS = '{captions}'
CAPTION_SEARCH = dict(beam_size=2, max_len=21, detokenize=False)  # of evaluators
_ZERO_SHOT_TOKENS = 77  # of texts that videos are retrieved by
_SMOOTHING = dict(label_smoothing=0.1)
# Augmentation of classified images, of captioned images, and of videos.
_CLASSIFIED = dict(crop='random_resized_crop', random_flip=True, randaugment=9.0, random_erasing=0.25)
_FLIPPED, _VIDEO = dict(random_flip=True), dict(crop='jittered_crop', random_flip=True, frame_stride=32.0)

# Pretraining on images with captions, in the published order: source, sampling weight of its caption task and of its
# retrieval task, template of a caption, tokens of texts.
PRETRAINING_PAIRS = {
    'yfcc': ('own:yfcc', 0.584, CAPTIONS, 50),
    'cc12m': ('own:cc12m', 0.5057, CAPTIONS, 50),
    'cc3m': ('own:cc3m', 0.26295, CAPTIONS, 50),
    'visual_genome': ('own:visual_genome', 0.1766, CAPTIONS, 30),
    'coco': ('tfds:coco_captions', 0.1144, '{captions/text}', 50),
    'sbu': ('own:sbu', 0.1383, CAPTIONS, 50),
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
  c.target_sets.imagenet21k = config.target_set('file:class_names/imagenet21k.tsv', **names)
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
  c.tasks.bookswiki = _task('text_mlm', 'own:bookswiki', batch_size=512, loss_weight=0.5, sampling_weight=2.75,
                            target_set=words, max_len=128, max_predictions=20)
  for name, (source, sampling_weight, template, max_len) in PRETRAINING_PAIRS.items():
    text = dict(sampling_weight=sampling_weight, caption_templates=(template,), max_len=max_len, **_FLIPPED)
    for task_type, own in (('caption', dict(batch_size=300, loss_weight=1.0, target_set=words)),
                           ('retrieval', dict(batch_size=512, loss_weight=0.5, **_SMOOTHING))):
      c.tasks[f'{name}_{task_type}'] = _task(f'image_{task_type}', source, **own, **text)


@dataclasses.dataclass(frozen=True)
class Tuning:
  """Published fine-tuning of one benchmark: fields of config.tasks, train, model and optim."""
  batch_size: int  # of one process
  learning_rate: float  # the peak
  warmup_steps: int
  steps: int
  max_len: int = 30
  loss_weight: float = 1.0
  drop_path: float = 0.1
  dense_drop_path: float | None = None  # of a model without experts, where it differs
  weight_decay: float = 1e-4  # of kernels
  table_weight_decay: float = 0.0  # of words and positions
  b2: float = 0.95
  eps: float = 1e-6
  grad_clip_norm: float = 0.1
  min_learning_rate: float = 1e-6


_TABLE_DECAY = 0.05  # the published default, which the files of GLUE and VQA leave


def _glue_tuning(batch_size: int, warmup_steps: int, steps: int, learning_rate: float = 1e-5) -> Tuning:
  return Tuning(batch_size, learning_rate, warmup_steps, steps, max_len=256, weight_decay=0.1,
                table_weight_decay=_TABLE_DECAY, b2=0.98, eps=1e-8, grad_clip_norm=0.5, min_learning_rate=1e-8)


# As published for the base size.
TUNING = {
    'imagenet1k': Tuning(128, 2e-5, 2_000, 20_000, max_len=0, weight_decay=1e-8, b2=0.999, min_learning_rate=1e-8),
    'kinetics400': Tuning(8, 5e-6, 2_000, 40_000, max_len=0),
    'coco_caption': Tuning(32, 2e-5, 500, 10_000, loss_weight=2.0, drop_path=0.2),
    'coco_retrieval': Tuning(256, 5e-6, 500, 10_000, drop_path=0.2),
    'flickr30k_caption': Tuning(32, 2e-6, 500, 4_000),
    'flickr30k_retrieval': Tuning(256, 5e-6, 200, 5_000),
    'msvd_caption': Tuning(2, 2e-5, 100, 1_000),
    'msvd_retrieval': Tuning(16, 5e-6, 200, 2_000),
    # Only a config for debugging was published.
    'vqa': Tuning(64, 4e-5, 1_000, 20_000, max_len=23, loss_weight=0.1, weight_decay=0.05,
                  table_weight_decay=_TABLE_DECAY, b2=0.999, eps=1e-8, grad_clip_norm=0.0, min_learning_rate=1e-8),
    'cola': _glue_tuning(16, 400, 5_600),
    'sst2': _glue_tuning(32, 1_500, 22_000),
    'mrpc': _glue_tuning(16, 150, 2_500),
    'qqp': _glue_tuning(32, 28_000, 115_000),
    'mnli': _glue_tuning(32, 7_500, 125_000),
    'qnli': _glue_tuning(16, 2_000, 34_000),
    'rte': _glue_tuning(16, 150, 2_500, 2e-5),
}


@dataclasses.dataclass(frozen=True)
class PromptTuning(Tuning):
  """Published prompt tuning of one benchmark, with 1 % of its training data."""
  sharing: str = 'shared'  # model.prompt_sharing
  linear_head: bool = False
  label_prompts: bool = False
  weight_decay: float = 0.0


_NUM_DEEP_PROMPTS = 10
_SEPARATE = dict(sharing='separate')
# As published for the base size. The learning rates of retrieval differ from those in the names of the files.
PROMPT_TUNING = {
    'imagenet1k': PromptTuning(64, 1e-4, 500, 2_500, max_len=0, linear_head=True, label_prompts=True, drop_path=0.0),
    'kinetics400': PromptTuning(4, 5e-4, 200, 2_000, max_len=0, linear_head=True),
    'coco_caption': PromptTuning(32, 1e-3, 100, 1_000, loss_weight=2.0, drop_path=0.2, dense_drop_path=0.0),
    'coco_retrieval': PromptTuning(256, 1e-3, 50, 500, loss_weight=0.5, drop_path=0.2, **_SEPARATE),
    'flickr30k_caption': PromptTuning(32, 1e-3, 50, 500),
    'flickr30k_retrieval': PromptTuning(256, 1e-3, 50, 1_000, **_SEPARATE),
    'msvd_caption': PromptTuning(2, 1e-3, 25, 200),
    'msvd_retrieval': PromptTuning(16, 1e-3, 10, 100, **_SEPARATE),
}
# Ours: of MSR-VTT only zero-shot evaluation was published.
for _rows in (TUNING, PROMPT_TUNING):
  _rows |= {f'msrvtt_{task}': _rows[f'msvd_{task}'] for task in ('caption', 'retrieval')}


def finetuning(c: ml_collections.ConfigDict, name: str) -> None:
  """Set the optimizer and steps of one benchmark; every parameter trains."""
  t = TUNING[name]
  _train(c, t)
  tables = r'embed/(word|position|type|visual_type|temporal)$'
  c.optim.param_groups = ((tables, 1.0, t.table_weight_decay), *c.optim.param_groups[:-1], (r'.*', 1.0, t.weight_decay))
  c.train.update(dict(log_every=50, checkpoint_every=1000))


def prompt_tuning(c: ml_collections.ConfigDict, name: str) -> None:
  """Set the published prompt tuning of a benchmark in `PROMPT_TUNING`, but not the fraction of its data."""
  t = PROMPT_TUNING[name]
  _train(c, t)
  presets.prompt_tune(c, _NUM_DEEP_PROMPTS, t.sharing)
  c.tasks[name].update(dict(
      batch_size=t.batch_size, loss_weight=t.loss_weight, linear_head=t.linear_head, **_SMOOTHING))
  if t.label_prompts:
    c.target_sets[name].label_prompts = True
  c.train.update(dict(log_every=t.steps // 50, checkpoint_every=t.steps // 5))


def zero_shot(c: ml_collections.ConfigDict, name: str) -> None:
  """Set the published search of captions and length of texts of a benchmark that nothing trains."""
  e, t = c.evaluators.get(name), c.tasks[name]
  if e is not None and e.type == 'caption':
    e.length_penalty = 2.0
  if t.type == 'video_retrieval':
    t.max_len = min(_ZERO_SHOT_TOKENS, c.model.max_text_len)


def _train(c: ml_collections.ConfigDict, t: Tuning) -> None:
  """Set what both recipes have in common."""
  c.optim.update(dict(
      schedule='published', learning_rate=t.learning_rate, final_lr_fraction=t.min_learning_rate / t.learning_rate,
      warmup_steps=t.warmup_steps, b1=0.9, b2=t.b2, eps=t.eps, grad_clip_norm=t.grad_clip_norm))
  is_dense = c.moe.router == DENSE
  c.model.drop_path = t.dense_drop_path if is_dense and t.dense_drop_path is not None else t.drop_path
  c.train.steps = t.steps


def _tuned(task_type: str, source: str, name: str, **values: Any) -> ml_collections.ConfigDict:
  """The task of a benchmark, with the sizes of its row in `TUNING`."""
  t = TUNING[name]
  return _task(task_type, source, batch_size=t.batch_size, loss_weight=t.loss_weight, max_len=t.max_len, **values)


_ENTAILS = (('not_entailment', 'no'), ('entailment', 'yes'))
# Task → the published template, whose suffix belongs to the first text, and pairs of TFDS's name of a class and its
# label word. The first text of a pair loses its full stop but in MNLI. Of two classes, F1 is that of the second.
GLUE = {
    'cola': ('{sentence} This is <spe> . <eot>', (('unacceptable', 'incorrect'), ('acceptable', 'correct'))),
    'sst2': ('{sentence} <eot> It is <spe> . <eot>', (('negative', 'bad'), ('positive', 'wonderful'))),
    'mrpc': ('{sentence1|no_stop} . <spe> , {sentence2} <eot>', (('not_equivalent', 'no'), ('equivalent', 'yes'))),
    'qqp': ('{question1|no_stop} <eot> <spe> , {question2} <eot>', (('not_duplicate', 'no'), ('duplicate', 'yes'))),
    'mnli': ('{premise} <spe> , {hypothesis} <eot>',
             (('contradiction', 'no'), ('neutral', 'maybe'), ('entailment', 'yes'))),
    'qnli': ('{question|no_stop} <eot> it is <spe> , {sentence} <eot>', _ENTAILS),
    'rte': ('{sentence1|no_stop} ? <eot> it is <spe> , {sentence2} <eot>', _ENTAILS),
}


def _glue(c: ml_collections.ConfigDict, name: str) -> None:
  """Add one GLUE task; the hidden labels of the test splits are not evaluated."""
  template, words = GLUE[name]
  c.target_sets[name] = config.target_set(words, family='words')
  c.tasks[name] = _tuned('text_classification', f'tfds:glue/{name}', name, target_set=name, label_column='label',
                         template=template, **_SMOOTHING)
  for split in ('validation_matched', 'validation_mismatched') if name == 'mnli' else ('validation',):
    c.evaluators[f'{name}, {split}'] = config.evaluator('glue', name, split=split)


def _imagenet1k(c: ml_collections.ConfigDict, name: str) -> None:
  """Add the classification of images into 1000 classes, which have one name each."""
  c.target_sets[name] = config.target_set('file:class_names/imagenet1k.tsv', family='names', max_len=32, synonyms=False)
  c.preflight.target_lengths[name] = ((4, 500), (8, 500))  # here and below, the lengths are an assumption
  c.tasks[name] = _tuned('image_classification', 'tfds:imagenet2012', name, target_set=name, label_column='label',
                         **_SMOOTHING, **_CLASSIFIED)
  c.evaluators[name] = config.evaluator('classification', name, split='validation')


def _kinetics400(c: ml_collections.ConfigDict, name: str) -> None:
  """Add the classification of videos into 400 actions: eight frames, four views × three crops."""
  c.target_sets[name] = config.target_set('own:kinetics400/label', family='names', max_len=32)
  c.preflight.target_lengths[name] = ((4, 200), (8, 200))
  c.tasks[name] = _tuned(
      'video_classification', 'own:kinetics400', name, target_set=name, label_column='label', num_frames=8, **_VIDEO)
  c.evaluators[name] = config.evaluator(
      'classification', name, split='validation', batch_size=32, num_views=4, num_crops=3)


# Captioned data → source, training split, template of a caption, frames (0: images).
_CAPTIONED = {
    'coco': ('tfds:coco_captions', 'train+restval+val', '{captions/text}', 0),
    'flickr30k': ('own:flickr30k', 'train', CAPTIONS, 0),
    'msvd': ('own:msvd', 'train', CAPTIONS, 4),
    'msrvtt': ('own:msrvtt', 'train', CAPTIONS, 4),
}


def _captioned(c: ml_collections.ConfigDict, name: str) -> None:
  """Add captioning or retrieval of captioned data, such as coco_caption."""
  data, task_type = name.split('_')
  source, split, template, num_frames = _CAPTIONED[data]
  words = dict(target_set=vocabulary(c)) if task_type == 'caption' else {}
  c.tasks[name] = _tuned(
      f'video_{task_type}' if num_frames else f'image_{task_type}', source, name, split=split, num_frames=num_frames,
      caption_templates=(template,), **words, **_SMOOTHING, **(_VIDEO if num_frames else _FLIPPED))
  search = CAPTION_SEARCH if task_type == 'caption' else {}
  c.evaluators[name] = config.evaluator(task_type, name, split='test', batch_size=64, **search)


def _vqa(c: ml_collections.ConfigDict, name: str) -> None:
  """Add questions about images, with ten answers each.

  The target set has the answers of at least nine questions.
  """
  c.target_sets.vqa_answers = config.target_set('file:class_names/vqa_answers.tsv', family='words', max_len=16)
  c.preflight.target_lengths.vqa_answers = ((4, 3129),)
  c.tasks[name] = _tuned('vqa', 'own:vqa', name, target_set='vqa_answers', label_column='answers', max_predictions=10,
                         template='{question} <spe> <eot>', single_answer=True,
                         mirrored_words=(('left', 'right'),), **_FLIPPED)
  c.evaluators[name] = config.evaluator('vqa', name, split='validation')


# Benchmark → function that adds it to a config with a model.
_DOWNSTREAM = {'imagenet1k': _imagenet1k, 'kinetics400': _kinetics400,
               **{f'{data}_{task_type}': _captioned for data in _CAPTIONED for task_type in ('caption', 'retrieval')},
               'vqa': _vqa, **dict.fromkeys(GLUE, _glue)}
DOWNSTREAM = tuple(_DOWNSTREAM)


def downstream(c: ml_collections.ConfigDict, name: str) -> None:
  """Add the task and the evaluators of a benchmark to a config with a model."""
  _DOWNSTREAM[name](c, name)
