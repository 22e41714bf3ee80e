"""FLOPs, memory traffic, collectives and roofline of a compiled program on one device.

A loop body counts as often as the loop runs.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.preflight.hlo import Computation, Module, Op, Shape, groups, integers, trip_count
from uni_moe_jax.preflight.topology import Chip

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'ragged-all-to-all',
               'collective-broadcast')
# They move no bytes, or their bytes count where they are used.
_FREE = frozenset((
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all',
    'iota', 'partition-id', 'replica-id', 'opt-barrier', 'add-dependency', 'domain', 'async-update',
    'get-dimension-size'))
_WRAPPERS = ('while', 'body', 'closed_call', 'checkpoint', 'rematted_computation')  # in names: of JAX, not of the model
_SLICES = ('dynamic-slice', 'slice', 'gather')
_PASSES = {'high': 3, 'highest': 6}  # bfloat16 products of a TPU for one of float32 operands, by precision; default: 1


@dataclasses.dataclass(frozen=True)
class Cost:
  """Cost on one device; `calls`, `payload` and `sent` are of collectives, by opcode."""
  flops: float = 0.0  # of matrix products, and of kernels with a cost estimate; multiply and add count as two
  bfloat16_flops: float = 0.0  # the same, of the bfloat16 products by which a TPU computes them
  bytes: float = 0.0  # read from and written to the device memory
  moved: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # of `bytes`, by `_label`
  calls: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  payload: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # bytes of their arrays
  sent: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # bytes, at least
  unknown_loops: int = 0  # loops with an unknown trip count; their bodies count once
  unknown_kernels: int = 0  # custom kernels without a cost estimate; their FLOPs are not counted

  @classmethod
  def sum(cls, costs: Iterable['Cost'], times: int = 1) -> 'Cost':
    """Return `times` the sum of costs; unknown loops and kernels are added once."""
    total: dict[str, Any] = dict(vars(cls()))
    for one in costs:
      for name, value in vars(one).items():
        if isinstance(value, dict):
          for key, amount in value.items():
            total[name][key] += times * amount
        else:
          total[name] += value if name.startswith('unknown') else times * value
    return cls(**total)

  def plus(self, other: 'Cost') -> 'Cost':
    """Return the sum of two costs."""
    return self.sum((self, other))


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds that one device needs for each resource at its peak."""
  compute: float
  memory: float
  interconnect: float

  @property
  def seconds(self) -> float:
    """Of the program, if the three overlap perfectly."""
    return getattr(self, self.bound)

  @property
  def bound(self) -> str:
    """The limiting resource."""
    return max(('compute', 'memory', 'interconnect'), key=lambda name: getattr(self, name))


def roofline(cost: Cost | None, chip: Chip) -> Roofline | None:
  """Return the roofline of a cost per device; None if the cost or the peaks of the chip are unknown."""
  if cost is None or chip.flops is None:
    return None
  return Roofline(cost.bfloat16_flops / chip.flops, cost.bytes / chip.hbm, sum(cost.sent.values()) / chip.links)


def of_module(module: Module) -> Cost:
  """Return the cost of a program."""
  # A collective that overlaps with products occurs, with one channel, in the fusion that starts it, in those that it
  # runs through, and in the one that ends it.
  channels: set[str] = set()

  @functools.cache
  def of_computation(name: str, fused: bool) -> Cost:
    """fused: values stay in registers, so only products count."""
    computation = module[name]
    return Cost.sum(of_op(computation, op, fused) for op in computation.ops.values())

  def of_op(computation: Computation, op: Op, fused: bool) -> Cost:
    opcode, collective = op.opcode, op.opcode.removesuffix('-start')
    if opcode.endswith('-done'):
      return Cost()
    if opcode == 'while':
      times = trip_count(module, computation, op)
      body, condition = (of_computation(name, fused) for name in op.called('body', 'condition'))
      return Cost.sum((body, condition), 1 if times is None else times).plus(Cost(unknown_loops=times is None))
    if opcode == 'conditional':
      branches = op.called('branch_computations', 'true_computation', 'false_computation')
      return max((of_computation(b, fused) for b in branches), key=lambda c: (c.flops, c.bytes))
    if opcode in ('call', 'async-start'):
      return of_computation(op.called('to_apply', 'calls')[0], fused)
    if opcode == 'custom-call' and '"AllocateBuffer"' in op.attributes:
      return Cost()
    if opcode == 'fusion':
      [inner] = op.called('calls')
      moved = 0.0 if fused else _fusion_traffic(module, computation, op)
      return of_computation(inner, True).plus(_moves(computation, op, moved))
    work = _WORK.get(opcode, lambda *_: Cost())(computation, op)
    if collective in COLLECTIVES:
      work = _collective(computation, op, collective, module.devices)
      if fused and (channel := op.attribute('channel_id')):
        if channel in channels:
          return Cost()
        channels.add(channel)
        return work.plus(_moves(computation, op, _traffic(computation, op)))
    return work.plus(_moves(computation, op, 0.0 if fused or opcode in _FREE else _traffic(computation, op)))

  return of_computation(module.entry, False)


def _moves(computation: Computation, op: Op, moved: float) -> Cost:
  """The cost of bytes that an instruction moves."""
  return Cost(bytes=moved, moved=collections.Counter({_label(computation, op): moved} if moved else {}))


def _label(computation: Computation, op: Op) -> str:
  """Where an instruction is in the model, in which pass, and the largest array that it reads or writes.

  A fusion has the name of one of its instructions; copies that XLA adds have none.
  """
  metadata = re.search(r'op_name="([^"]*)"', op.attributes)
  path = metadata[1] if metadata else ''
  passes = {'rematted_computation': ', recomputed', 'transpose(': ', backward', 'jvp(': ', forward'}
  which = next((text for mark, text in passes.items() if mark in path), '')
  parts = dict.fromkeys(p for p in path.split('/') if re.fullmatch(r'[a-z][\w.\-]*', p) and '._' not in p)
  name = '/'.join(p for p in parts if p not in _WRAPPERS) or op.opcode
  largest = max((*op.shapes, *computation.shapes_of(op)), key=lambda s: s.bytes, default=None)
  return f'{name}{which}' + (f', {largest.dtype}[{",".join(map(str, largest.dims))}]' if largest else '')


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


def _fusion_traffic(module: Module, computation: Computation, op: Op) -> float:
  """An operand that is only sliced counts as its slices, a result that is updated in place as its update.

  Operands that are returned stay where they are, and a collective that overlaps with the fusion counts by itself.
  """
  inner = module[op.called('calls')[0]]
  moved = 0.0
  for i, name in enumerate(op.operands):
    shapes, parts = computation.ops[name].shapes if name in computation.ops else (), _slices(module, inner, i)
    moved += _bytes_in_memory(shapes) if parts is None else _part_traffic(shapes, parts)
  root = inner.ops[inner.root]
  results = [inner.ops[n] for n in root.operands] if root.opcode == 'tuple' else [root]
  for result, shape in zip(results, op.shapes):
    while result.opcode in ('bitcast', 'copy', 'convert') and result.operands[0] in inner.ops:
      result = inner.ops[result.operands[0]]
    if result.opcode == 'parameter' or result.opcode in COLLECTIVES:
      continue
    updated = result.opcode == 'dynamic-update-slice'
    moved += _part_traffic([shape], inner.ops[result.operands[1]].shapes if updated else [shape])
  return moved


def _slices(module: Module, fused: Computation, index: int) -> list[Shape] | None:
  """The slices by which alone a fusion, or one within it, reads a parameter; None: it reads the whole array."""
  def of_array(name: str) -> list[Shape] | None:
    if name == fused.root:
      return None
    parts = []
    uses = [(user, i) for user in fused.ops.values() for i, operand in enumerate(user.operands) if operand == name]
    for user, i in uses:
      if user.opcode == 'fusion':
        part = _slices(module, module[user.called('calls')[0]], i)
      elif user.opcode == 'bitcast':
        part = of_array(user.name)
      else:
        part = list(user.shapes) if user.opcode in _SLICES and i == 0 else None
        if user.opcode == 'dynamic-update-slice' and i == 0 or user.opcode in ('tuple', *COLLECTIVES):  # in place
          part = []
      if part is None:
        return None
      parts += part
    return parts

  [parameter] = (o.name for o in fused.ops.values() if o.opcode == 'parameter' and int(o.literal) == index)
  return of_array(parameter)


def _part_traffic(array: Sequence[Shape], part: Sequence[Shape]) -> float:
  """Bytes of a part of an array, if the array is in memory."""
  return sum(s.bytes for s in part) if any(s.in_memory for s in array) else 0.0


def _dot(computation: Computation, op: Op) -> Cost:
  left = computation.ops[op.operands[0]].shapes[0].dims
  contracted = integers(op.attribute('lhs_contracting_dims'))
  return _product(computation, op, 2.0 * math.prod(op.shapes[0].dims) * math.prod(left[i] for i in contracted))


def _product(computation: Computation, op: Op, flops: float) -> Cost:
  """The cost of a product of arrays; of float32 ones, the program names a precision above the default."""
  is_float32 = all(computation.ops[name].shapes[0].dtype == 'f32' for name in op.operands[:2])
  precisions = re.findall(r'\w+', op.attribute('operand_precision')) if is_float32 else []
  return Cost(flops, flops * max((_PASSES.get(p, 1) for p in precisions), default=1))


def _convolution(computation: Computation, op: Op) -> Cost:
  """FLOPs without padding and the gaps of a dilation.

  TPU programs express matrix products as convolutions, with batch axes as windows over dilated axes.
  """
  sides, result = op.attribute('dim_labels').split('->')
  left, right = sides.split('_')
  lhs, rhs = (computation.ops[n].shapes[0].dims for n in op.operands[:2])
  out, axes = op.shapes[0].dims, sorted(c for c in left if c.isdigit())
  batch_groups = int(op.attribute('batch_group_count') or 1)
  count = 2.0 * out[result.index('f')] * rhs[right.index('i')] * lhs[left.index('b')] / batch_groups

  def window(field: str, default: int) -> list[int]:
    match = re.search(rf'\b{field}=([\d_x\-]+)', op.attribute('window'))
    return [int(n.partition('_')[0]) for n in match[1].split('x')] if match else [default] * len(axes)

  fields = window('stride', 1), window('pad', 0), window('lhs_dilate', 1), window('rhs_dilate', 1)
  for axis, stride, pad, lhs_dilate, rhs_dilate in zip(axes, *fields):
    start = (np.arange(out[result.index(axis)]) * stride - pad)[:, None]
    position = start + np.arange(rhs[right.index(axis)])[None] * rhs_dilate
    last = (lhs[left.index(axis)] - 1) * lhs_dilate
    count *= ((position >= 0) & (position <= last) & (position % lhs_dilate == 0)).sum()
  return _product(computation, op, count)


def _kernel(computation: Computation, op: Op) -> Cost:
  """The cost estimate of a custom kernel. Other custom calls are XLA's helpers, which have no products."""
  if 'tpu_custom_call' not in op.attribute('custom_call_target'):
    return Cost()
  if splash := re.search(r'/splash_mha_(fwd|dq|dkv)_', op.attributes):
    flops = _attention_flops(computation, op, splash[1])
    return Cost(flops, flops)
  if estimate := re.search(r'"cost_estimate":\{"flops":"?(\d+)', op.attributes):
    flops = float(estimate[1])
    return Cost(flops, flops)
  # A kernel with integer results counts or sorts, as the one before a ragged product does.
  return Cost(unknown_kernels=int(any(s.dtype[0] not in 'su' for s in op.shapes)))


def _attention_flops(computation: Computation, op: Op, part: str) -> float:
  """FLOPs of splash attention, which has no cost estimate. Each product is over all queries, keys and a head's size.

  Forward, these are q kᵀ and the weights times v; backward, q kᵀ and dy vᵀ, and one per gradient.
  """
  q, k, *_ = (s.dims for s in computation.shapes_of(op) if s.dtype[0] not in 'su')  # [B, N, Q, H], [B, N, K, H]
  products = {'fwd': 2, 'dq': 3, 'dkv': 4}[part]
  if part == 'dkv' and any(len(s.dims) > len(q) for s in op.shapes):  # dq as well, an array for every block of keys
    products += 1
  return 2.0 * products * math.prod(q) * k[-2]


_WORK = {'dot': _dot, 'convolution': _convolution, 'custom-call': _kernel}


def _collective(computation: Computation, op: Op, opcode: str, devices: int) -> Cost:
  """Payload: the reduced, gathered or exchanged array. Sent: the least of a device, as in a ring."""
  n = len(groups(op, devices)[0])
  operands = sum(s.bytes for s in computation.shapes_of(op))
  payload = operands * n if opcode == 'all-gather' else operands
  times = 1 if opcode == 'collective-permute' else (n - 1) / n * (2 if opcode == 'all-reduce' else 1)
  one = lambda x: collections.Counter({opcode: x})
  return Cost(calls=one(1), payload=one(payload), sent=one(payload * times))
