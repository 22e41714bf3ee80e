"""From a config to a plan: the one place where a run's configuration is checked.

`plan.make_plan` checks every field before any device work.
"""

import math
import re
from collections.abc import Mapping

import ml_collections

from uni_moe_jax.config.schema import FREEZE
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

MIXTURES = ('all_tasks', 'one_task')
SCHEDULES = ('cosine', 'constant', 'published')
WITHOUT_GRADIENT = ('update', 'settonone', 'zerograd')
# The names of routers and of grouped products live in moe/; here they are data, so that a config is checked without jax.
MERGED = ('dense', 'attribute', 'task', 'modality')
DISPATCHED = ('token', 'context')
GROUPED = ('auto', 'xla', 'tiled', 'batched', 'ragged', 'megablox', 'triton')


def check_sections(c: ml_collections.ConfigDict) -> None:
  """Checks the sections of one entry each."""
  _check_model(c)
  _check_tokenizer(c)
  _check_train(c)


def choose(field: str, value, choices) -> None:
  if value not in choices:
    raise UsageError(f'config.{field}={value!r} is unknown; {nearest(value, choices)}.')


def _at_least(c: ml_collections.ConfigDict, section: str, bounds: dict[str, float]) -> None:
  for name, bound in bounds.items():
    if c[section][name] < bound:
      raise UsageError(f'config.{section}.{name}={c[section][name]} must be at least {bound}.')


def _above_zero(c: ml_collections.ConfigDict, section: str, *names: str) -> None:
  for name in names:
    if c[section][name] <= 0:
      raise UsageError(f'config.{section}.{name}={c[section][name]} must be above 0.')


def _divides(part: str, b: int, whole: str, a: int) -> None:
  if a % b:
    raise UsageError(f'config.{whole}={a} must be a multiple of config.{part}={b}; try {max(b, a - a % b)}.')


def _check_model(c: ml_collections.ConfigDict) -> None:
  m, moe = c.model, c.moe
  _at_least(c, 'model', dict(num_layers=1, width=4, num_heads=1, mlp_dim=1, image_size=1, patch_size=1, channels=1, max_num_frames=1,
                             max_text_len=1, layer_scale_init=0.0, drop_path=0.0, num_deep_prompts=0, num_prefix_prompts=0, text_posemb_std=0.0, temporal_posemb_std=0.0))
  _above_zero(c, 'model', 'temperature_init')
  _divides('model.num_heads', m.num_heads, 'model.width', m.width)
  _divides('model.patch_size', m.patch_size, 'model.image_size', m.image_size)
  if m.width % 4:
    raise UsageError(f'config.model.width={m.width} must be a multiple of 4 (the spatial table); try {m.width // 4 * 4}.')
  if not 0 <= m.drop_path < 1:
    raise UsageError(f'config.model.drop_path={m.drop_path} must be in [0, 1).')
  for name in ('pixel_mean', 'pixel_std', 'video_mean', 'video_std'):
    if len(m[name]) != m.channels and not (name.startswith('video') and not m[name]):
      raise UsageError(f'config.model.{name} has {len(m[name])} values for config.model.channels={m.channels}.')
    if name.endswith('std') and any(v <= 0 for v in m[name]):
      raise UsageError(f'config.model.{name}={m[name]} must hold numbers above 0.')
  choose('model.posemb', m.posemb, ('sincos2d', 'frozen', 'learned'))
  choose('model.prompt_sharing', m.prompt_sharing, ('shared', 'separate', 'inputs'))
  choose('model.text_posemb_init', m.text_posemb_init, ('normal', 'sincos'))
  choose('model.dtype', m.dtype, ('float32', 'bfloat16'))
  choose('moe.router', moe.router, (*MERGED, *DISPATCHED))
  choose('moe.gmm', moe.gmm, GROUPED)
  of_tokens = dict(capacity_factor=0.0, balance_loss_weight=0.0, importance_loss_weight=0.0, z_loss_weight=0.0)
  _at_least(c, 'moe', dict(num_experts=1, noise_std=0.0, **of_tokens))
  for name in of_tokens if moe.router in MERGED else ():
    if moe[name]:
      raise UsageError(f"config.moe.{name}={moe[name]} needs config.moe.router='token' or 'context'; kernels of "
                       f'{moe.router!r} merge. Set it to 0.')
  if not 1 <= moe.top_k <= moe.num_experts:
    raise UsageError(f'config.moe.top_k={moe.top_k} must be in 1…config.moe.num_experts={moe.num_experts}.')
  if isinstance(moe.placement, str):
    choose('moe.placement', moe.placement, ('all', 'every_2', 'every_4', 'none'))
  elif any(not 0 <= i < m.num_layers for i in moe.placement):
    raise UsageError(f'config.moe.placement={moe.placement} has an index outside 0…{m.num_layers - 1}.')
  for part in moe.sublayers:
    choose('moe.sublayers', part, ('attention', 'mlp'))


def _check_tokenizer(c: ml_collections.ConfigDict) -> None:
  choose('tokenizer.type', c.tokenizer.type, ('sentencepiece', 'clip'))
  _at_least(c, 'tokenizer', dict(vocab_size=1))
  if c.tokenizer.type == 'clip' and not c.tokenizer.merges_path:
    raise UsageError("config.tokenizer.merges_path='' must be a path when config.tokenizer.type='clip'; give that of CLIP's "
                     'bpe_simple_vocab_16e6.txt.gz.')


def _check_train(c: ml_collections.ConfigDict) -> None:
  _at_least(c, 'train', dict(
      steps=1, grad_accum_steps=1, log_every=1, checkpoint_every=1, max_to_keep=1, max_nonfinite_steps=1, interference_every=0,
      hang_timeout=0.0))
  _at_least(c, 'optim', dict(
      learning_rate=0.0, warmup_steps=0, grad_clip_norm=0.0, final_lr_fraction=0.0, router_lr_multiplier=0.0, b1=0.0, b2=0.0))
  _above_zero(c, 'optim', 'eps')
  for name in ('b1', 'b2'):
    if c.optim[name] >= 1:
      raise UsageError(f'config.optim.{name}={c.optim[name]} must be in [0, 1).')
  for axis, size in c.mesh.items():
    if axis != 'fsdp' and size < 1 and size != -1:
      raise UsageError(f'config.mesh.{axis}={size} must be at least 1, or -1 (what the other axes leave).')
  choose('train.mixture', c.train.mixture, MIXTURES)
  if c.train.best_metric:
    choose('train.best_metric', c.train.best_metric, ('loss/total', *(f'loss/{name}' for name, t in c.tasks.items() if t.batch_size)))
    _divides('train.log_every', c.train.log_every, 'train.checkpoint_every', c.train.checkpoint_every)  # a checkpoint needs a logged loss
  choose('train.contrastive_reduction', c.train.contrastive_reduction, ('mean', 'sum'))
  choose('optim.schedule', c.optim.schedule, SCHEDULES)
  choose('optim.unused_params', c.optim.unused_params, WITHOUT_GRADIENT)
  if not 0 < c.optim.layerwise_lr_decay <= 1:
    raise UsageError(f'config.optim.layerwise_lr_decay={c.optim.layerwise_lr_decay} must be in (0, 1]; 1 is off.')
  if not 0 <= c.train.ema_decay < 1:
    raise UsageError(f'config.train.ema_decay={c.train.ema_decay} must be in [0, 1); 0 is off.')
  if c.train.mixture == 'one_task' and c.train.grad_accum_steps > 1:
    raise UsageError(f"config.train.grad_accum_steps={c.train.grad_accum_steps} needs config.train.mixture='all_tasks', not 'one_task'.")
  if c.train.mixture == 'one_task' and c.train.interference_every:
    raise UsageError(f"config.train.interference_every={c.train.interference_every} needs config.train.mixture='all_tasks': it "
                     'compares the tasks of one step. Set it to 0, and ask launch/interference.py.')
  try:
    re.compile(c.train.interference_parameters)
  except re.error as e:
    raise UsageError(f'config.train.interference_parameters={c.train.interference_parameters!r} is not a regular '
                     f'expression: {e}.') from None
  for rule in c.optim.param_groups:
    frozen = len(rule) == 2 and rule[1] == FREEZE
    if not frozen and len(rule) != 3:
      raise UsageError(f"config.optim.param_groups: {rule!r} is neither (pattern, lr factor, weight decay) nor (pattern, '{FREEZE}').")
    try:
      re.compile(rule[0])
    except re.error as e:
      raise UsageError(f'config.optim.param_groups: {rule[0]!r} is not a regular expression: {e}.') from None


def check_preflight(c: ml_collections.ConfigDict) -> None:
  for name, entries in c.preflight.target_lengths.items():
    choose(f'preflight.target_lengths.{name}', name, c.target_sets)
    longest = c.target_sets[name].max_len
    whole = isinstance(entries, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and all(type(n) is int for n in pair) for pair in entries)
    if not whole or not entries or any(not 2 <= tokens <= longest or number < 1 for tokens, number in entries):
      raise UsageError(f'config.preflight.target_lengths.{name}={entries!r} must hold (tokens, entries) pairs, tokens in 2…config.target_sets.'
                       f'{name}.max_len={longest}, entries at least 1; for example (({longest}, 1000),).')
  for name, frames in c.preflight.num_frames.items():
    choose(f'preflight.num_frames.{name}', name, c.tasks)
    if type(frames) is not int or not 1 <= frames <= c.model.max_num_frames:
      raise UsageError(f'config.preflight.num_frames.{name}={frames!r} must be in 1…config.model.max_num_frames={c.model.max_num_frames}, a '
                       'whole number.')


def check_mesh(c: ml_collections.ConfigDict, mesh: Mapping[str, int]) -> None:
  """Raises UsageError where an axis of the mesh does not divide what it splits. mesh: size per axis."""
  split = [('model', 'model.num_heads', c.model.num_heads), ('model', 'model.mlp_dim', c.model.mlp_dim)]
  if c.moe.router != 'dense':
    split.append(('expert', 'moe.num_experts', c.moe.num_experts))
  if c.mesh.fsdp:
    split.append(('data', 'model.width', c.model.width))
  for axis, field, size in split:
    if size % mesh[axis]:
      raise UsageError(f'config.mesh.{axis}={mesh[axis]} must divide config.{field}={size}, which it splits; try '
                       f'{math.gcd(size, mesh[axis])}.')


