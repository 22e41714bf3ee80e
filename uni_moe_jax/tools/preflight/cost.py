"""What one device does in a compiled program: products, memory traffic, collectives. Bodies of loops count as often as they run."""

import collections
import dataclasses
import math
import re

import numpy as np

from uni_moe_jax.tools.preflight.hlo import Computation, Module, Op, Shape, groups, trip_count

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'ragged-all-to-all',
               'collective-broadcast')
# They move nothing, or what they move is counted where it is used.
_FREE = frozenset((
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all', 'iota',
    'partition-id', 'replica-id', 'opt-barrier', 'add-dependency', 'domain', 'async-update', 'get-dimension-size'))
_SLICES = ('dynamic-slice', 'slice', 'gather')


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one device.

  Attributes:
    flops: of matrix products and of kernels that say what they do; multiply and add count two.
    bytes: read from and written to the device's memory.
    calls, payload, sent: by kind of collective: how many, bytes that they are about, and bytes that the device sends at least.
    unknown_loops: loops of which nobody says how often they run; their bodies count once.
    unknown_kernels: custom kernels that do not say what they do, and count nothing.
  """
  flops: float = 0.0
  bytes: float = 0.0
  calls: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  payload: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  sent: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  unknown_loops: int = 0
  unknown_kernels: int = 0

  def plus(self, other: 'Cost', times: int = 1) -> 'Cost':
    """This and `times` the other."""
    def both(a, b):
      return collections.Counter({k: a[k] + times * b[k] for k in {*a, *b}})
    return Cost(self.flops + times * other.flops, self.bytes + times * other.bytes, both(self.calls, other.calls),
                both(self.payload, other.payload), both(self.sent, other.sent), self.unknown_loops + other.unknown_loops,
                self.unknown_kernels + other.unknown_kernels)


def of_module(module: Module) -> Cost:
  """Cost of a whole program."""
  return _Counter(module).of(module.entry, fused=False)


class _Counter:
  """Costs of computations, each counted once and kept."""

  def __init__(self, module: Module):
    self._module = module
    self._known: dict[tuple[str, bool], Cost] = {}
    # A collective that runs beside products stands, with one channel, in the fusion that starts it, in those it runs through, and in
    # the one that ends it.
    self._channels: set[str] = set()

  def of(self, name: str, fused: bool) -> Cost:
    """fused: what the computation's instructions pass among themselves stays in registers, and only products count."""
    if (name, fused) not in self._known:
      computation, total = self._module[name], Cost()
      for op in computation.ops.values():
        total = total.plus(self._op(computation, op, fused))
      self._known[name, fused] = total
    return self._known[name, fused]

  def _op(self, where: Computation, op: Op, fused: bool) -> Cost:
    kind = op.opcode.removesuffix('-start')
    if op.opcode.endswith('-done'):
      return Cost()
    if op.opcode == 'while':
      times = trip_count(self._module, where, op)
      inside = self.of(op.called('body')[0], fused).plus(self.of(op.called('condition')[0], fused))
      return Cost(unknown_loops=times is None).plus(inside, 1 if times is None else times)
    if op.opcode == 'conditional':
      branches = op.called('branch_computations', 'true_computation', 'false_computation')
      return max((self.of(b, fused) for b in branches), key=lambda c: (c.flops, c.bytes))
    if op.opcode == 'call':
      return self.of(op.called('to_apply', 'calls')[0], fused)
    if kind in COLLECTIVES:
      if fused and (channel := op.attribute('channel_id')):
        if channel in self._channels:
          return Cost()
        self._channels.add(channel)
      return _collective(where, op, kind, self._module.devices).plus(Cost(bytes=0.0 if fused else _traffic(where, op)))
    if kind == 'async':
      return self.of(op.called('calls')[0], fused)
    if op.opcode == 'fusion':
      inner = op.called('calls')[0]
      moved = 0.0 if fused else _fusion_traffic(where, op, self._module[inner])
      return self.of(inner, True).plus(Cost(bytes=moved))
    moved = 0.0 if fused or op.opcode in _FREE else _traffic(where, op)
    if op.opcode == 'dot':
      return Cost(flops=_dot(where, op), bytes=moved)
    if op.opcode == 'convolution':
      return Cost(flops=_convolution(where, op), bytes=moved)
    if op.opcode == 'custom-call':
      return _kernel(op).plus(Cost(bytes=moved))
    return Cost(bytes=moved)


def _in_memory(shapes) -> float:
  return sum(s.bytes for s in shapes if s.in_memory)


def _traffic(where: Computation, op: Op) -> float:
  """Bytes that an instruction by itself reads and writes."""
  kind = op.opcode.removesuffix('-start')
  if kind in _SLICES:
    [source, *_], [result, *_] = where.shapes_of(op), _results(op)
    return (source.in_memory + result.in_memory) * result.bytes  # into another memory, or from one, one end counts
  if kind == 'dynamic-update-slice':
    return 2 * _in_memory(where.ops[op.operands[1]].shapes)
  if kind == 'scatter':
    return 3 * _in_memory(where.ops[op.operands[-1]].shapes)
  return _in_memory(_results(op)) + _in_memory(where.shapes_of(op))


def _results(op: Op) -> tuple[Shape, ...]:
  """Arrays that an instruction makes. The result of a start is (operand, result, …), of a copy's (result, operand, …)."""
  if not op.opcode.endswith('-start') or len(op.shapes) == 1:
    return op.shapes
  return op.shapes[:1] if op.opcode == 'copy-start' else op.shapes[1:2]


def _fusion_traffic(where: Computation, op: Op, inner: Computation) -> float:
  """Bytes that a fusion reads and writes: of an operand of which it takes slices alone, the slices; of a result into which it
  writes a slice, that slice."""
  moved = 0.0
  for name, parameter in zip(op.operands, inner.parameters):
    users = inner.users.get(parameter.name, [])
    shapes = where.ops[name].shapes if name in where.ops else ()
    if users and all(u.opcode in _SLICES and u.operands[0] == parameter.name for u in users):
      moved += sum(_share(shapes, u.shapes) for u in users)
    elif users and all(u.opcode == 'dynamic-update-slice' and u.operands[0] == parameter.name for u in users):
      continue  # is written in place
    else:
      moved += _in_memory(shapes)
  root = inner.ops[inner.root]
  results = [inner.ops[n] for n in root.operands] if root.opcode == 'tuple' else [root]
  for result, shape in zip(results, op.shapes):
    while result.opcode in ('bitcast', 'copy', 'convert') and result.operands[0] in inner.ops:
      result = inner.ops[result.operands[0]]
    if result.opcode == 'dynamic-update-slice':
      update = inner.ops[result.operands[1]]
      moved += _share((shape,), update.shapes)
    else:
      moved += _in_memory((shape,))
  return moved


def _share(whole: tuple[Shape, ...], part: tuple[Shape, ...]) -> float:
  """Bytes of a part, where the whole lies in memory."""
  return sum(s.bytes for s in part) if any(s.in_memory for s in whole) else 0.0


def _dot(where: Computation, op: Op) -> float:
  left = where.ops[op.operands[0]].shapes[0].dims
  contracted = [int(n) for n in re.findall(r'\d+', op.attribute('lhs_contracting_dims'))]
  return 2.0 * math.prod(op.shapes[0].dims) * math.prod(left[i] for i in contracted)


def _convolution(where: Computation, op: Op) -> float:
  """Products of a convolution; TPU programs write matrix products so, with batch axes as windows over dilated axes. What a
  window reads of padding and of the gaps of a dilation is no product."""
  sides, result = op.attribute('dim_labels').split('->')
  left, right = sides.split('_')
  lhs, rhs = (where.ops[n].shapes[0].dims for n in op.operands[:2])
  out = op.shapes[0].dims
  window = op.attribute('window')
  groups = int(op.attribute('batch_group_count') or 1)
  count = 2.0 * out[result.index('f')] * rhs[right.index('i')] * lhs[left.index('b')] / groups
  spatial = sorted(c for c in left if c.isdigit())
  fields = {k: _window(window, k, len(spatial), d) for k, d in
            (('size', 1), ('stride', 1), ('pad', (0, 0)), ('lhs_dilate', 1), ('rhs_dilate', 1))}
  for i, axis in enumerate(spatial):
    start = (np.arange(out[result.index(axis)]) * fields['stride'][i] - fields['pad'][i][0])[:, None]
    place = start + np.arange(rhs[right.index(axis)])[None] * fields['rhs_dilate'][i]
    dilate, size = fields['lhs_dilate'][i], lhs[left.index(axis)]
    count *= ((place >= 0) & (place <= (size - 1) * dilate) & (place % dilate == 0)).sum()
  return count


def _window(window: str, field: str, axes: int, default) -> list:
  found = re.search(rf'(?:^|[{{ ]){field}=([\d_x\-]+)', window)
  if not found:
    return [default] * axes
  parts = found[1].split('x')
  return [tuple(int(n) for n in p.split('_')) for p in parts] if field == 'pad' else [int(p) for p in parts]


def _kernel(op: Op) -> Cost:
  """A custom kernel: what it says about itself. Others are XLA's own helpers, which multiply nothing."""
  if 'tpu_custom_call' not in op.attribute('custom_call_target'):
    return Cost()
  said = re.search(r'"cost_estimate":\{"flops":"?(\d+)', op.attributes)
  if said:
    return Cost(flops=float(said[1]))
  # What makes integers alone counts or sorts, as the kernel before a ragged product does.
  return Cost(unknown_kernels=int(any(s.dtype[0] not in 'su' for s in op.shapes)))


def _collective(where: Computation, op: Op, kind: str, devices: int) -> Cost:
  """Payload: what is reduced, the gathered whole, what is exchanged. Sent: what every device must send at least, as rings do."""
  n = len(groups(op, devices)[0])
  operands = sum(s.bytes for s in where.shapes_of(op))
  payload = operands * n if kind == 'all-gather' else operands
  others = (n - 1) / n
  sent = payload if kind == 'collective-permute' else payload * others * (2 if kind == 'all-reduce' else 1)
  one = lambda x: collections.Counter({kind: x})
  return Cost(calls=one(1), payload=one(payload), sent=one(sent))
