"""Parser of a compiled program's HLO text.

No JAX interface gives costs with loops: XLA's own analysis counts the body of a loop once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

_BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4,
          'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16}
_SHAPE = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?')
_SPACE = re.compile(r'S\((\d+)\)')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = ')
_NAME = re.compile(r'%([\w.\-]+)')
_ORDER = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'  # of devices: [8,8]T(1,0)


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
    return _until_comma(self.attributes[match.end():]) if match else ''

  def called(self, *names: str) -> tuple[str, ...]:
    """Return the computations that these attributes name."""
    return tuple(n for name in names for n in _NAME.findall(self.attribute(name)))


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in order. root: name of the instruction that makes the result."""
  name: str
  ops: Mapping[str, Op]
  root: str

  def shapes_of(self, op: Op) -> list[Shape]:
    """Return the shapes of an instruction's operands."""
    return [s for name in op.operands if name in self.ops for s in self.ops[name].shapes]

  @functools.cached_property
  def users(self) -> Mapping[str, list[Op]]:
    """Instructions that read the result of an instruction, by its name."""
    users: dict[str, list[Op]] = {}
    for op in self.ops.values():
      for name in op.operands:
        users.setdefault(name, []).append(op)
    return users

  @functools.cached_property
  def parameters(self) -> list[Op]:
    """Parameters in order."""
    return sorted((op for op in self.ops.values() if op.opcode == 'parameter'), key=lambda op: int(op.literal))


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
  name, ops, root = '', {}, ''
  for line in text.splitlines():
    if not name:
      if head := _HEAD.match(line):
        name, ops, root = head[2], {}, ''
        entry = name if head[1] else entry
    elif line.startswith('}'):
      computations[name] = Computation(name, ops, root)
      name = ''
    elif start := _LINE.match(line):
      ops[start[2]] = _op(start[2], line[start.end():])
      root = start[2] if start[1] else root
  head = text[:text.find('\n')]
  counts = [int(n) for key in ('num_partitions', 'replica_count') for n in re.findall(rf'\b{key}=(\d+)', head)]
  return Module(computations, entry, math.prod(counts))


def _op(name: str, rest: str) -> Op:
  if rest.startswith('('):
    result = rest[:_closing(rest, 0) + 1]
  else:
    result = rest[:rest.index(' ')]
  rest = rest[len(result) + 1:]
  start = rest.index('(')
  end = _closing(rest, start)
  arguments = rest[start + 1:end]
  operands, attributes = tuple(_NAME.findall(arguments)), rest[end + 1:].lstrip(', ')
  return Op(name, rest[:start], _shapes(result), operands, attributes, arguments)


def _shapes(text: str) -> tuple[Shape, ...]:
  def shape(match) -> Shape:
    space = _SPACE.search(match[3] or '')
    return Shape(match[1], tuple(int(n) for n in match[2].split(',') if n), not space or space[1] == '0')
  return tuple(map(shape, _SHAPE.finditer(text)))


def _closing(text: str, start: int) -> int:
  """Return the index of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if not depth:
      return i
  raise ValueError(f'unbalanced parenthesis in {text[:80]!r}.')


def _until_comma(text: str) -> str:
  """Return the text up to the first comma outside brackets."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter in '{[(') - (letter in '}])')
    if letter == ',' and depth <= 0:
      return text[:i]
  return text


def groups(op: Op, devices: int) -> list[tuple[int, ...]]:
  """Return the device groups of a collective, in any of XLA's notations; by default one group of all."""
  text = op.attribute('replica_groups')
  if match := re.match(rf'\[([\d,]+)\]<={_ORDER}', text):
    return list(map(tuple, _device_grid(match[2], match[3]).reshape(_numbers(match[1])).tolist()))
  # Not the attribute: this notation has a comma before device_ids, the order of devices in the mesh.
  if match := re.search(rf'replica_groups=mesh\[(.*?)\](?:, device_ids=\({_ORDER}\))?\s*\{{(.*?)\}}', op.attributes):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", match[1])}
    over = re.findall(r"'([^']*)'", match[4])
    axes = [list(sizes).index(name) for name in [name for name in sizes if name not in over] + over]
    grid = _device_grid(match[2] or str(math.prod(sizes.values())), match[3])
    grid = grid.reshape(list(sizes.values())).transpose(axes)
    return list(map(tuple, grid.reshape(-1, math.prod(sizes[name] for name in over)).tolist()))
  return [tuple(_numbers(group)) for group in re.findall(r'\{([\d,]+)\}', text)] or [tuple(range(devices))]


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]


def _device_grid(shape: str, axes: str | None) -> np.ndarray:
  """Device numbers in a shape, transposed to the order of `axes`."""
  grid = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return grid.transpose(_numbers(axes)) if axes else grid


def trip_count(module: Module, computation: Computation, loop: Op) -> int | None:
  """Return how often the body of a `while` in a computation runs; None if it is unknown.

  XLA writes the count on CPU. Otherwise condition and body are read: as in every `lax.scan`, a counter that starts at a
  constant and that the body increments by one is compared with a constant.
  """
  if match := re.search(r'known_trip_count[^\d]*(\d+)', loop.attributes):
    return int(match[1])
  condition, body = (module[loop.called(name)[0]] for name in ('condition', 'body'))
  inner, root, arguments = condition, condition.ops[condition.root], ()
  if root.opcode == 'fusion':  # it contains the comparison
    inner, arguments = _fused(module, condition, root, ())
    root = inner.ops[inner.root]
  if root.opcode != 'compare' or root.attribute('direction') not in ('LT', 'GT'):
    return None
  sides = [_number(module, inner, inner.ops[n], arguments) for n in root.operands]
  if root.attribute('direction') == 'GT':
    sides.reverse()
  if None in sides:
    return None
  (counter, counter_offset), (limit, limit_offset) = sides
  start, end = (_initial(module, computation, loop, element) for element in (counter, limit))
  # The body must increment the counter and keep the limit.
  after = lambda element: _element(module, body, body.ops[body.root], element, ())
  increments = counter is not None and after(counter) == (counter, 1)
  keeps = limit is None or after(limit) == (limit, 0)
  if not increments or not keeps or None in (start, end):
    return None
  return max(0, end + limit_offset - start - counter_offset)


# An integer of a program as (element, offset): an element of the loop's state, or None for a constant, plus an offset.
_Number = tuple[int | None, int]


def _initial(module: Module, computation: Computation, loop: Op, element: int | None) -> int | None:
  """Return the constant with which an element of a loop's state starts, or None. Element None: 0."""
  if element is None:
    return 0
  number = _element(module, computation, computation.ops[loop.operands[0]], element, ())
  return number[1] if number and number[0] is None else None


def _fused(module: Module, computation: Computation, fusion: Op, arguments) -> tuple[Computation, tuple]:
  """Return the computation of a fusion and its arguments, as functions that return their numbers."""
  number = lambda name: lambda: _number(module, computation, computation.ops[name], arguments)
  return module[fusion.called('calls')[0]], tuple(number(name) for name in fusion.operands)


def _number(module: Module, computation: Computation, op: Op, arguments) -> _Number | None:
  """Return the number that an instruction makes, or None. arguments: of the fusion around it, or ()."""
  if op.opcode == 'constant':
    return (None, int(op.literal)) if re.fullmatch(r'-?\d+', op.literal) else None
  if op.opcode == 'parameter':
    return arguments[int(op.literal)]() if arguments else None
  if op.opcode in ('copy', 'bitcast', 'convert', 'copy-start', 'copy-done', 'opt-barrier'):
    return _number(module, computation, computation.ops[op.operands[0]], arguments)
  if op.opcode == 'get-tuple-element':
    return _element(module, computation, computation.ops[op.operands[0]], int(op.attribute('index')), arguments)
  if op.opcode == 'fusion':
    inner, inner_arguments = _fused(module, computation, op, arguments)
    return _number(module, inner, inner.ops[inner.root], inner_arguments)
  if op.opcode == 'add':
    left, right = (_number(module, computation, computation.ops[name], arguments) for name in op.operands)
    if left and right and None in (left[0], right[0]):
      return (left[0] if right[0] is None else right[0]), left[1] + right[1]
  return None


def _element(module: Module, computation: Computation, op: Op, index: int, arguments) -> _Number | None:
  """Return an element of the tuple that an instruction makes, see `_number`."""
  if op.opcode == 'parameter' and not arguments:  # the state of the loop
    return index, 0
  if op.opcode == 'tuple':
    return _number(module, computation, computation.ops[op.operands[index]], arguments)
  if op.opcode in ('copy', 'opt-barrier'):
    return _element(module, computation, computation.ops[op.operands[0]], index, arguments)
  if op.opcode == 'fusion':
    inner, inner_arguments = _fused(module, computation, op, arguments)
    return _element(module, inner, inner.ops[inner.root], index, inner_arguments)
  return None
