"""Every field of a config with its type, default, unit and bound.

Tasks, target sets and evaluators are in `task_schema.py`. Config files start from `base()`; `parse_config` returns the
checked, frozen `Config`, which is part of the plan.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_collections

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.config import fields
from uni_moe_jax.config.fields import entries, field
from uni_moe_jax.config.task_schema import EvaluatorConfig, TargetSetConfig, TaskConfig
from uni_moe_jax.tasks.router_names import GMM_BACKENDS, ROUTERS
from uni_moe_jax.utils.errors import UsageError

FREEZE = 'freeze'
SUBLAYERS = ('attention', 'mlp')
# Temperature groups of the published system; each of its checkpoints has all of them.
PUBLISHED_TEMPERATURES = ('img_cls', 'video_cls', 'text_mlm', 'text_caption', 'caption', 'mlm', 'retrieve', 'tqa_mlm',
                          'tqa_caption', 'tqa_retrieve', 'downstream')
# Task type → its published group. Text classification shares that of masked language modeling.
PUBLISHED_GROUPS = {
    'image_classification': 'img_cls', 'video_classification': 'video_cls', 'image_caption': 'caption',
    'video_caption': 'caption', 'image_retrieval': 'retrieve', 'video_retrieval': 'retrieve', 'text_mlm': 'text_mlm',
    'text_classification': 'text_mlm', 'vqa': 'downstream'}
# Published sizes; the names are those of ViT.
VARIANTS = {name: dict(num_layers=L, width=D, num_heads=N, mlp_dim=F, patch_size=16) for name, L, D, N, F in (
    ('Ti/16', 12, 192, 3, 768), ('S/16', 12, 384, 6, 1536), ('B/16', 12, 768, 12, 3072), ('L/16', 24, 1024, 16, 4096))}


def param_groups(weight_decay: float) -> tuple[tuple[Any, ...], ...]:
  """The default parameter groups: kernels decay, everything else does not."""
  return (
      (r'scale[12]$|log_scale', 1.0, 0.0),
      (r'_router/', 1.0, 0.0),
      (r'prompts/|similarity_weight$', 1.0, 0.0),
      (r'embed/(word|position|type|visual_type|temporal|spatial)$', 1.0, 0.0),
      (r'norm\d?/|bias$', 1.0, 0.0),
      (r'.*', 1.0, weight_decay),
  )


def published_param_groups(weight_decay: float) -> tuple[tuple[Any, ...], ...]:
  """The published parameter groups; published decay: 0.2 for base, 0.05 for tiny and for fine-tuning."""
  return (
      (r'embed/spatial$', FREEZE),
      (r'scale[12]$|log_scale', 1.0, 0.0),
      (r'_router/', 1.0, 0.0),
      (r'embed/(word|position|type|visual_type|temporal)$', 1.0, 0.0),
      (r'prompts/|similarity_weight$', 1.0, 0.0),
      (r'spe_bias$', 1.0, weight_decay),  # [1, D] in the published code, which counts as a matrix
      (r'norm\d?/|bias$', 1.0, 0.0),
      (r'.*', 1.0, weight_decay),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Sizes and choices of the model."""
  variant: str = field('', 'Published sizes: sets num_layers, width, num_heads, mlp_dim and patch_size, which must '
                       "then be left at their defaults. '' = the sizes as given.", choices=('', *VARIANTS))
  num_layers: int = field(12, 'L, number of blocks.', at_least=1)
  width: int = field(192, 'D, width of the residual stream; a multiple of num_heads and of 4.', at_least=4)
  num_heads: int = field(3, 'N, attention heads.', at_least=1)
  mlp_dim: int = field(768, 'F, hidden units of the MLP.', at_least=1)
  image_size: int = field(224, 'Pixels a side; a multiple of patch_size.', at_least=1)
  patch_size: int = field(16, 'Pixels a side of a patch.', at_least=1)
  channels: int = field(3, 'Color channels.', at_least=1)
  max_num_frames: int = field(8, 'T, rows of the temporal position table.', at_least=1)
  max_text_len: int = field(512, 'Tokens, rows of the text position table.', at_least=1)
  stem: str = field('patch', 'How pixels become tokens: patch, one projection of each patch; conv, convolutions of '
                    '3 × 3 pixels, for short runs (model/stem.py).', choices=('patch', 'conv'), published='patch')
  pixel_mean: tuple[float, ...] = field(
      (0.5, 0.5, 0.5), 'Mean of pixels in [0, 1], per channel.', published=(0.485, 0.456, 0.406))
  pixel_std: tuple[float, ...] = field(
      (0.5, 0.5, 0.5), 'Standard deviation of pixels in [0, 1], per channel.', above=0, published=(0.229, 0.224, 0.225))
  video_mean: tuple[float, ...] = field((), 'pixel_mean of videos (more than one frame); () = as images.',
                                        published=(0.5,) * 3)
  video_std: tuple[float, ...] = field((), 'pixel_std of videos; () = as images.', above=0, published=(0.5,) * 3)
  posemb: str = field(
      'sincos2d', 'Image position embedding: sincos2d (computed), frozen (a parameter that starts as sincos2d and '
      'never changes), learned.', choices=('sincos2d', 'frozen', 'learned'), published='frozen')
  modality_embedding: bool = field(
      False, 'Adds a learned row to every visual token (some published checkpoints have it).')
  posemb_scale: float = field(1.0, 'Factor of row and column in sin-cos image positions: 160/224 where a model of '
                              '160 pixels continues at 224, so that a patch keeps its place in the image.', above=0)
  word_neighbors: int = field(
      0, "Words on each side that a word's token also contains, each offset through its own kernel; in captions, only "
      'preceding words. At 0, attention must find them first (costly in short runs).', at_least=0, published=0)
  frame_differences: bool = field(
      False, 'Adds to every video patch its change since the previous frame, through its own kernel. Without it, '
      'motion direction is a product of time, position and brightness that an hour of training did not find '
      '(docs/results/embedded.md).', published=False)
  temporal_posemb_std: float = field(0.02, 'Initial std of the temporal position table.', at_least=0, published=0.02)
  readout_token: str = field('<spe>', 'Token in front of every sequence: <spe>, as LN(Word[spe]); or a word, embedded '
                             'as a text of length 1.', published='<spe>')
  layer_scale_init: float = field(1e-3, 'Initial LayerScale; about 0.1 for small models.', at_least=0, published=1e-3)
  drop_path: float = field(0.0, 'Rate of stochastic depth, the same in every layer.', at_least=0, below=1)
  temperature_init: float = field(
      0.07, 'Initial τ of every temperature group. 1/τ is clamped at 100, where it has no gradient.', above=0.01)
  num_deep_prompts: int = field(0, 'P, learned tokens per layer.', at_least=0)
  prompt_sharing: str = field('shared', 'Which sides have prompts: shared (one table for inputs and targets), separate '
                              '(two tables), inputs (targets have none).', choices=('shared', 'separate', 'inputs'))
  num_prefix_prompts: int = field(0, 'Learned tokens after readout_token, on the sides of prompt_sharing.', at_least=0)
  spe_bias: bool = field(False, 'Adds a learned row to every <spe> token.')
  extra_temperature_groups: tuple[str, ...] = field(
      (), 'Temperature groups beside those of the trained tasks, such as those of a converted checkpoint.',
      published=PUBLISHED_TEMPERATURES)
  dtype: str = field(
      'float32', 'Type of the products of layers; everything else is float32 (moe/precision.py). With float32, TPUs '
      'and GPUs multiply in their default precision in training, in full float32 in evaluation and exports.',
      choices=('float32', 'bfloat16'))
  attention_impl: str = field(
      'auto', 'Attention where all queries see the same keys: auto (by device, dtype and length), xla, cudnn (NVIDIA '
      'Ampere or newer, bfloat16), splash (TPUs), short (TPUs, segments that see only themselves). Captions, prompts '
      'and caches always use xla.', choices=('auto', 'xla', 'cudnn', 'short', 'splash'))
  remat: bool = field(True, 'Recomputes blocks in the backward pass: less memory, a third more work (less on CPU).')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
  """Routers and experts."""
  router: str = field('attribute', 'Router input: attribute, task or modality (of the condition; kernels merge), token '
                      'or context (of the token; tokens are dispatched), or dense: no experts.', choices=ROUTERS)
  num_experts: int = field(8, 'E, experts per layer.', at_least=1)
  top_k: int = field(2, 'K, experts kept per router input; their gates are renormalized to sum to 1, so that a '
                       'router with K = 1 has no gradient and does not learn.', at_least=1)
  noise_std: float = field(1.0, 'Standard deviation of the training noise of gate logits, divided by E.', at_least=0)
  placement: str | tuple[int, ...] = field('all', 'Layers with experts: all, every_2 (0, 2, 4, …), every_4, none, or a '
                                           'tuple of layer indices.', choices=('all', 'every_2', 'every_4', 'none'))
  sublayers: tuple[str, ...] = field(SUBLAYERS, 'Sublayers whose projections have experts.', choices=SUBLAYERS)
  experts_per_condition: int = field(0, 'Token routers: tokens are routed among this many experts, chosen by attribute '
                                     'bits; 0: among all.', at_least=0, off=0)
  capacity_factor: float = field(0.0, 'Token routers: in training, an expert takes ⌈factor · K · tokens / E⌉ tokens of '
                                 'an array.', at_least=0, off=0)
  gmm: str = field('auto', 'Grouped matrix multiplication of token routers: auto (by device), xla (as auto, but '
                   'without custom kernels), tiled, batched, ragged, megablox, triton, tokamax.',
                   choices=('auto', 'xla', *GMM_BACKENDS))
  balance_loss_weight: float = field(0.0, 'Token routers: weight of the load balancing loss.', at_least=0, off=0)
  importance_loss_weight: float = field(0.0, 'Token routers: weight of the importance loss.', at_least=0, off=0)
  z_loss_weight: float = field(0.0, 'Token routers: weight of the z-loss of gate logits.', at_least=0, off=0)


def check_placement(placement: str | tuple[int, ...], num_layers: int) -> None:
  """Raise UsageError for the index of a layer that a model does not have."""
  fields.fail_if(isinstance(placement, tuple) and any(not 0 <= i < num_layers for i in placement),
                 f'moe.placement={placement} has an index outside 0…{num_layers - 1}.')


def layers_with_experts(placement: str | tuple[int, ...], num_layers: int) -> Sequence[int]:
  """Return the layers with experts. 'every_2' is indices 0, 2, 4, … as published."""
  if not isinstance(placement, str):
    return placement
  return () if placement == 'none' else range(0, num_layers, {'all': 1, 'every_2': 2, 'every_4': 4}[placement])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
  """Tokenizer."""
  type: str = field('sentencepiece', "sentencepiece (learned from the run's text), or clip (the published one; needs "
                    'the extra `clip`).', choices=('sentencepiece', 'clip'))
  vocab_size: int = field(2000, 'V of sentencepiece, with special tokens; clip: follows from merges_path.', at_least=1)
  allow_smaller_vocab: bool = field(False, 'Takes fewer pieces if texts are too few for vocab_size; False: an error.')
  path: str = field('', "A trained sentencepiece model, such as a run's tokenizer.model; '' trains one.", path=True)
  merges_path: str = field(
      '', "With clip: path of CLIP's bpe_simple_vocab_16e6.txt.gz, or of another file of this format.", path=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Prepared data."""
  dir: str = field('~/.cache/uni_moe_jax', 'Folder of the prepared data, also gs://… or s3://…; see '
                   'uni-moe prepare-data.', path=True)
  cache_dir: str = field(
      '~/.cache/uni_moe_jax/buckets', 'Folder of this host where files of a data.dir in a bucket are kept.', path=True)
  cache_gb: float = field(
      0.0, 'Size limit of cache_dir in GB; beyond it the least recently used files are removed. Training files must '
      'fit. 0: no limit.', at_least=0)
  max_corrupt_fraction: float = field(
      0.01, 'Fraction of the examples read from files that may be unusable before the run stops.', at_least=0)
  resize: str = field(
      'fast', 'How images in files are resized: fast (cropped first, means of areas); pillow (decoded whole, bicubic).',
      choices=('fast', 'pillow'), published='pillow')
  random_special_tokens: bool = field(False, 'Random words of text_mlm may be special tokens.', published=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreflightConfig:
  """Facts about data that is not available; uni-moe preflight reads them, training does not."""
  target_lengths: Mapping[str, tuple[tuple[int, int], ...]] = entries(
      None, '{target set: ((tokens, entries), …)}: how many entries have how many tokens, `eot` included.')
  num_frames: Mapping[str, int] = entries(
      None, "{task: T}: frames of an embedded video; by default the task's num_frames, or 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """Optimizer."""
  name: str = field('adamw', 'adamw; or muon (Muon for kernels, per expert, AdamW for the rest): short runs learn '
                    'more, at more work per step (train/muon.py).', choices=('adamw', 'muon'),
                    published='adamw')
  learning_rate: float = field(1e-3, 'Peak learning rate.', at_least=0)
  warmup_steps: int = field(200, 'Steps of linear warmup.', at_least=0)
  schedule: str = field('cosine', 'cosine; constant; published (its first update has rate 0, and its cosine rises '
                        'again past the end).', choices=('cosine', 'constant', 'published'), published='published')
  decay_steps: int = field(0, 'Step at which the schedule ends; 0: at train.steps.', at_least=0)
  final_lr_fraction: float = field(0.0, 'Learning rate at the end, as a fraction of the peak.', at_least=0)
  b1: float = field(0.9, 'Decay of the first moment.', at_least=0, below=1, published=0.9)
  b2: float = field(0.95, 'Decay of the second moment.', at_least=0, below=1, published=0.95)
  eps: float = field(1e-6, "Adam's epsilon.", above=0, published=1e-6)
  grad_clip_norm: float = field(1.0, 'Global norm to which gradients are clipped.', at_least=0, off=0, published=0.1)
  router_lr_multiplier: float = field(1.0, 'Factor of the learning rate of routers, on top of their group.', at_least=0)
  layerwise_lr_decay: float = field(1.0, 'Factor of the learning rate per layer below the last; embeddings are the '
                                    'lowest.', above=0, at_most=1, off=1)
  unused_params: str = field(
      'update', 'What a step does to unused parameters and experts: update (zero gradient; moments and weights decay), '
      'settonone (unchanged) or zerograd (unchanged until first used); see train/adam.py.',
      choices=('update', 'settonone', 'zerograd'),
      published='zerograd')  # PyTorch of its time; 'settonone' is what PyTorch 2 does with the same code
  param_groups: tuple[tuple, ...] = field(
      param_groups(0.05), "(pattern, learning rate factor, weight decay) or (pattern, 'freeze'). The first match in a "
      "parameter's path, such as encoder/blocks/block0/ffn_in/kernel, wins; every parameter must match a pattern.",
      published=published_param_groups(0.05))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """Training loop."""
  init: str = field('', "Work directory of a run whose newest parameters this run starts from, or an export with its "
                    "checkpoint, also hf:OWNER/NAME@REVISION; '' = fresh.", path=True)
  steps: int = field(1000, 'Training steps.', at_least=1)
  mixture: str = field('all_tasks', 'all_tasks: every task in every step; one_task: one task per step, drawn by its '
                       'sampling_weight.', choices=('all_tasks', 'one_task'), published='one_task')
  grad_accum_steps: int = field(1, 'Micro-steps per step; target sets are encoded once for all of them.', at_least=1)
  cpu_bfloat16: bool = field(
      False, "On one CPU with bfloat16 products (AMX or AVX512_BF16), training rounds the operands of float32 layers' "
      'products to bfloat16, which is faster; sums and results stay float32. Evaluation, exports, other devices and '
      "model.dtype='bfloat16' ignore this field.")
  encode_all_sets: bool = field(False, 'Encodes also the target sets that no task of the step uses.', published=True)
  contrastive_reduction: str = field(
      'mean', 'Combines the two directions of the retrieval loss.', choices=('mean', 'sum'), published='sum')
  mask_duplicate_texts: bool = field(
      True, 'Equal texts in a retrieval batch are masked; False: they are negatives of each other.', published=False)
  negatives: str | int = field(
      'global', "Negatives of a retrieval pair: 'global', its task's examples of the (micro-)batch; N, those of its "
      'block of N examples, as on one of the published ranks.', choices=('global',), at_least=2)
  ema_decay: float = field(0.0, 'Decay of averaged parameters, which evaluation then uses.', at_least=0, below=1, off=0)
  deterministic: bool = field(
      False, 'On GPUs, makes steps bit-identical in every process, so that a resumed run ends like an uninterrupted '
      'one; slower (no atomic sums, no autotuning). CPU and TPU steps always are.')
  log_every: int = field(20, 'Steps.', at_least=1)
  checkpoint_every: int = field(200, 'Steps.', at_least=1)
  max_to_keep: int = field(2, 'Number of newest checkpoints kept.', at_least=1)
  keep_every: int = field(
      0, 'Checkpoints whose step is a multiple of this are kept forever, besides the newest and the best.',
      at_least=0, off=0)
  evaluate_every: int = field(
      0, 'Steps between evaluations by the evaluators with during_training=True, which also follow the last step; '
      'logged as eval/EVALUATOR/METRIC.', at_least=0, off=0)
  best_metric: str = field(
      '', 'Keeps also the checkpoint with the best value of this metric: loss/total, loss/TASK or '
      "eval/EVALUATOR/METRIC; '' = none.")
  max_nonfinite_steps: int = field(10, 'Consecutive steps with a non-finite loss before the run stops.', at_least=1)
  hang_timeout: float = field(
      600.0, 'Seconds that a batch, step or save may take before the run counts as hung and ends.', at_least=0, off=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Device mesh. One axis may be -1: the devices that the other axes leave."""
  replica: int = field(1, 'Devices of the replica axis, which splits the batch; for slower links.')
  data: int = field(-1, 'Devices of the data axis, which splits the batch.')
  expert: int = field(1, 'Devices of the expert axis, which splits experts and the batch.')
  model: int = field(1, 'Devices of the model axis, which splits heads and the MLP.')
  fsdp: bool = field(False, 'Splits parameters over the data axis, too.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A run."""
  # JAX keeps 32 bits of a seed: others would repeat parameters and noise of a run with another seed.
  seed: int = field(0, 'Seed of parameters, data order and noise.', at_least=0, at_most=2**32 - 1)
  compat: str = field('', "'published' sets every field that has a published value to it. These fields must then be "
                      'left at their defaults; of param_groups, the weight decay of kernels may differ. A config file '
                      'that deviates calls `presets.published` instead.', choices=('', 'published'))
  model: ModelConfig = ModelConfig()
  moe: MoeConfig = MoeConfig()
  tokenizer: TokenizerConfig = TokenizerConfig()
  data: DataConfig = DataConfig()
  preflight: PreflightConfig = PreflightConfig()
  task_types: Mapping[str, Any] = entries(None, 'Your own task types: {name: {inputs, target, readout, router_task}}.')
  target_families: Mapping[str, Any] = entries(None, 'Your own target families: {name: four task bits}.')
  target_sets: Mapping[str, TargetSetConfig] = entries(TargetSetConfig, '{name: config.target_set(…)}')
  tasks: Mapping[str, TaskConfig] = entries(TaskConfig, '{name: config.task(…)}')
  optim: OptimConfig = OptimConfig()
  train: TrainConfig = TrainConfig()
  evaluators: Mapping[str, EvaluatorConfig] = entries(EvaluatorConfig, '{name: config.evaluator(…)}')
  mesh: MeshConfig = MeshConfig()


# (section, field) of every path outside the sections of named entries.
PATHS = tuple((section.name, f.name) for section in dataclasses.fields(Config) if dataclasses.is_dataclass(section.type)
              for f in dataclasses.fields(section.type) if f.metadata.get('path'))


def base() -> ml_collections.ConfigDict:
  """Every field of a run and its default."""
  return fields.to_config_dict(Config())


def published_values(weight_decay: float) -> dict[str, dict[str, Any]]:
  """{section: {field: published value}} of every field that has one. weight_decay: of kernels."""
  values = {s.name: {f.name: f.metadata['published'] for f in dataclasses.fields(s.type)
                     if f.metadata.get('published', fields.REQUIRED) is not fields.REQUIRED}
            for s in dataclasses.fields(Config) if dataclasses.is_dataclass(s.type)}
  values['optim']['param_groups'] = published_param_groups(weight_decay)
  return values


def apply_choices(c: ml_collections.ConfigDict, typed: Collection[str] = ()) -> ml_collections.ConfigDict:
  """A copy in which `model.variant` and `compat` have set their fields. Idempotent.

  Args:
    c: config.
    typed: overridden fields, 'train.mixture', whose defaults were chosen, too.

  Raises:
    UsageError: one of these fields has a value that is neither its default nor the chosen one.
  """
  c = c.copy_and_resolve_references()
  if c.model.variant:
    _set(c, 'model.variant', c.model.variant, {'model': VARIANTS[c.model.variant]}, base(), typed)
  if c.compat:
    decay = next((rule[2] for rule in c.optim.param_groups[-1:] if len(rule) == 3), 0.05)
    defaults = base()
    defaults.optim.param_groups = param_groups(decay)
    typed = [name for name in typed if name != 'optim.param_groups']  # default groups choose the decay
    _set(c, 'compat', c.compat, published_values(decay), defaults, typed)
  return c


def _set(c: ml_collections.ConfigDict, field_name: str, value: str, sections: Mapping[str, Mapping[str, Any]],
         defaults: ml_collections.ConfigDict, typed: Collection[str]) -> None:
  conflicts = [f'config.{s}.{name}={c[s][name]!r}' for s, values in sections.items() for name, x in values.items()
               if c[s][name] != x and (c[s][name] != defaults[s][name] or f'{s}.{name}' in typed)]
  if conflicts:
    raise UsageError(f'config.{field_name}={value!r} sets {", ".join(conflicts)} to another value; leave these fields '
                     f"out, or set config.{field_name}=''.")
  for name, values in sections.items():
    c[name].update(values)


def parse_config(c: ml_collections.ConfigDict, typed: Collection[str] = ()) -> Config:
  """Check names, types and bounds; return the config with `model.variant` and `compat` applied.

  typed: see `apply_choices`.

  Raises:
    UsageError: the first field that is wrong: its name, its value, the bound and the fix.
  """
  config = fields.parse(Config, c)
  return fields.parse(Config, apply_choices(c, typed)) if config.model.variant or config.compat else config


cli.override_checks.append(parse_config)
