"""A chosen set of parameters, cut into one part per layer and projection."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from uni_moe_jax.model.spec import Stack
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest
from uni_moe_jax.utils.tree_paths import by_path

_FEW_LAYERS = 7  # up to here, all of them are looked at


@dataclasses.dataclass(frozen=True)
class Piece:
  """One array of a part.

  Attributes:
    part: its name, 'layer 3 ffn_out', or its path for a parameter outside the layers.
    layer: index, or None outside the layers.
    projection: 'ffn_out', 'attention_router'.
    path: in the tree, 'encoder/blocks/block0/ffn_out/kernel'.
    period: index on its stacked axis, or None.
  """
  part: str
  layer: int | None
  projection: str
  path: str
  period: int | None


def default_layers(layers: int) -> tuple[int, ...]:
  """Every fourth layer (3, 7, 11, …) as published; of a model of few layers all."""
  return tuple(range(layers)) if layers <= _FEW_LAYERS else tuple(range(3, layers, 4))


def choose(
    params: Any, stack: Stack, pattern: str, layers: Sequence[int] | None = None, field: str = 'parameters'
) -> tuple[Piece, ...]:
  """The pieces of a parameter tree whose path a pattern finds.

  Args:
    params: the tree, or its shapes.
    stack: how the model's layers lie in it.
    pattern: regular expression that is searched in paths such as 'encoder/blocks/block0/ffn_out/kernel'.
    layers: indices that count; parameters outside the layers are chosen by pattern alone. None: `default_layers`.
    field: what the pattern is called where a person wrote it.

  Raises:
    UsageError: no regular expression, a layer that is not there, nothing that matches.
  """
  layers = default_layers(stack.num_layers) if layers is None else layers
  if wrong := [i for i in layers if not 0 <= i < stack.num_layers]:
    raise UsageError(f'layers {", ".join(map(str, wrong))}: the model has the layers 0…{stack.num_layers - 1}.')
  try:
    found = re.compile(pattern)
  except re.error as e:
    raise UsageError(f'{field}={pattern!r} is not a regular expression: {e}.') from None
  pieces, paths = [], list(by_path(params))
  wanted = [path for path in paths if found.search(path)]
  for layer in sorted(set(layers)):
    subtree, period, block = stack.locate(layer)
    root = f'encoder/{subtree}/{block}/'
    for path in wanted:
      if path.startswith(root):
        inside = path.removeprefix(root)
        projection = inside.rpartition('/')[0] or inside
        pieces.append(Piece(f'layer {layer} {projection}', layer, projection, path, period))
  pieces += [Piece(path, None, path, path, None) for path in wanted if not re.match('encoder/(blocks|tail)/', path)]
  if not pieces:
    raise UsageError(f'{field}={pattern!r} finds nothing in the layers {", ".join(map(str, layers))} and outside of layers; '
                     f'{nearest(pattern, paths)}.')
  return tuple(pieces)


def take(pieces: Sequence[Piece], tree: Any) -> dict[str, dict[str, jax.Array]]:
  """{part: {path: array}} of a tree with the paths that the pieces were chosen from."""
  leaves, out = by_path(tree), {}
  for p in pieces:
    leaf = leaves[p.path]
    out.setdefault(p.part, {})[p.path] = leaf if p.period is None else leaf[p.period]
  return out
