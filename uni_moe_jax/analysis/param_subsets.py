"""A selection of the parameters, as one subset per layer and projection."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from uni_moe_jax.model.spec import Stack
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest
from uni_moe_jax.utils.tree_paths import by_path

_LAYERS = 'encoder/(blocks|tail)/'  # paths of their parameters
_MAX_LAYERS = 7  # of a model whose layers are all selected by default


class ParamSlice(NamedTuple):
  """One array of a subset."""
  subset: str  # its name: 'layer 3 ffn_out', or the path of a parameter outside the layers
  layer: int | None  # None outside the layers
  projection: str  # 'ffn_out', 'attention_router'
  path: str  # in the parameter tree, 'encoder/blocks/block0/ffn_out/kernel'
  period: int | None  # index on the stacked axis


def default_layers(num_layers: int) -> tuple[int, ...]:
  """Every fourth layer (3, 7, 11, …) as published; all layers of a model with at most 7."""
  return tuple(range(num_layers)) if num_layers <= _MAX_LAYERS else tuple(range(3, num_layers, 4))


def select(
    params: Any, stack: Stack, pattern: str, layers: Sequence[int] | None = None, field: str = 'parameters'
) -> tuple[ParamSlice, ...]:
  """The parameters, or shapes, whose path a regular expression matches.

  layers: to select from, `default_layers` if None; the pattern alone selects parameters outside the layers. field: the
  flag or config field that gave the pattern.

  Raises:
    UsageError: not a regular expression, a layer that the model does not have, or no match.
  """
  layers = default_layers(stack.num_layers) if layers is None else layers
  if wrong := [i for i in layers if not 0 <= i < stack.num_layers]:
    raise UsageError(f'layers {", ".join(map(str, wrong))}: the model has the layers 0…{stack.num_layers - 1}.')
  try:
    matched = [path for path in by_path(params) if re.search(pattern, path)]
  except re.error as e:
    raise UsageError(f'{field}={pattern!r} is not a regular expression: {e}.') from None
  slices = []
  for layer in sorted(set(layers)):
    subtree, period, block = stack.locate(layer)
    root = f'encoder/{subtree}/{block}/'
    for path in (path for path in matched if path.startswith(root)):
      name = path.removeprefix(root)
      projection = name.rpartition('/')[0] or name
      slices.append(ParamSlice(f'layer {layer} {projection}', layer, projection, path, period))
  slices += [ParamSlice(path, None, path, path, None) for path in matched if not re.match(_LAYERS, path)]
  if not slices:
    raise UsageError(f'{field}={pattern!r} matches nothing in the layers {", ".join(map(str, layers))} or outside the '
                     f'layers; {nearest(pattern, list(by_path(params)))}.')
  return tuple(slices)


def extract(slices: Sequence[ParamSlice], tree: Any) -> dict[str, dict[str, jax.Array]]:
  """{subset: {path: array}} of a tree with the structure that the slices were selected from."""
  leaves, subsets = by_path(tree), {}
  for s in slices:
    leaf = leaves[s.path]
    subsets.setdefault(s.subset, {})[s.path] = leaf if s.period is None else leaf[s.period]
  return subsets
