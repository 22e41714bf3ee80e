"""Parser of a compiled program's HLO text.

No JAX interface gives costs with loops: XLA's own analysis counts the body of a loop once.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

_BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4,
          'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16}
_SHAPE = re.compile(r'(\w+)\[([\d,]*)\](?:\{(?:[^}]*S\((\d+)\))?[^}]*\})?')  # S: memory space
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{\n((?:.*\n)*?)\}', re.MULTILINE)
_LINE = re.compile(r'^ +(ROOT )?%?([\w.\-]+) = (.*)$', re.MULTILINE)
_KERNEL_METADATA = re.compile(r'kernel_metadata=\{\n.*\n\}')  # of Pallas: the one attribute with line breaks
_NAME = re.compile(r'%([\w.\-]+)')
_ORDER = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'  # of devices: [8,8]T(1,0)
# An integer of a program as (element, offset): an element of a loop's state, or None for a constant, plus an offset.
_Number = tuple[int | None, int]


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array. in_memory: in the device's main memory; TPU programs keep many arrays in a faster one."""
  dtype: str
  dims: tuple[int, ...]
  in_memory: bool = True

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    """Without padding. Types outside the table: fp8 counts one byte, tokens none."""
    return self.size * _BYTES.get(self.dtype, 1 if self.dtype.startswith('f8') else 0)


@dataclasses.dataclass(frozen=True)
class Op:
  """An instruction: its results, names of its operands, and the text in and after its parentheses."""
  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str
  literal: str

  def attribute(self, name: str) -> str:
    """Return the value of name=…, up to the next comma outside brackets; '' without one."""
    match = re.search(rf'(?:^|[\s,]){name}=', self.attributes)
    return self.attributes[match.end():_index_outside(self.attributes, ',', match.end())] if match else ''

  def called(self, *names: str) -> tuple[str, ...]:
    """Return the computations that these attributes name."""
    return tuple(n for name in names for n in _NAME.findall(self.attribute(name)))


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in order. root: name of the instruction that makes the result."""
  ops: Mapping[str, Op]
  root: str

  def shapes_of(self, op: Op) -> list[Shape]:
    """Return the shapes of an instruction's operands."""
    return [s for name in op.operands if name in self.ops for s in self.ops[name].shapes]


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: computations by name. entry: name of the one that is called. devices: that run it."""
  computations: Mapping[str, Computation]
  entry: str
  devices: int

  def __getitem__(self, name: str) -> Computation:
    return self.computations[name]


def parse(text: str) -> Module:
  """Parse the text of `compiled.as_text()`."""
  computations, entry = {}, ''
  text = _KERNEL_METADATA.sub('', text)
  for is_entry, name, body in _COMPUTATION.findall(text):
    lines = _LINE.findall(body)
    [root] = (op for is_root, op, _ in lines if is_root)
    computations[name] = Computation({op: _op(op, rest) for _, op, rest in lines}, root)
    entry = name if is_entry else entry
  counts = re.findall(r'\b(?:num_partitions|replica_count)=(\d+)', text.partition('\n')[0])
  return Module(computations, entry, math.prod(map(int, counts)))


def _op(name: str, text: str) -> Op:
  """Parse 'SHAPES OPCODE(ARGUMENTS), ATTRIBUTES'."""
  opcode = _index_outside(text, ' ')
  start = text.index('(', opcode)
  end = _index_outside(text, ')', start)
  shapes = tuple(Shape(dtype, tuple(integers(dims)), space in ('', '0'))
                 for dtype, dims, space in _SHAPE.findall(text[:opcode]))
  arguments = text[start + 1:end]
  operands, attributes = tuple(_NAME.findall(arguments)), text[end + 1:].lstrip(', ')
  return Op(name, text[opcode + 1:start], shapes, operands, attributes, arguments)


def _index_outside(text: str, letter: str, start: int = 0) -> int:
  """Return the first index from `start` of a letter outside brackets, or of one that closes them; else the length."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] in '{[(') - (text[i] in '}])')
    if text[i] == letter and depth <= 0:
      return i
  return len(text)


def integers(text: str) -> list[int]:
  """Return the integers of a text: '{0,1}' → [0, 1]."""
  return [int(n) for n in re.findall(r'\d+', text)]


def groups(op: Op, devices: int) -> list[tuple[int, ...]]:
  """Return the device groups of a collective, in any of XLA's notations; by default one group of all."""
  text = op.attribute('replica_groups')
  if match := re.match(rf'\[([\d,]+)\]<={_ORDER}', text):
    return list(map(tuple, _device_grid(match[2], match[3]).reshape(integers(match[1])).tolist()))
  # Not the attribute: this notation has a comma before device_ids, the order of devices in the mesh.
  if match := re.search(rf'replica_groups=mesh\[(.*?)\](?:, device_ids=\({_ORDER}\))?\s*\{{(.*?)\}}', op.attributes):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", match[1])}
    over = re.findall(r"'([^']*)'", match[4])
    axes = [list(sizes).index(name) for name in [name for name in sizes if name not in over] + over]
    grid = _device_grid(match[2] or str(math.prod(sizes.values())), match[3])
    grid = grid.reshape(list(sizes.values())).transpose(axes)
    return list(map(tuple, grid.reshape(-1, math.prod(sizes[name] for name in over)).tolist()))
  return [tuple(integers(group)) for group in re.findall(r'\{([\d,]+)\}', text)] or [tuple(range(devices))]


def _device_grid(shape: str, axes: str | None) -> np.ndarray:
  """Device numbers in a shape, transposed to the order of `axes`."""
  grid = np.arange(math.prod(integers(shape))).reshape(integers(shape))
  return grid.transpose(integers(axes)) if axes else grid


def trip_count(module: Module, computation: Computation, loop: Op) -> int | None:
  """Return how often the body of a `while` in a computation runs; None if it is unknown.

  XLA writes the count on CPU. Otherwise condition and body are read: as in every `lax.scan`, a counter that starts at a
  constant and that the body increments by one is compared with a constant.
  """
  if match := re.search(r'known_trip_count[^\d]*(\d+)', loop.attributes):
    return int(match[1])
  condition, body = (_Scope(module, module[loop.called(name)[0]]) for name in ('condition', 'body'))
  if condition.root.opcode == 'fusion':  # it contains the comparison
    condition = condition.inside(condition.root)
  direction, sides = condition.root.attribute('direction'), [condition.number(n) for n in condition.root.operands]
  if direction not in ('LT', 'GT') or None in sides:
    return None
  (counter, counter_offset), (limit, limit_offset) = sides if direction == 'LT' else reversed(sides)
  # The body must increment the counter and keep the limit.
  after = lambda element: body.number(body.computation.root, element)
  increments = counter is not None and after(counter) == (counter, 1)
  keeps = limit is None or after(limit) == (limit, 0)
  outside = _Scope(module, computation)
  initial = [(None, 0) if e is None else outside.number(loop.operands[0], e) for e in (counter, limit)]
  if not increments or not keeps or not all(number and number[0] is None for number in initial):
    return None
  (_, start), (_, end) = initial
  return max(0, end + limit_offset - start - counter_offset)


@dataclasses.dataclass(frozen=True)
class _Scope:
  """A computation; if it is that of a fusion, also the scope around the fusion and the names of its operands."""
  module: Module
  computation: Computation
  outer: '_Scope | None' = None
  operands: tuple[str, ...] = ()

  @property
  def root(self) -> Op:
    return self.computation.ops[self.computation.root]

  def inside(self, fusion: Op) -> '_Scope':
    return _Scope(self.module, self.module[fusion.called('calls')[0]], self, fusion.operands)

  def number(self, name: str, element: int | None = None) -> _Number | None:
    """Return the number that an instruction makes, or an element of the tuple that it makes; None if unknown."""
    op = self.computation.ops[name]
    if op.opcode == 'constant' and re.fullmatch(r'-?\d+', op.literal):
      return None, int(op.literal)
    if op.opcode == 'parameter' and self.outer:
      return self.outer.number(self.operands[int(op.literal)], element)
    if op.opcode == 'parameter' and element is not None:  # the state of the loop
      return element, 0
    if op.opcode in ('copy', 'bitcast', 'convert', 'copy-start', 'copy-done', 'opt-barrier'):
      return self.number(op.operands[0], element)
    if op.opcode == 'tuple' and element is not None:
      return self.number(op.operands[element])
    if op.opcode == 'get-tuple-element':
      return self.number(op.operands[0], int(op.attribute('index')))
    if op.opcode == 'fusion':
      inner = self.inside(op)
      return inner.number(inner.computation.root, element)
    if op.opcode == 'add':
      left, right = map(self.number, op.operands)
      if left and right and None in (left[0], right[0]):
        return (left[0] if right[0] is None else right[0]), left[1] + right[1]
    return None
