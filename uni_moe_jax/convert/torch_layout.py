"""The published PyTorch state dict ⇄ our parameter tree: one ordered table, strict in both directions.

`entries(spec)` lists the path of every published key in our tree and the transform of its array. `from_torch` and
`to_torch` use that list only: every key is consumed or dropped for a stated reason, and every parameter is filled. The
published `Linear` weights are [out, in].
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from uni_moe_jax.config.schema import PUBLISHED_TEMPERATURES
from uni_moe_jax.model.embedders import sincos_table
from uni_moe_jax.model.heads import LOG_SCALE
from uni_moe_jax.model.spec import ROUTER_PARAMS, ModelSpec
from uni_moe_jax.model.uni_perceiver import UniPerceiver, param_shapes
from uni_moe_jax.utils.errors import UsageError, first_few
from uni_moe_jax.utils.suggest import nearest
from uni_moe_jax.utils.tree_paths import by_path

State = Mapping[str, np.ndarray]
_INITIAL_SCALE = math.log(1 / 0.07)
_LOGIT_SCALE = 'loss_prepare.logit_scale_'
_SPATIAL = 'video_embed.embeddings_st_pos.spatial_pos_embed.weight'
VISUAL_TYPE, PATCH_BIAS = 'video_embed.embeddings_type.weight', 'video_embed.embeddings.bias'


class LayoutError(UsageError):
  """A checkpoint that does not fit the model."""


@dataclasses.dataclass(frozen=True)
class Transform:
  """Transform of an array. to_jax(published array, spec) → our array; to_torch is its inverse."""
  to_jax: Callable[[np.ndarray, ModelSpec], np.ndarray]
  to_torch: Callable[[np.ndarray, ModelSpec], np.ndarray]


SAME = Transform(lambda w, s: w, lambda w, s: w)
LINEAR = Transform(lambda w, s: w.T, lambda w, s: w.T)  # [out, in] ⇄ [in, out]
# Rows of a packed qkv are [q; k; v], each head-major.
QKV = Transform(
    lambda w, s: w.T.reshape(s.width, 3, s.num_heads, s.head_dim), lambda w, s: w.reshape(s.width, 3 * s.width).T)
QKV_BIAS = Transform(lambda w, s: w.reshape(3, s.num_heads, s.head_dim), lambda w, s: w.reshape(3 * s.width))
OUT = Transform(lambda w, s: w.T.reshape(s.num_heads, s.head_dim, s.width), lambda w, s: w.reshape(s.width, s.width).T)
ROW = Transform(lambda w, s: w[0], lambda w, s: w[None])
# A convolution's [D, C, p, p] ⇄ rows in the order of a patch: row, column, channel.
PATCH = Transform(
    lambda w, s: w.transpose(2, 3, 1, 0).reshape(-1, s.width),
    lambda w, s: w.reshape(s.patch_size, s.patch_size, s.channels, s.width).transpose(3, 2, 0, 1))

# Published name, our path, transform. First what a model has once …
_ONCE = (
    ('token_embed.embeddings.weight', 'embed/word', SAME),
    ('token_embed.embeddings_norm.weight', 'embed/norm/scale', SAME),
    ('token_embed.embeddings_norm.bias', 'embed/norm/bias', SAME),
    ('token_embed.embeddings_pos.position_embeddings.weight', 'embed/position', SAME),
    ('token_embed.embeddings_token_type.weight', 'embed/type', SAME),
    ('video_embed.embeddings.weight', 'embed/patch', PATCH),
    (PATCH_BIAS, 'embed/patch_bias', SAME),
    ('video_embed.embeddings_st_pos.temporal_pos_embed.weight', 'embed/temporal', SAME),
    (_SPATIAL, 'embed/spatial', SAME),
    (VISUAL_TYPE, 'embed/visual_type', SAME),
    ('loss_prepare.ln_post.weight', 'similarity/norm/scale', SAME),
    ('loss_prepare.ln_post.bias', 'similarity/norm/bias', SAME),
    ('loss_prepare.proj.weight', 'similarity/kernel', LINEAR),
    ('loss_prepare.proj.bias', 'similarity/bias', SAME),
    ('s_token_bias', 'embed/spe_bias', ROW),
    ('fc_prompt.weight', 'linear_head/kernel', LINEAR),
    ('fc_prompt.bias', 'linear_head/bias', SAME),
    ('similarity_weight', 'linear_head/similarity_weight', SAME),
)
# … then what every layer has, …
_LAYER = (
    ('gamma_1', 'scale1', SAME), ('gamma_2', 'scale2', SAME),
    ('norm1.weight', 'norm1/scale', SAME), ('norm1.bias', 'norm1/bias', SAME),
    ('norm2.weight', 'norm2/scale', SAME), ('norm2.bias', 'norm2/bias', SAME),
)
_PROMPTS = {
    'shared': (('embedding', 'input'),),
    'inputs': (('embedding', 'input'),),
    'separate': (('embedding', 'input'), ('target_embedding', 'target')),
}
# … its projections (name in a dense model, name in a model with experts, our path, sublayer, transforms) …
_PROJECTIONS = (
    ('self_attn.in_proj_', 'self_attn.qkv_proj.', 'qkv', 'attention', QKV, QKV_BIAS),
    ('self_attn.out_proj.', 'self_attn.dense.', 'attention_out', 'attention', OUT, SAME),
    ('linear1.', 'linear1.', 'ffn_in', 'mlp', LINEAR, SAME),
    ('linear2.', 'linear2.', 'ffn_out', 'mlp', LINEAR, SAME),
)
# … and the gate of each of its routers. The router of the first projection of a sublayer serves the second, too.
_GATES = {'attention': 'self_attn.qkv_proj.gate.', 'mlp': 'linear1.gate.'}
_GATE = (
    ('tag_transform.0.weight', 'embed/kernel', LINEAR), ('tag_transform.0.bias', 'embed/bias', SAME),
    ('tag_transform.1.weight', 'norm/scale', SAME), ('tag_transform.1.bias', 'norm/bias', SAME),
    ('wg.weight', 'gate', LINEAR),
)
_DEAD_GATES = {'attention': 'self_attn.dense.gate.', 'mlp': 'linear2.gate.'}

_ALIASES = {  # one tensor under two names
    'video_embed.embeddings_norm.weight': 'token_embed.embeddings_norm.weight',
    'video_embed.embeddings_norm.bias': 'token_embed.embeddings_norm.bias',
    'token_embed.s_token_bias': 's_token_bias',
}
_ALIAS_OF = 'the same tensor as {}'
_BANK = re.compile(r'loss_prepare\.queue_(h[12]|ptr[12])_\w+$')


@dataclasses.dataclass(frozen=True)
class Entry:
  """Position of a published array in our tree: path of a leaf, and index on its leading axes (layers, experts)."""
  key: str
  path: str
  index: tuple[int, ...]
  transform: Transform


@dataclasses.dataclass(frozen=True)
class Report:
  """Report of a conversion, by published key."""
  consumed: dict[str, str] = dataclasses.field(default_factory=dict)  # our path
  dropped: dict[str, str] = dataclasses.field(default_factory=dict)  # reason why our tree does not need it
  made: dict[str, str] = dataclasses.field(default_factory=dict)  # origin of a value that our tree does not have
  resized: dict[str, str] = dataclasses.field(default_factory=dict)  # 'from N to M rows'

  def __str__(self) -> str:
    lines = [f'{len(self.consumed)} arrays converted']
    for title in ('resized', 'dropped', 'made'):
      reasons: dict[str, list[str]] = {}
      for key, why in getattr(self, title).items():
        reasons.setdefault(why, []).append(key)
      lines += [f'{title}: {first_few(keys)}: {why}' for why, keys in reasons.items()]
    return '\n'.join(lines)


def _check_convertible(spec: ModelSpec) -> None:
  if spec.router not in ('attribute', 'dense'):
    raise LayoutError(f'config.moe.router={spec.router!r} is not supported by the published layout, which has '
                      "attribute gates; convert a model with router 'attribute' or 'dense'.")
  if (spec.num_prefix_prompts or spec.label_prompts or spec.frame_differences or spec.word_neighbors
      or spec.stem != 'patch'):
    raise LayoutError('the published layout does not support config.model.num_prefix_prompts, '
                      "config.model.frame_differences, config.model.word_neighbors, config.model.stem='conv' and "
                      'label_prompts of a target set; convert a model without them.')
  unknown = [t for t in spec.temperature_groups if t not in PUBLISHED_TEMPERATURES]
  if unknown:
    raise LayoutError(f'the published layout has no temperature group {unknown[0]!r}; '
                      f'{nearest(unknown[0], PUBLISHED_TEMPERATURES)}. Set `temperature` of the tasks that use it.')


def entries(spec: ModelSpec) -> list[Entry]:
  """Returns every array of the published layout that a model's parameter tree has, in order.

  Raises:
    LayoutError: the published layout cannot represent the model.
  """
  _check_convertible(spec)
  absent = {'embed/spatial': spec.posemb == 'sincos2d', 'embed/visual_type': not spec.modality_embedding,
            'embed/spe_bias': not spec.spe_bias}
  absent |= {path: not spec.head for _, path, _ in _ONCE if path.startswith('linear_head/')}
  out = [Entry(key, path, (), transform) for key, path, transform in _ONCE if not absent.get(path)]
  out += [Entry(_LOGIT_SCALE + t, LOG_SCALE + t, (), SAME) for t in spec.temperature_groups]
  for layer, sublayers in enumerate(spec.pattern):
    subtree, period, block = spec.stack.locate(layer)
    index = () if period is None else (period,)
    rows = [(key, path, transform, ()) for key, path, transform in _LAYER]
    if spec.num_deep_prompts:
      rows += [(f'deep_prompt_embedding.{published}.weight', f'prompts/{own}', SAME, ())
               for published, own in _PROMPTS[spec.prompt_sharing]]
    for dense, plain, path, sublayer, kernel_transform, bias_transform in _PROJECTIONS:
      for published, own, transform in (('weight', 'kernel', kernel_transform), ('bias', 'bias', bias_transform)):
        if sublayer in sublayers:
          rows += [(f'{plain}experts.deepspeed_experts.{e}.{published}', f'{path}/{own}', transform, (e,))
                   for e in range(spec.num_experts)]
        else:
          rows.append(((dense if spec.router == 'dense' else plain) + published, f'{path}/{own}', transform, ()))
    rows += [(_GATES[sublayer] + key, f'{ROUTER_PARAMS[sublayer]}/{path}', transform, ())
             for sublayer in sublayers for key, path, transform in _GATE]
    out += [Entry(f'fused_encoder.layers.{layer}.{key}', f'encoder/{subtree}/{block}/{path}', index + expert, transform)
            for key, path, transform, expert in rows]
  return out


def taken_from_config(spec: ModelSpec) -> str:
  """Config fields that a checkpoint does not contain: wrong values give another model without an error."""
  prefix = '<spe>' if spec.prefix_word is None else f'word {spec.prefix_word}'
  return (f'not in the file, taken from the config: heads {spec.num_heads}, top_k {spec.top_k}, prefix {prefix} '
          '(the published sizes have 64 per head, top_k 2, prefix <spe>)')


def _dead_gates(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
  """Keys and shapes of published gates that nothing uses: attention output, second MLP projection."""
  D = spec.width
  shapes = {'tag_transform.0.weight': (D, 8), 'tag_transform.0.bias': (D,), 'tag_transform.1.weight': (D,),
            'tag_transform.1.bias': (D,), 'wg.weight': (spec.num_experts, D)}
  return {f'fused_encoder.layers.{layer}.{_DEAD_GATES[sublayer]}{key}': shape
          for layer, sublayers in enumerate(spec.pattern) for sublayer in sublayers for key, shape in shapes.items()}


def from_torch(state: State, spec: ModelSpec) -> tuple[Any, Report]:
  """Converts published arrays by name (see `torch_file.read`) to (f32 parameter tree of a model, report).

  Raises:
    LayoutError: a key is missing or unknown, or its shape is not the model's; names the key and the field to change.
  """
  expected = entries(spec)
  names = {e.key for e in expected}
  report = Report(dropped=_dropped(state, spec, names))
  missing = [e.key for e in expected if e.key not in state]
  unknown = [k for k in state if k not in names and k not in report.dropped]
  if missing or unknown:
    raise LayoutError(_mismatch(missing, unknown, spec))
  leaves = {path: np.full(x.shape, np.nan, np.float32) for path, x in by_path(param_shapes(UniPerceiver(spec))).items()}
  for e in expected:
    value, torch_shape = np.asarray(state[e.key], np.float32), e.transform.to_torch(leaves[e.path][e.index], spec).shape
    if not np.isfinite(value).all():
      raise LayoutError(f'{e.key} has values that are not finite: the checkpoint is damaged, or its training failed.')
    value = _resized(value, e, torch_shape, spec, report)
    # Check before the transform: a reshape would accept other shapes of the same size.
    if value.shape != torch_shape:
      raise LayoutError(f'{e.key} has shape {value.shape}, but the model needs {torch_shape}: '
                        f'{_size_fix(e.key, value.shape, torch_shape)}.')
    leaves[e.path][e.index] = e.transform.to_jax(value, spec)
    report.consumed[e.key] = e.path
  for path, leaf in leaves.items():
    if np.isnan(leaf).any():
      raise LayoutError(f'parameter {path} has {np.isfinite(leaf).sum()} of {leaf.size} values: the table of '
                        'convert/torch_layout.py lacks a row for it.')
  return traverse_util.unflatten_dict(leaves, sep='/'), report


def to_torch(params: Any, spec: ModelSpec) -> tuple[dict[str, np.ndarray], Report]:
  """Converts our parameter tree to (arrays under every key of the published layout, report).

  `params` can be any tree with the structure of the parameters, such as gradients.
  """
  report, out, leaves = Report(), {}, by_path(params)
  for e in entries(spec):
    out[e.key] = np.array(e.transform.to_torch(np.asarray(leaves[e.path])[e.index], spec), order='C')
    report.consumed[e.key] = e.path
  made = {alias: (out[key], _ALIAS_OF.format(key)) for alias, key in _ALIASES.items() if key in out}
  made |= {key: (np.zeros(shape, np.float32), 'zeros: a gate that is never evaluated')
           for key, shape in _dead_gates(spec).items()}
  made |= {_LOGIT_SCALE + t: (np.float32(_INITIAL_SCALE), 'the initial value: the model has no such group')
           for t in PUBLISHED_TEMPERATURES if t not in spec.temperature_groups}
  if not spec.modality_embedding:
    made[VISUAL_TYPE] = np.zeros((1, spec.width), np.float32), 'zeros: the model adds no type to visual tokens'
  if spec.posemb == 'sincos2d':
    made[_SPATIAL] = _table(spec), 'the fixed sin-cos table'
  for key, (value, why) in made.items():
    out[key], report.made[key] = np.asarray(value), why
  return out, report


def _table(spec: ModelSpec) -> np.ndarray:
  return sincos_table(spec.image_size // spec.patch_size, spec.width, spec.posemb_scale)


def _has_fixed_positions(table: np.ndarray, spec: ModelSpec) -> bool:
  """Whether a table, of any size, has the fixed sin-cos positions of the config, with a patch at the same place.

  Raises:
    LayoutError: it has those of another scale. Later image sizes are scaled by the config's.
  """
  side = math.isqrt(len(table))
  if side < 2 or side * side != len(table):
    return False
  sin, cos = table[1, spec.width // 2::spec.width // 4]  # of column 1, at frequency 1
  factor = spec.image_size / (side * spec.patch_size)  # scale at the table's size ÷ scale at the config's

  def fits(scale):
    return np.allclose(table, sincos_table(side, spec.width, scale), atol=1e-3)

  measured = math.atan2(sin, cos) % (2 * math.pi)
  if (known := fits(spec.posemb_scale * factor)) or not fits(measured):
    return known
  raise LayoutError(f'{_SPATIAL} has the fixed positions of {side * spec.patch_size} px, scaled by {measured:.6g}, '
                    f'which config.model.posemb_scale={spec.posemb_scale:.6g} does not give at image_size='
                    f'{spec.image_size}: set config.model.posemb_scale={measured / factor:.6g}.')


def _dropped(state: State, spec: ModelSpec, wanted: set[str]) -> dict[str, str]:
  """Arrays that our tree does not need: key → reason."""
  dead, reasons = _dead_gates(spec), {}
  for key, value in state.items():
    original = _ALIASES.get(key)
    if key in wanted:
      continue
    if original in wanted:
      if original in state and not np.array_equal(value, state[original]):
        raise LayoutError(f'{key} differs from {original}: a model with a separate LayerNorm for images '
                          '(SHARE_LAYERNORM False) is not supported.')
      reasons[key] = _ALIAS_OF.format(original)
    elif np.shape(value) == dead.get(key):
      reasons[key] = ('a gate that is never evaluated: the first projection of the pair decides '
                      '(FFN_SHARE_GATE_DECISION, as in every published config)')
    elif _BANK.match(key):
      reasons[key] = 'state of a memory bank'
    elif key == VISUAL_TYPE:
      reasons[key] = 'unused in the published code'
      if np.any(value):
        reasons[key] += ', but not zero: a file for ADD_TYPE_EMBED needs config.model.modality_embedding=True'
    elif key.startswith(_LOGIT_SCALE) and key.removeprefix(_LOGIT_SCALE) in PUBLISHED_TEMPERATURES:
      reasons[key] = (
          'no task of the config has this temperature group (config.model.extra_temperature_groups adds groups)')
    elif key == _SPATIAL:
      if np.shape(value) != _table(spec).shape or not np.allclose(value, _table(spec), atol=1e-4):
        raise LayoutError(f'{key} is not the fixed sin-cos table of {spec.image_size} px: set '
                          "config.model.posemb='frozen'.")
      reasons[key] = 'the fixed sin-cos table, which is computed'
  return reasons


def _mismatch(missing: list[str], unknown: list[str], spec: ModelSpec) -> str:
  problems = [f'the checkpoint lacks {first_few(missing, 1)}'] if missing else []
  if unknown:
    problems.append(f'it has {first_few(unknown, 1)}, which the model does not have')
  return (f'{"; ".join(problems)}: the model has router {spec.router}, {spec.num_layers} layers, {spec.num_experts} '
          f'experts, placement {spec.placement!r} (config.moe.router, config.model.num_layers, config.moe.num_experts, '
          f'config.moe.placement), with {spec.num_deep_prompts} prompts per layer (config.model.num_deep_prompts, '
          'prompt_sharing, spe_bias; a task with linear_head=True).')


_SIZES = (
    (r'token_embed\.embeddings\.weight', 'the tokenizer has a different vocabulary (config.tokenizer)'),
    (r'position_embeddings', 'set config.model.max_text_len to its number of rows'),
    (r'spatial|video_embed\.embeddings\.weight', 'set config.model.image_size, patch_size and channels'),
    (r'temporal', 'set config.model.max_num_frames'),
    (r'gate', 'set config.moe.num_experts'),
    (r'linear[12]\.', 'set config.model.mlp_dim'),
    (r'prompt_embedding', 'set config.model.num_deep_prompts to its number of rows'),
    (r'fc_prompt', 'the task with linear_head=True has a different number of classes'),
)


def _size_fix(key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
  """The field to change. Tables [rows, D] that differ only in D have another width."""
  fixes = [fix for pattern, fix in _SIZES if re.search(pattern, key)]
  same_rows = len(shape) == len(expected) == 2 and shape[0] == expected[0] and 'linear2' not in key
  return 'set config.model.width' if same_rows or not fixes else fixes[0]


def _resized(value: np.ndarray, entry: Entry, shape: tuple[int, ...], spec: ModelSpec, report: Report) -> np.ndarray:
  """Resizes position tables of another size; returns every other array unchanged."""
  functions = {'embed/spatial': resize_spatial, 'embed/temporal': resize_linear}
  if entry.path not in functions or value.ndim != 2 or value.shape[1:] != shape[1:]:
    return value
  is_fixed = entry.path == 'embed/spatial' and spec.posemb == 'frozen' and _has_fixed_positions(value, spec)
  if value.shape == shape:
    return value
  report.resized[entry.key] = f'from {value.shape[0]} to {shape[0]} rows'
  if is_fixed:
    return _table(spec)
  try:
    return functions[entry.path](value, shape[0])
  except (ValueError, ZeroDivisionError) as e:
    raise LayoutError(f'{entry.key}: {e}') from None


def resize_spatial(table: np.ndarray, rows: int) -> np.ndarray:
  """Spatial table [side², D] → [rows, D], bilinear; raises LayoutError where a number of rows is not a square."""
  old, new = math.isqrt(len(table)), math.isqrt(rows)
  if old * old != len(table) or new * new != rows:
    raise LayoutError(f'cannot resize a spatial table from {len(table)} to {rows} rows: both must be squares.')
  return resize_linear(table.reshape(old, old, -1), new, new).reshape(rows, -1)


def resize_linear(table: np.ndarray, *sizes: int) -> np.ndarray:
  """Table [*n, D] → [*sizes, D]: half-pixel centers, no antialiasing, as the published code loads a checkpoint."""
  return np.asarray(jax.image.resize(table, (*sizes, table.shape[-1]), 'linear', antialias=False))
