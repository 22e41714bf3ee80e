"""The matrix products and collectives of a compiled program, read from its HLO text."""

import dataclasses
import re

from uni_moe_jax.preflight import hlo
from uni_moe_jax.preflight.cost import COLLECTIVES


@dataclasses.dataclass(frozen=True)
class CollectiveArray:
  """An array that a collective makes on a device; XLA may fuse several into one operation.

  Attributes:
    opcode: of the collective. dtype, shape: of the array. op_name: XLA's metadata, the position in the traced program.
    size: number of elements. bytes: their size. groups: sets of devices that communicate with each other.
  """
  opcode: str
  dtype: str
  shape: tuple[int, ...]
  op_name: str
  size: int
  bytes: float
  groups: frozenset[frozenset[int]]


def collectives(text: str) -> list[CollectiveArray]:
  """List the arrays that collectives of a compiled module make, once per occurrence in the text."""
  arrays, module = [], hlo.parse(text)
  for op in (op for computation in module.computations.values() for op in computation.ops.values()):
    opcode = op.opcode.removesuffix('-start')
    if opcode in COLLECTIVES:
      match = re.search(r'op_name="([^"]*)"', op.attributes)
      name = match[1] if match else ''
      groups = frozenset(map(frozenset, hlo.groups(op, module.devices)))
      arrays += [CollectiveArray(opcode, s.dtype, s.dims, name, s.size, s.bytes, groups) for s in op.shapes]
  return arrays


def count_matmuls(text: str) -> int:
  """Count the matrix products in a compiled module; the body of a loop counts once."""
  module = hlo.parse(text)
  return sum(op.opcode == 'dot' for computation in module.computations.values() for op in computation.ops.values())
