"""What a compiled program computes and sends between devices, read from XLA's text."""

import dataclasses
import re

from uni_moe_jax.tools.preflight import hlo
from uni_moe_jax.tools.preflight.cost import COLLECTIVES


@dataclasses.dataclass(frozen=True)
class Sent:
  """One array that a collective makes on a device. XLA joins several into one operation; here each is its own.

  Attributes:
    kind: of the collective. dtype, shape: of the array. name: where in the program it comes from (XLA's op_name).
    size: elements. bytes: of them. groups: which devices work together.
  """
  kind: str
  dtype: str
  shape: tuple[int, ...]
  name: str
  size: int
  bytes: float
  groups: frozenset[frozenset[int]]


def collectives(text: str) -> list[Sent]:
  """Every array that some collective of a compiled module makes, once for each place in the text."""
  found, module = [], hlo.parse(text)
  for op in (op for computation in module.computations.values() for op in computation.ops.values()):
    kind = op.opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      name = re.search(r'op_name="([^"]*)"', op.attributes)
      groups = frozenset(map(frozenset, hlo.groups(op, module.devices)))
      found += [Sent(kind, s.dtype, s.dims, name[1] if name else '', s.size, s.bytes, groups) for s in op.shapes]
  return found


def products(text: str) -> int:
  """How many matrix products stand in a compiled module, those of loops once."""
  module = hlo.parse(text)
  return sum(op.opcode == 'dot' for computation in module.computations.values() for op in computation.ops.values())
