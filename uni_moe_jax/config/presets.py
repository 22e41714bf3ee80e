"""Shared by config files: published choices, a small model, tasks of embedded and of your own data."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import schema

NAME_TOKENS = 16  # tokens of a glyph's name, `eot` included: enough for 97 % of them
TEXT_TOKENS = 64
_BEAM_SIZE = 4  # of captions that are reranked
_CAPTION_TOKENS = 32  # at most, of your own captions
# Of a step on your own data, by the model's width: about a second on two CPU cores, or for an accelerator.
_STEP_TOKENS = ((256, 10_240), (math.inf, 65_536))
# (share of these tokens, weight of the loss) by evaluator: names and captions take longest to learn.
_SHARES = {'retrieval': (3, 2.0), 'caption': (2, 1.5), 'classification': (1, 1.0), 'mlm': (1, 1.0)}
_BATCH_MULTIPLE, _MAX_BATCH = 8, 96
# Pieces of a vocabulary of 2,000 have two to three letters (a Chinese character has three bytes), those of very few
# texts one.
_BYTES_PER_TOKEN = 2.3
_CLASS_TOKENS = 32  # of a class
_NUMBER = re.compile(r'-?\d+(\.\d+)?(e-?\d+)?')
_MAX_NUMBERS = 100  # as classes; more are sizes or scores
_SIDES = ('left', 'right')
# At most; of others 50,000. In retrieval all pairs are scored in memory, as many as in the largest published one; a
# caption takes a search.
_NUM_EVALUATED = {'retrieval': 5000, 'caption': 5000}
# Evaluated splits of glyphs and videos, and what is new in them.
UNSEEN = (('test_characters', 'unseen characters'), ('test_fonts', 'unseen fonts'))
DRAWS = 3  # of retrieval among glyphs and videos, most of whose texts are those of several images
SIZES = {'tiny': 'Ti/16', 'small': 'S/16', 'base': 'B/16', 'large': 'L/16'}  # argument of config files → model.variant


def published(c: ml_collections.ConfigDict, weight_decay: float = 0.05) -> None:
  """Set every field that has a published value, for a config that then deviates.

  A config that does not deviate sets `config.compat` instead. docs/guides/conversion.md lists what no field offers
  because it is a defect in the published code. Published tasks have a sampling weight beside their loss weight.
  weight_decay: of kernels; 0.2 for the published base size, 0.05 for tiny and fine-tuning.
  """
  for section, values in schema.published_values(weight_decay).items():
    c[section].update(values)


def prompt_tune(c: ml_collections.ConfigDict, num_prompts: int = 8, sharing: str = 'shared') -> None:
  """Train prompts, norms, the bias of `spe` and a linear head; freeze everything else.

  This is the published list. Prefix prompts (`model.num_prefix_prompts`) and label prompts of a set train, too, if the
  config has them. The run to start from is `train.init`; a task gets a head by `linear_head=True`. num_prompts: deep
  prompts per layer; sharing: see `model.prompt_sharing`.
  """
  c.model.update(dict(num_deep_prompts=num_prompts, prompt_sharing=sharing, spe_bias=True))
  c.optim.param_groups = (
      (r'prompts/|spe_bias$|linear_head/|(block\d+/norm[12]|embed/norm|similarity/norm)/', 1.0, 0.0),
      (r'.*', schema.FREEZE))


def small(c: ml_collections.ConfigDict) -> None:
  """A model of 64-pixel images that learns on a few CPU cores, and settings for short runs."""
  c.model.update(dict(
      num_layers=2, width=128, num_heads=2, mlp_dim=512, image_size=64, patch_size=16, max_text_len=TEXT_TOKENS,
      layer_scale_init=0.5, remat=False, word_neighbors=2, stem='conv'))
  c.optim.update(dict(name='muon', learning_rate=4e-3, warmup_steps=60))
  c.train.update(dict(steps=2500, log_every=20, checkpoint_every=500, cpu_bfloat16=True))


def own(c: ml_collections.ConfigDict, summaries: Mapping[str, Mapping[str, Any]], devices: int = 1) -> None:
  """Add tasks and evaluators for the columns of your own prepared data.

  Tasks are called NAME_retrieval, NAME_caption, NAME_words, and NAME_COLUMN for a column of classes, with '_' for a dot
  (which no config key can have), and '_2' appended if the name is taken. The tokens of a step are divided between
  them. Half of the images are mirrored in training, unless a class is called left or right. A split without labels of
  a column, or without captions, has no evaluator of their task.

  Args:
    c: config with a model.
    summaries: name of the data → its prepared.json.
    devices: that share each batch, which is larger by this factor.
  """
  shares = {}
  for name, summary in summaries.items():
    shares |= _add_own_tasks(c, name, summary)
  step_tokens = next(tokens for width, tokens in _STEP_TOKENS if c.model.width <= width)
  for name, share in shares.items():
    task = c.tasks[name]
    examples = int(step_tokens * share / sum(shares.values()) / _tokens(c, task))
    task.batch_size = min(max(examples // _BATCH_MULTIPLE, 1) * _BATCH_MULTIPLE, _MAX_BATCH) * devices
  # The distinct words of a step should fit: most of its labels are padding or repeat others.
  labels = sum(t.batch_size * (t.max_predictions if t.type == 'text_mlm' else t.max_len)
               for t in c.tasks.values() if t.target_set == 'vocabulary')
  if labels:
    words = c.target_sets.vocabulary
    words.num_sampled = max(words.num_sampled, -(-labels // 768) * 256)


def _tokens(c: ml_collections.ConfigDict, task: ml_collections.ConfigDict) -> int:
  """Of an example."""
  visual = max(task.num_frames, 1) * (c.model.image_size // c.model.patch_size) ** 2
  texts = 2 if task.type.endswith('caption') else 1  # a caption has as many queries
  return texts * task.max_len + (0 if task.type.startswith('text') else visual)


def _add_own_tasks(c: ml_collections.ConfigDict, name: str, summary: Mapping[str, Any]) -> dict[str, int]:
  """{name of a task: its share of a step's tokens}."""
  shares = {}
  source, columns = f'own:{name}', summary['columns']
  text_bytes = summary['text_bytes'].get('97 %', [0])[0]
  visual = next((media for media in ('image', 'video') if media in columns.values()), '')
  text = next((column for column in ('text', 'text_a', 'text_b') if column in columns), None)
  media = {
      'image': dict(random_flip=True, max_affine=0.2),
      'video': dict(num_frames=min(8, c.model.max_num_frames), crop='jittered_crop', max_affine=0.2)}.get(visual, {})

  def max_len(bound: int, template: int = 1) -> int:
    return int(min(bound, max(16, -(-(text_bytes / _BYTES_PER_TOKEN + template) // 8) * 8)))

  def unused_name(suffix: str) -> str:
    task_name, taken = f'{name}_{suffix}'.replace('.', '_'), {t.replace('_', ' ') for t in c.tasks}
    while task_name.replace('_', ' ') in taken:
      task_name += '_2'
    return task_name

  def add(task_name: str, evaluator: str, task_type: str, sizes: Mapping[str, int], rerank_by: str = '',
          **values: Any) -> None:
    """sizes: split → number of its examples: a split may lack the labels or the captions that another one has."""
    shares[task_name], loss_weight = _SHARES[evaluator]
    search = dict(beam_size=_BEAM_SIZE, rerank_by=rerank_by) if rerank_by else {}
    c.tasks[task_name] = config.task(
        task_type, source, batch_size=_BATCH_MULTIPLE, loss_weight=loss_weight, **values)
    evaluated = [s for s in ('test', 'validation') if sizes.get(s)]
    for split in evaluated:
      suffix = ', validation' if split != evaluated[0] else ''
      c.evaluators[task_name.replace('_', ' ') + suffix] = config.evaluator(
          evaluator, task_name, split=split, num_examples=_NUM_EVALUATED.get(evaluator, 50_000),
          during_training=split == 'validation', **search)

  def vocabulary() -> str:
    if 'vocabulary' not in c.target_sets:
      c.target_sets.vocabulary = config.target_set('vocabulary', family='words', softmax='sampled', num_sampled=512)
    return 'vocabulary'

  if visual and 'captions' in columns:
    values = dict(caption_templates=('{captions}',), max_len=max_len(_CAPTION_TOKENS), **media)
    if visual == 'image':
      values['mirrored_words'] = (_SIDES,)
    retrieval, sizes = unused_name('retrieval'), summary.get('captioned', summary['splits'])
    add(retrieval, 'retrieval', f'{visual}_retrieval', sizes, **values)
    add(unused_name('caption'), 'caption', f'{visual}_caption', sizes, rerank_by=retrieval, target_set=vocabulary(),
        **values)
  if not visual and columns.get('text') == 'text':
    add(unused_name('words'), 'mlm', 'text_mlm', summary['splits'], target_set=vocabulary(),
        max_len=max_len(TEXT_TOKENS), max_predictions=12)
  template = '{text_a} <eot> <spe> , {text_b} <eot>' if 'text_b' in columns else f'{{{text}}} <eot> it is <spe> . <eot>'
  for column, classes in summary['classes'].items():
    names = classes['names']
    if len(names) >= 2 and (visual or text):
      if reason := _without_task(column, names, c.model.max_text_len):
        _note(f'{source}: column {column!r} has {reason}, and gets no task. A config file that calls presets.own can '
              'add one.')
        continue
      task_name = unused_name(column)
      set_tokens = _CLASS_TOKENS if _longest(names) < _CLASS_TOKENS else max(_CLASS_TOKENS, c.model.max_text_len)
      c.target_sets[task_name] = config.target_set(
          f'{source}/{column}', family='names' if visual else 'words', max_len=set_tokens)
      values = media if visual else dict(template=template, max_len=max_len(TEXT_TOKENS, template=8))
      if any(side in re.split(r'[\W_]+', name.lower()) for name in names for side in _SIDES):
        values = {**values, 'random_flip': False}
      sizes = {split: sum(counts) for split, counts in classes['counts'].items()}
      add(task_name, 'classification', f'{visual or "text"}_classification', sizes, target_set=task_name,
          label_column=column, **values)
  cut = [name for name in shares if c.tasks[name].type != 'text_mlm'  # which has parts of long texts
         and 0 < c.tasks[name].max_len < text_bytes / _BYTES_PER_TOKEN]
  if cut:
    _note(f'{source}: 3 % of the texts have more than {text_bytes:,} bytes, about {text_bytes / _BYTES_PER_TOKEN:,.0f} '
          f'tokens, and are cut to {c.tasks[cut[0]].max_len}; to keep more, raise ' +
          ' and '.join(f'tasks.{name}.max_len' for name in cut) +
          f', and model.max_text_len={c.model.max_text_len} where they exceed it.')
  return shares


def _without_task(column: str, names: Sequence[str], max_text_len: int) -> str:
  """Why a column of classes gets no task, '' if it gets one."""
  if column != 'label' and len(names) > _MAX_NUMBERS and all(map(_NUMBER.fullmatch, names)):
    return f'{len(names):,} classes, all of them numbers'
  is_long = _longest(names) / _BYTES_PER_TOKEN + 1 > max_text_len
  return f'a class of {_longest(names):,} bytes, too long for model.max_text_len={max_text_len}' if is_long else ''


def _longest(names: Sequence[str]) -> int:
  """Bytes of the longest name."""
  return max(len(name.encode()) for name in names)


def _note(text: str) -> None:
  print(f'note: {text}', file=sys.stderr, flush=True)


def embedded(c: ml_collections.ConfigDict) -> None:
  """The tasks of `embedded_tasks`, and a model for short runs on them."""
  embedded_tasks(c)
  c.model.update(dict(
      patch_size=8, max_text_len=TEXT_TOKENS, layer_scale_init=0.5,
      pixel_mean=(0.12,) * 3, pixel_std=(0.3,) * 3,  # of the training images, which are mostly background
      word_neighbors=2, frame_differences=True))


def quickstart(c: ml_collections.ConfigDict) -> None:
  """The model of the quickstart and of longer runs on the embedded data, its batches, and its search of captions."""
  embedded(c)
  # A step of four layers takes twice as long and teaches little more (docs/results/quickstart.md).
  c.model.update(dict(num_layers=2, width=128, num_heads=2, mlp_dim=512, stem='conv'))
  for name, batch_size, loss_weight in (
      ('glyph_class', 48, 1.5), ('glyph_name', 96, 3.5), ('glyph_caption', 64, 3.0), ('glyph_question', 24, 1.5),
      ('video_motion', 8, 1.5), ('text', 16, 1.5), ('package', 24, 2.0)):
    c.tasks[name].update(dict(batch_size=batch_size, loss_weight=loss_weight))
  c.target_sets.vocabulary.num_sampled = 512
  for _, novelty in UNSEEN:
    c.evaluators[f'caption, {novelty}'].update(dict(beam_size=_BEAM_SIZE, rerank_by='glyph_name'))


def embedded_tasks(c: ml_collections.ConfigDict) -> None:
  """Seven tasks of six task types on the embedded glyphs, videos and texts, and their evaluators.

  No task trains on the names of videos: `video_name`, a known task type on new data, is evaluated zero-shot. The source
  `pairs` (does a paragraph continue a summary?) has no task: after an hour of training it is still at chance.
  """
  c.model.update(dict(image_size=32, remat=False))
  c.target_sets.glyph_classes = config.target_set('glyphs/class', family='names')
  c.target_sets.motions = config.target_set('videos/motion', family='words')
  c.target_sets.vocabulary = config.target_set('vocabulary', family='words', softmax='sampled', num_sampled=768)
  c.target_sets.answers = config.target_set('questions/answer', family='words')
  c.target_sets.packages = config.target_set('paragraphs/package', family='words')

  c.tasks.glyph_class = config.task(
      'image_classification', 'glyphs', batch_size=64, target_set='glyph_classes', label_column='class')
  c.tasks.glyph_name = config.task(
      'image_retrieval', 'glyphs', batch_size=96, caption_templates=('{name}',), max_len=NAME_TOKENS)
  c.tasks.glyph_caption = config.task(
      'image_caption', 'glyphs', batch_size=32, target_set='vocabulary', caption_templates=('{name}',),
      max_len=NAME_TOKENS)
  c.tasks.glyph_question = config.task(
      'vqa', 'questions', batch_size=24, target_set='answers', label_column='answer',
      template='{question} <eot> <spe> . <eot>', max_len=NAME_TOKENS)
  # A question of its own: motions and names of videos would otherwise share one feature and its condition, and names
  # of videos, which no task trains, would be lost.
  c.tasks.video_motion = config.task(
      'vqa', 'videos', batch_size=16, target_set='motions', label_column='motion',
      template='how does it move ? <eot> <spe> . <eot>', max_len=NAME_TOKENS)
  c.tasks.text = config.task(
      'text_mlm', 'corpus', batch_size=24, target_set='vocabulary', max_len=TEXT_TOKENS, max_predictions=12)
  c.tasks.package = config.task(
      'text_classification', 'paragraphs', batch_size=24, target_set='packages', label_column='package',
      template='{text} <eot> it is from <spe> . <eot>', max_len=TEXT_TOKENS)
  c.tasks.video_name = config.task(
      'video_retrieval', 'videos', batch_size=0, caption_templates=('{name}',), max_len=NAME_TOKENS)

  # Tokens of the tokenizer that the quickstart learns.
  c.preflight.target_lengths.update(dict(
      answers=((2, 20), (7, 7)), glyph_classes=((4, 28), (9, 24)), motions=((5, 12),), packages=((6, 10),)))
  c.preflight.num_frames.update(dict(video_motion=8, video_name=8))

  for split, novelty in UNSEEN:
    c.evaluators[f'class, {novelty}'] = config.evaluator('classification', 'glyph_class', split=split)
    c.evaluators[f'name, {novelty}'] = config.evaluator(
        'retrieval', 'glyph_name', split=split, num_examples=500, num_draws=DRAWS)
    c.evaluators[f'caption, {novelty}'] = config.evaluator('caption', 'glyph_caption', split=split, num_examples=1000)
    c.evaluators[f'question, {novelty}'] = config.evaluator('classification', 'glyph_question', split=split)
    c.evaluators[f'motion, {novelty}'] = config.evaluator('classification', 'video_motion', split=split)
    c.evaluators[f'zero-shot video name, {novelty}'] = config.evaluator(
        'retrieval', 'video_name', split=split, num_examples=400, num_draws=DRAWS)
  c.evaluators['masked words'] = config.evaluator('mlm', 'text', split='test')
  c.evaluators['package'] = config.evaluator('classification', 'package', split='test')
