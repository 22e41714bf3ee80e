"""What several configs share: the tasks of one body of data, and the choices of the published system."""

from collections.abc import Collection, Mapping, Sequence

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import schema

NAME_TOKENS = 16  # a name of a glyph with its `eot`: enough for 97 % of them
TEXT_TOKENS = 64
_CANDIDATES = 5000  # of a retrieval over own data, as published ones have at most: each stands beside each in memory
# Splits of glyphs and clips that are evaluated, and what is new in them.
UNSEEN = (('test_characters', 'unseen characters'), ('test_fonts', 'unseen fonts'))
# Published normalisation of pictures; video has 0.5 for both.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {  # num_layers, width, num_heads, mlp_dim
    'tiny': (12, 192, 3, 768), 'small': (12, 384, 6, 1536), 'base': (12, 768, 12, 3072), 'large': (24, 1024, 16, 4096)}


def published(c: ml_collections.ConfigDict, weight_decay: float = 0.05) -> None:
  """Every choice of the published system where ours differs, on any sizes, tasks and router.

  README.md lists them. What no field offers, because it is a defect or an accident there, is listed there too. Tasks keep
  their loss weight apart from how often they are drawn: give them `sampling`.

  Args:
    c: config to change.
    weight_decay: of kernels; 0.2 for the published base size, 0.05 for tiny and fine-tuning.
  """
  c.model.update(dict(
      readout_token='<spe>', pixel_mean=IMAGENET_MEAN, pixel_std=IMAGENET_STD, video_mean=(0.5,) * 3, video_std=(0.5,) * 3,
      posemb='frozen', text_posemb_init='normal', text_posemb_std=0.02, mimetic_init=False,
      frame_differences=False, temporal_posemb_std=0.02, layer_scale_init=1e-3, extra_temperature_groups=schema.PUBLISHED_TEMPERATURES))
  c.data.random_special_tokens = True
  c.optim.update(dict(
      schedule='published', b1=0.9, b2=0.95, eps=1e-6, grad_clip_norm=0.1,
      unused_params='zerograd',  # PyTorch of its time; 'settonone' is what PyTorch 2 does with the same code
      param_groups=(
          (r'embed/spatial$', schema.FREEZE),
          (r'scale[12]$|log_scale', 1.0, 0.0),
          (r'_router/', 1.0, 0.0),
          (r'embed/(word|position|type|visual_type|temporal)$', 1.0, 0.0),
          (r'prompts/|similarity_weight$', 1.0, 0.0),
          (r'spe_bias$', 1.0, weight_decay),  # [1, D] there, so that it counts as a matrix
          (r'norm\d?/|bias$', 1.0, 0.0),
          (r'.*', 1.0, weight_decay),
      )))
  c.train.update(dict(mixture='one_task', encode_all_sets=True, contrastive_reduction='sum', mask_duplicate_texts=False))


def published_size(c: ml_collections.ConfigDict, size: str) -> None:
  """Depth and widths of a published model, a key of `SIZES`."""
  c.model.update(dict(zip(('num_layers', 'width', 'num_heads', 'mlp_dim'), SIZES[size])))


def prompt_tune(c: ml_collections.ConfigDict, prompts: int = 8, sides: str = 'shared') -> None:
  """Tunes prompts, norms, the bias of `spe` and a linear head, and freezes all else: experts, gates, temperatures.

  The published list of what trains. Where a run starts is another field, `train.init`; a task gets a head by `head=True`.
  Prefix prompts (`model.num_prefix_prompts`) and label prompts of a set train, too, where the config has them.

  Args:
    c: config to change.
    prompts: deep prompts per layer.
    sides: of them, as `model.prompt_sharing`.
  """
  c.model.update(dict(num_deep_prompts=prompts, prompt_sharing=sides, spe_bias=True))
  c.optim.param_groups = (
      (r'prompts/|spe_bias$|linear_head/|(block\d+/norm[12]|embed/norm|similarity/norm)/', 1.0, 0.0),
      (r'.*', schema.FREEZE))


def small(c: ml_collections.ConfigDict) -> None:
  """A model that learns on a few CPU cores, of pictures of 64 pixels, and what suits short runs."""
  c.model.update(dict(
      num_layers=4, width=128, num_heads=2, mlp_dim=512, image_size=64, patch_size=8, max_text_len=TEXT_TOKENS, layer_scale_init=0.5, remat=False,
      text_posemb_init='sincos', text_posemb_std=0.06))
  c.optim.update(dict(learning_rate=1e-3, warmup_steps=60))
  c.train.update(dict(steps=800, log_every=20, checkpoint_every=200))


def own(
    c: ml_collections.ConfigDict, name: str, columns: Mapping[str, str], classes: Mapping[str, Sequence[str]],
    splits: Collection[str]) -> None:
  """Tasks and evaluators of your own prepared data, by what it has.

  Args:
    c: config to add them to, with a model.
    name: of the data; tasks are called NAME_retrieval, NAME_caption, NAME_words, and NAME_COLUMN for a column of classes: with '_'
      for a dot, which no key of a config has, and '_2' behind it where another task is called so.
    columns: kind of each column. classes: names of each class column. splits: that there are. All as in prepared.json.
  """
  source, kinds = f'own:{name}', set(columns.values())
  visual = 'image' if 'image' in kinds else 'video' if 'video' in kinds else ''
  held_out = next((s for s in ('test', 'validation') if s in splits), None)
  shown = dict(num_frames=min(8, c.model.max_num_frames), crop='jittered_crop') if visual == 'video' else {}
  texts = [f for f in ('text', 'text_a', 'text_b') if f in columns]

  def add(what, evaluator, *args, **fields):
    task_name = free(what)
    c.tasks[task_name] = config.task(*args, source, **fields)
    number = _CANDIDATES if evaluator == 'retrieval' else 0
    if held_out:
      c.evaluators[task_name.replace('_', ' ')] = config.evaluator(evaluator, task_name, split=held_out, num_examples=number)

  def free(what):
    task_name, taken = f'{name}_{what}'.replace('.', '_'), {t.replace('_', ' ') for t in c.tasks}
    while task_name.replace('_', ' ') in taken:
      task_name += '_2'
    return task_name

  def words():
    if 'vocabulary' not in c.target_sets:
      c.target_sets.vocabulary = config.target_set('vocabulary', family='words', softmax='sampled', num_sampled=512)
    return 'vocabulary'

  if visual and 'captions' in columns:
    add('retrieval', 'retrieval', f'{visual}_retrieval', batch_size=32, caption_templates=('{captions}',), max_len=32, **shown)
    add('caption', 'caption', f'{visual}_caption', batch_size=16, target_set=words(), caption_templates=('{captions}',), max_len=32, **shown)
  if not visual and columns.get('text') == 'text':
    add('words', 'mlm', 'text_mlm', batch_size=32, target_set=words(), max_len=TEXT_TOKENS, max_predictions=12)
  for column, found in classes.items():
    if len(found) > 1 and (visual or texts):
      entries = free(column)
      if visual:
        c.target_sets[entries] = config.target_set(f'{source}/{column}', family='names', max_len=32)
        add(column, 'classification', f'{visual}_classification', batch_size=32, target_set=entries, label_column=column, **shown)
      else:
        c.target_sets[entries] = config.target_set(f'{source}/{column}', family='words', max_len=32)
        template = '{text_a} <eot> <spe> , {text_b} <eot>' if 'text_b' in texts else f'{{{texts[0]}}} <eot> it is <spe> . <eot>'
        add(column, 'classification', 'text_classification', batch_size=32, target_set=entries, label_column=column, template=template,
            max_len=TEXT_TOKENS)


def embedded(c: ml_collections.ConfigDict) -> None:
  """The embedded data: six tasks of six kinds on glyphs, clips and text, and their evaluators.

  Names of clips are never trained on: `video_name` is a known kind on new data, evaluated zero-shot. The source `pairs` (does a
  paragraph continue a summary?) has no task here: an hour of training leaves it at chance.
  """
  # Mean and deviation of the training pictures: most of a glyph's picture is background.
  c.model.update(dict(
      image_size=32, patch_size=8, max_text_len=TEXT_TOKENS, pixel_mean=(0.12,) * 3, pixel_std=(0.3,) * 3, layer_scale_init=0.5,
      remat=False,
      # Without these, masked words stay at the unigram's perplexity for hundreds of steps: attention has to find
      # out first what a neighbour is.
      text_posemb_init='sincos', text_posemb_std=0.06, mimetic_init=True))
  c.target_sets.glyph_classes = config.target_set('glyphs/class', family='names')
  c.target_sets.motions = config.target_set('videos/motion', family='names')
  c.target_sets.vocabulary = config.target_set('vocabulary', family='words', softmax='sampled', num_sampled=768)
  c.target_sets.packages = config.target_set('paragraphs/package', family='words')

  c.tasks.glyph_class = config.task(
      'image_classification', 'glyphs', batch_size=64, target_set='glyph_classes', label_column='class')
  c.tasks.glyph_name = config.task(
      'image_retrieval', 'glyphs', batch_size=96, caption_templates=('{name}',), max_len=NAME_TOKENS)
  c.tasks.glyph_caption = config.task(
      'image_caption', 'glyphs', batch_size=32, target_set='vocabulary', caption_templates=('{name}',), max_len=NAME_TOKENS)
  c.tasks.video_motion = config.task(
      'video_classification', 'videos', batch_size=16, target_set='motions', label_column='motion')
  c.tasks.text = config.task(
      'text_mlm', 'corpus', batch_size=24, target_set='vocabulary', max_len=TEXT_TOKENS, max_predictions=12)
  c.tasks.package = config.task(
      'text_classification', 'paragraphs', batch_size=24, target_set='packages', label_column='package',
      template='{text} <eot> it is from <spe> . <eot>', max_len=TEXT_TOKENS)
  c.tasks.video_name = config.task('video_retrieval', 'videos', batch_size=0, caption_templates=('{name}',), max_len=NAME_TOKENS)

  # Tokens as the tokenizer of the quickstart counts them.
  c.preflight.target_lengths.update(dict(
      glyph_classes=((4, 28), (9, 24)), motions=((5, 12),), packages=((6, 10),)))
  c.preflight.num_frames.update(dict(video_motion=8, video_name=8))

  for split, where in UNSEEN:
    c.evaluators[f'class, {where}'] = config.evaluator('classification', 'glyph_class', split=split)
    c.evaluators[f'name, {where}'] = config.evaluator('retrieval', 'glyph_name', split=split, num_examples=500)
    c.evaluators[f'caption, {where}'] = config.evaluator('caption', 'glyph_caption', split=split, num_examples=1000)
    c.evaluators[f'motion, {where}'] = config.evaluator('classification', 'video_motion', split=split)
    c.evaluators[f'zero-shot video name, {where}'] = config.evaluator(
        'retrieval', 'video_name', split=split, num_examples=400)
  c.evaluators['masked words'] = config.evaluator('mlm', 'text', split='test')
  c.evaluators['package'] = config.evaluator('classification', 'package', split='test')
