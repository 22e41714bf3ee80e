"""The text of a compiled program as computations and instructions. It is parsed, because no interface of JAX gives what loops
do: XLA's own counts take the body of a loop once."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from uni_moe_jax.utils.errors import UsageError

_BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4,
          'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16}
_SHAPE = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?')
_SPACE = re.compile(r'S\((\d+)\)')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = ')
_NAME = re.compile(r'%([\w.\-]+)')
_ORDER = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'  # of devices: [8,8]T(1,0)


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array: dtype, dims, and whether it lies in the device's main memory (TPU programs keep much in a faster one)."""
  dtype: str
  dims: tuple[int, ...]
  in_memory: bool = True

  @property
  def size(self) -> int:
    """Elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    """Without padding. fp8 types and tokens, which are in no table, count one byte and none."""
    return self.size * _BYTES.get(self.dtype, 1 if self.dtype.startswith('f8') else 0)


@dataclasses.dataclass(frozen=True)
class Op:
  """An instruction: name, opcode, the arrays of its result, names of its operands, and the rest of its line."""
  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str
  literal: str

  def attribute(self, name: str) -> str:
    """The value of name=…, up to the next comma outside braces; '' if there is none."""
    found = re.search(rf'(?:^|[\s,]){name}=', self.attributes)
    return _balanced(self.attributes[found.end():]) if found else ''

  def called(self, *names: str) -> tuple[str, ...]:
    """Computations that some attributes name."""
    return tuple(n for name in names for n in _NAME.findall(self.attribute(name)))


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in order. root: name of the result's."""
  name: str
  ops: Mapping[str, Op]
  root: str

  def shapes_of(self, op: Op) -> list[Shape]:
    """The arrays of an instruction's operands."""
    return [s for name in op.operands if name in self.ops for s in self.ops[name].shapes]

  @functools.cached_property
  def users(self) -> Mapping[str, list[Op]]:
    """Who reads an instruction's result."""
    found: dict[str, list[Op]] = {}
    for op in self.ops.values():
      for name in op.operands:
        found.setdefault(name, []).append(op)
    return found

  @functools.cached_property
  def parameters(self) -> list[Op]:
    """In order."""
    return sorted((op for op in self.ops.values() if op.opcode == 'parameter'), key=lambda op: int(op.literal))


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: computations by name; entry: the name of the first."""
  computations: Mapping[str, Computation]
  entry: str
  devices: int

  def __getitem__(self, name: str) -> Computation:
    return self.computations[name]


def parse(text: str) -> Module:
  """The module that `compiled.as_text()` prints."""
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
  counts = [int(found[1]) for key in ('num_partitions', 'replica_count') if (found := re.search(rf'{key}=(\d+)', head))]
  return Module(computations, entry, math.prod(counts))


def _op(name: str, rest: str) -> Op:
  if rest.startswith('('):
    result = rest[:_closing(rest, 0) + 1]
  else:
    result = rest[:rest.index(' ')]
  rest = rest[len(result) + 1:]
  opened = rest.index('(')
  closed = _closing(rest, opened)
  inside = rest[opened + 1:closed]
  return Op(name, rest[:opened], _shapes(result), tuple(_NAME.findall(inside)), rest[closed + 1:].lstrip(', '), inside)


def _shapes(text: str) -> tuple[Shape, ...]:
  def one(found) -> Shape:
    space = _SPACE.search(found[3] or '')
    return Shape(found[1], tuple(int(n) for n in found[2].split(',') if n), not space or space[1] == '0')
  return tuple(one(found) for found in _SHAPE.finditer(text))


def _closing(text: str, opened: int) -> int:
  """Index of the parenthesis that closes the one at `opened`."""
  depth = 0
  for i in range(opened, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if not depth:
      return i
  raise UsageError(f'parenthesis is not closed in {text[:80]!r}.')


def _balanced(text: str) -> str:
  """Up to the first comma outside braces and brackets."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter in '{[(') - (letter in '}])')
    if letter == ',' and depth <= 0:
      return text[:i]
  return text


def groups(op: Op, devices: int) -> list[tuple[int, ...]]:
  """Which devices work together in a collective, in any of XLA's notations; where it names none, all of them."""
  text = op.attribute('replica_groups')
  if found := re.match(rf'\[([\d,]+)\]<={_ORDER}', text):
    return list(map(tuple, _ordered(found[2], found[3]).reshape(_numbers(found[1])).tolist()))
  # Not the attribute: it has a comma of its own before device_ids, the order in which devices lie in the mesh.
  if found := re.search(rf'replica_groups=mesh\[(.*?)\](?:, device_ids=\({_ORDER}\))?\s*\{{(.*?)\}}', op.attributes):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", found[1])}
    over = re.findall(r"'([^']*)'", found[4])
    axes = [list(sizes).index(name) for name in [name for name in sizes if name not in over] + over]
    grid = _ordered(found[2] or str(math.prod(sizes.values())), found[3]).reshape(list(sizes.values())).transpose(axes)
    return list(map(tuple, grid.reshape(-1, math.prod(sizes[name] for name in over)).tolist()))
  return [tuple(_numbers(group)) for group in re.findall(r'\{([\d,]+)\}', text)] or [tuple(range(devices))]


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]


def _ordered(shape: str, axes: str | None) -> np.ndarray:
  """Device numbers in a shape, its axes in another order."""
  grid = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return grid.transpose(_numbers(axes)) if axes else grid


def trip_count(module: Module, where: Computation, loop: Op) -> int | None:
  """How often the body of a `while` runs; None where its text does not say.

  XLA says it itself on CPU. Else condition and body are read: a counter, which starts at a constant and to which the body adds
  one, is compared with a constant, as every `lax.scan` does.
  """
  if found := re.search(r'known_trip_count[^\d]*(\d+)', loop.attributes):
    return int(found[1])
  condition, body = (module[loop.called(name)[0]] for name in ('condition', 'body'))
  inner, root, outside = condition, condition.ops[condition.root], ()
  if root.opcode == 'fusion':  # compare stands inside
    inner, outside = _inside(module, condition, root, ())
    root = inner.ops[inner.root]
  if root.opcode != 'compare' or root.attribute('direction') not in ('LT', 'GT'):
    return None
  sides = [_number(module, inner, inner.ops[n], outside) for n in root.operands]
  if root.attribute('direction') == 'GT':
    sides.reverse()
  if None in sides:
    return None
  (counter, ahead), (limit, more) = sides
  start, end = _start(module, where, loop, counter), _start(module, where, loop, limit)
  # What the body makes of the two: one more, and the same.
  grows = counter is not None and _element(module, body, body.ops[body.root], counter, ()) == (counter, 1)
  stays = limit is None or _element(module, body, body.ops[body.root], limit, ()) == (limit, 0)
  return max(0, end + more - start - ahead) if grows and stays and None not in (start, end) else None


# An integer of a program as (element, plus): an element of the state that a loop's body or condition is given, None for none, and
# what is added to it.
_Number = tuple[int | None, int]


def _start(module: Module, where: Computation, loop: Op, element: int | None) -> int | None:
  """The constant with which an element of a loop's state starts (of none: 0), or None."""
  if element is None:
    return 0
  found = _element(module, where, where.ops[loop.operands[0]], element, ())
  return found[1] if found and found[0] is None else None


def _inside(module: Module, where: Computation, fusion: Op, outside) -> tuple[Computation, tuple]:
  """The computation of a fusion, and what its parameters stand for: each a function, asked when it is needed."""
  ask = lambda name: lambda: _number(module, where, where.ops[name], outside)
  return module[fusion.called('calls')[0]], tuple(ask(name) for name in fusion.operands)


def _number(module: Module, where: Computation, op: Op, outside) -> _Number | None:
  """What an instruction makes, if its text says so. outside: of what a fusion's parameters stand for; () elsewhere."""
  if op.opcode == 'constant':
    return (None, int(op.literal)) if re.fullmatch(r'-?\d+', op.literal) else None
  if op.opcode == 'parameter':
    return outside[int(op.literal)]() if outside else None
  if op.opcode in ('copy', 'bitcast', 'convert', 'copy-start', 'copy-done', 'opt-barrier'):
    return _number(module, where, where.ops[op.operands[0]], outside)
  if op.opcode == 'get-tuple-element':
    return _element(module, where, where.ops[op.operands[0]], int(op.attribute('index')), outside)
  if op.opcode == 'fusion':
    inner, given = _inside(module, where, op, outside)
    return _number(module, inner, inner.ops[inner.root], given)
  if op.opcode == 'add':
    both = [_number(module, where, where.ops[name], outside) for name in op.operands]
    if None not in both and None in (both[0][0], both[1][0]):
      return (both[0][0] if both[1][0] is None else both[1][0]), both[0][1] + both[1][1]
  return None


def _element(module: Module, where: Computation, op: Op, index: int, outside) -> _Number | None:
  """An element of the tuple that an instruction makes."""
  if op.opcode == 'parameter' and not outside:  # the state of the loop
    return index, 0
  if op.opcode == 'tuple':
    return _number(module, where, where.ops[op.operands[index]], outside)
  if op.opcode in ('copy', 'opt-barrier'):
    return _element(module, where, where.ops[op.operands[0]], index, outside)
  if op.opcode == 'fusion':
    inner, given = _inside(module, where, op, outside)
    return _element(module, inner, inner.ops[inner.root], index, given)
  return None
