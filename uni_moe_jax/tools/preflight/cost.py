"""FLOPs, memory traffic, collectives and roofline of a compiled program on one device.

A loop body counts as often as the loop runs.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from uni_moe_jax.tools.preflight.hlo import Computation, Module, Op, Shape, groups, trip_count
from uni_moe_jax.tools.preflight.topology import Chip

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'ragged-all-to-all',
               'collective-broadcast')
# They move no bytes, or their bytes count where they are used.
_FREE = frozenset((
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all',
    'iota', 'partition-id', 'replica-id', 'opt-barrier', 'add-dependency', 'domain', 'async-update',
    'get-dimension-size'))
_SLICES = ('dynamic-slice', 'slice', 'gather')


@dataclasses.dataclass(frozen=True)
class Cost:
  """Cost on one device.

  Attributes:
    flops: of matrix products, and of kernels with a cost estimate; multiply and add count as two.
    bytes: read from and written to the device memory.
    calls, payload, sent: per collective: number of calls, bytes of their arrays, bytes that the device sends at least.
    unknown_loops: loops with an unknown trip count; their bodies count once.
    unknown_kernels: custom kernels without a cost estimate; their FLOPs are not counted.
  """
  flops: float = 0.0
  bytes: float = 0.0
  calls: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  payload: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  sent: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  unknown_loops: int = 0
  unknown_kernels: int = 0

  def plus(self, other: 'Cost', times: int = 1) -> 'Cost':
    """Return the sum of this and `times` the other; unknown loops and kernels are added once."""
    def add(a, b):
      return collections.Counter({k: a[k] + times * b[k] for k in {*a, *b}})
    return Cost(
        self.flops + times * other.flops, self.bytes + times * other.bytes, add(self.calls, other.calls),
        add(self.payload, other.payload), add(self.sent, other.sent), self.unknown_loops + other.unknown_loops,
        self.unknown_kernels + other.unknown_kernels)


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds that one device needs for each resource at its peak."""
  compute: float
  memory: float
  interconnect: float

  @property
  def seconds(self) -> float:
    """Of the program, if the three overlap perfectly."""
    return max(self.compute, self.memory, self.interconnect)

  @property
  def bound(self) -> str:
    """The limiting resource."""
    return max(('compute', 'memory', 'interconnect'), key=lambda name: getattr(self, name))


def roofline(cost: Cost, chip: Chip) -> Roofline | None:
  """Return the roofline of a cost per device; None if the peaks of the chip are unknown."""
  if chip.flops is None:
    return None
  return Roofline(cost.flops / chip.flops, cost.bytes / chip.hbm, sum(cost.sent.values()) / chip.links)


def of_module(module: Module) -> Cost:
  """Return the cost of a program."""
  return _Counter(module).cost(module.entry, fused=False)


class _Counter:
  """Costs of the computations of a module, each computed once."""

  def __init__(self, module: Module):
    self._module = module
    self._costs: dict[tuple[str, bool], Cost] = {}
    # A collective that overlaps with products occurs, with one channel, in the fusion that starts it, in those that it
    # runs through, and in the one that ends it.
    self._channels: set[str] = set()

  def cost(self, name: str, fused: bool) -> Cost:
    """Return the cost of a computation. fused: values stay in registers, so only products count."""
    if (name, fused) not in self._costs:
      computation, total = self._module[name], Cost()
      for op in computation.ops.values():
        total = total.plus(self._op(computation, op, fused))
      self._costs[name, fused] = total
    return self._costs[name, fused]

  def _op(self, computation: Computation, op: Op, fused: bool) -> Cost:
    opcode = op.opcode.removesuffix('-start')
    if op.opcode.endswith('-done'):
      return Cost()
    if op.opcode == 'while':
      times = trip_count(self._module, computation, op)
      body = self.cost(op.called('body')[0], fused).plus(self.cost(op.called('condition')[0], fused))
      return Cost(unknown_loops=times is None).plus(body, 1 if times is None else times)
    if op.opcode == 'conditional':
      branches = op.called('branch_computations', 'true_computation', 'false_computation')
      return max((self.cost(b, fused) for b in branches), key=lambda c: (c.flops, c.bytes))
    if op.opcode == 'call':
      return self.cost(op.called('to_apply', 'calls')[0], fused)
    if opcode in COLLECTIVES:
      if fused and (channel := op.attribute('channel_id')):
        if channel in self._channels:
          return Cost()
        self._channels.add(channel)
      moved = 0.0 if fused else _traffic(computation, op)
      return _collective(computation, op, opcode, self._module.devices).plus(Cost(bytes=moved))
    if opcode == 'async':
      return self.cost(op.called('calls')[0], fused)
    if op.opcode == 'fusion':
      inner = op.called('calls')[0]
      moved = 0.0 if fused else _fusion_traffic(computation, op, self._module[inner])
      return self.cost(inner, True).plus(Cost(bytes=moved))
    moved = 0.0 if fused or op.opcode in _FREE else _traffic(computation, op)
    if op.opcode == 'dot':
      return Cost(flops=_dot(computation, op), bytes=moved)
    if op.opcode == 'convolution':
      return Cost(flops=_convolution(computation, op), bytes=moved)
    if op.opcode == 'custom-call':
      return _kernel(op).plus(Cost(bytes=moved))
    return Cost(bytes=moved)


def _bytes_in_memory(shapes: Iterable[Shape]) -> float:
  return sum(s.bytes for s in shapes if s.in_memory)


def _traffic(computation: Computation, op: Op) -> float:
  """Bytes that a single instruction reads and writes."""
  opcode = op.opcode.removesuffix('-start')
  if opcode in _SLICES:
    [source, *_], [result, *_] = computation.shapes_of(op), _results(op)
    return (source.in_memory + result.in_memory) * result.bytes  # between two memories, one end counts
  if opcode == 'dynamic-update-slice':
    return 2 * _bytes_in_memory(computation.ops[op.operands[1]].shapes)
  if opcode == 'scatter':
    return 3 * _bytes_in_memory(computation.ops[op.operands[-1]].shapes)
  return _bytes_in_memory(_results(op)) + _bytes_in_memory(computation.shapes_of(op))


def _results(op: Op) -> tuple[Shape, ...]:
  """Results of an instruction: a start returns (operand, result, …), copy-start (result, operand, …)."""
  if not op.opcode.endswith('-start') or len(op.shapes) == 1:
    return op.shapes
  return op.shapes[:1] if op.opcode == 'copy-start' else op.shapes[1:2]


def _fusion_traffic(computation: Computation, op: Op, inner: Computation) -> float:
  """Bytes that a fusion reads and writes.

  An operand that is only sliced counts as its slices, a result that is updated in place as its update.
  """
  moved = 0.0
  for name, parameter in zip(op.operands, inner.parameters):
    users = inner.users.get(parameter.name, [])
    shapes = computation.ops[name].shapes if name in computation.ops else ()
    if users and all(u.opcode in _SLICES and u.operands[0] == parameter.name for u in users):
      moved += sum(_part_traffic(shapes, u.shapes) for u in users)
    elif users and all(u.opcode == 'dynamic-update-slice' and u.operands[0] == parameter.name for u in users):
      continue  # updated in place
    else:
      moved += _bytes_in_memory(shapes)
  root = inner.ops[inner.root]
  results = [inner.ops[n] for n in root.operands] if root.opcode == 'tuple' else [root]
  for result, shape in zip(results, op.shapes):
    while result.opcode in ('bitcast', 'copy', 'convert') and result.operands[0] in inner.ops:
      result = inner.ops[result.operands[0]]
    if result.opcode == 'dynamic-update-slice':
      moved += _part_traffic((shape,), inner.ops[result.operands[1]].shapes)
    else:
      moved += _bytes_in_memory((shape,))
  return moved


def _part_traffic(array: Sequence[Shape], part: Sequence[Shape]) -> float:
  """Bytes of a part of an array, if the array is in memory."""
  return sum(s.bytes for s in part) if any(s.in_memory for s in array) else 0.0


def _dot(computation: Computation, op: Op) -> float:
  left = computation.ops[op.operands[0]].shapes[0].dims
  contracted = [int(n) for n in re.findall(r'\d+', op.attribute('lhs_contracting_dims'))]
  return 2.0 * math.prod(op.shapes[0].dims) * math.prod(left[i] for i in contracted)


def _convolution(computation: Computation, op: Op) -> float:
  """FLOPs of a convolution without padding and the gaps of a dilation.

  TPU programs express matrix products as convolutions, with batch axes as windows over dilated axes.
  """
  sides, result = op.attribute('dim_labels').split('->')
  left, right = sides.split('_')
  lhs, rhs = (computation.ops[n].shapes[0].dims for n in op.operands[:2])
  out = op.shapes[0].dims
  window = op.attribute('window')
  batch_groups = int(op.attribute('batch_group_count') or 1)
  count = 2.0 * out[result.index('f')] * rhs[right.index('i')] * lhs[left.index('b')] / batch_groups
  spatial = sorted(c for c in left if c.isdigit())
  fields = {k: _window(window, k, len(spatial), d) for k, d in
            (('size', 1), ('stride', 1), ('pad', (0, 0)), ('lhs_dilate', 1), ('rhs_dilate', 1))}
  for i, axis in enumerate(spatial):
    start = (np.arange(out[result.index(axis)]) * fields['stride'][i] - fields['pad'][i][0])[:, None]
    position = start + np.arange(rhs[right.index(axis)])[None] * fields['rhs_dilate'][i]
    dilate, size = fields['lhs_dilate'][i], lhs[left.index(axis)]
    count *= ((position >= 0) & (position <= (size - 1) * dilate) & (position % dilate == 0)).sum()
  return count


def _window(window: str, field: str, axes: int, default) -> list:
  match = re.search(rf'(?:^|[{{ ]){field}=([\d_x\-]+)', window)
  if not match:
    return [default] * axes
  parts = match[1].split('x')
  return [tuple(int(n) for n in p.split('_')) for p in parts] if field == 'pad' else [int(p) for p in parts]


def _kernel(op: Op) -> Cost:
  """The cost estimate of a custom kernel. Other custom calls are XLA's helpers, which have no products."""
  if 'tpu_custom_call' not in op.attribute('custom_call_target'):
    return Cost()
  if estimate := re.search(r'"cost_estimate":\{"flops":"?(\d+)', op.attributes):
    return Cost(flops=float(estimate[1]))
  # A kernel with integer results counts or sorts, as the one before a ragged product does.
  return Cost(unknown_kernels=int(any(s.dtype[0] not in 'su' for s in op.shapes)))


def _collective(computation: Computation, op: Op, opcode: str, devices: int) -> Cost:
  """Payload: the reduced, gathered or exchanged array. Sent: the least of a device, as in a ring."""
  n = len(groups(op, devices)[0])
  operands = sum(s.bytes for s in computation.shapes_of(op))
  payload = operands * n if opcode == 'all-gather' else operands
  times = 1 if opcode == 'collective-permute' else (n - 1) / n * (2 if opcode == 'all-reduce' else 1)
  one = lambda x: collections.Counter({opcode: x})
  return Cost(calls=one(1), payload=one(payload), sent=one(payload * times))
