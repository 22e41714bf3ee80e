"""What a compiled program sends between devices: collectives, read from XLA's text."""

import dataclasses
import math
import re

_KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_LINE = re.compile(rf'^\s*(?:ROOT )?\S+ = (?P<type>.+?) (?P<kind>{"|".join(_KINDS)})(?:-start)?\((?P<rest>.*)$')
_ARRAY = re.compile(r'([a-z]+\d*)\[([\d,]*)\]')
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 'f32': 4, 's32': 4, 'u32': 4, 's64': 8, 'f64': 8}


@dataclasses.dataclass(frozen=True)
class Sent:
  """One array that a collective makes on a device. XLA joins several into one operation; here each is its own.

  Attributes:
    kind: of the collective. dtype, shape: of the array. name: where in the program it comes from (XLA's op_name).
  """
  kind: str
  dtype: str
  shape: tuple[int, ...]
  name: str

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def bytes(self) -> int:
    return self.size * _BYTES[self.dtype]


def collectives(text: str) -> list[Sent]:
  """Every array that some collective of a compiled module makes, once for each place in the text."""
  found = []
  for line in text.splitlines():
    if m := _LINE.match(line):
      name = re.search(r'op_name="([^"]*)"', m['rest'])
      for dtype, dims in _ARRAY.findall(m['type']):
        shape = tuple(int(d) for d in dims.split(',') if d)
        found.append(Sent(m['kind'], dtype, shape, name[1] if name else ''))
  return found
