"""Results of a preflight, as text and as JSON."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from uni_moe_jax.preflight.compiled_programs import Program
from uni_moe_jax.preflight.cost import Roofline, roofline
from uni_moe_jax.preflight.remedies import Comparison, Trial, as_flags
from uni_moe_jax.preflight.topology import GIB, Topology

_MOST_MOVING = 10  # places that are reported


@dataclasses.dataclass(frozen=True)
class BatchEstimate:
  """Examples per device and micro-step that fill the memory, by a line through what was compiled."""
  examples: float
  compiled: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Findings:
  """Results of a preflight."""
  config: str  # its name
  topology: Topology
  mesh: dict[str, int]
  devices: int
  memory: float | None  # bytes per device, if known
  parameters: dict[str, int]  # 'total', 'active'
  assumptions: tuple[str, ...]  # about data that was not read
  programs: tuple[Program, ...]  # the training steps, then evaluation
  seconds: float
  largest_batch: BatchEstimate | None = None  # None without a search, an estimate, or a known device memory
  trials: tuple[Trial, ...] = ()  # because a program does not fit; if the last one fits, it is the remedy
  comparison: Comparison | None = None  # memory traffic bounds a step, and a change may lower it
  out_of_time: bool = False  # the search had no time for another compile

  @property
  def fits(self) -> bool | None:
    """Whether every program fits; None if the device memory is unknown."""
    return None if self.memory is None else all(p.fits(self.memory) for p in self.programs)


def as_json(f: Findings) -> dict[str, Any]:
  """Return the findings as plain values, in bytes, FLOPs and seconds."""
  return {
      'config': f.config, 'topology': f.topology.name, 'mesh': f.mesh, 'devices': f.devices,
      'chip': dataclasses.asdict(f.topology.chip), 'device_memory': f.memory, 'parameters': f.parameters,
      'assumptions': list(f.assumptions), 'fits': f.fits, 'programs': [_program_json(f, p) for p in f.programs],
      'largest_batch': f.largest_batch and {
          'per_device': f.largest_batch.examples,
          'compiled': [{'per_device': n, 'bytes': b} for n, b in f.largest_batch.compiled]},
      'trials': [{'flags': t.flags, 'costs': [c.cost for c in t.changes], 'fits': t.fits, 'too_large': t.too_large,
                  'bytes': t.needs} for t in f.trials],
      'comparison': f.comparison and {
          'step': f.comparison.step, 'flags': as_flags(f.comparison.change.fields.items()),
          'before': _roofline_json(f.comparison.before), 'after': _roofline_json(f.comparison.after)},
      'out_of_time': f.out_of_time, 'seconds': f.seconds}


def _roofline_json(limit: Roofline) -> dict[str, Any]:
  return {**dataclasses.asdict(limit), 'seconds': limit.seconds, 'bound': limit.bound}


def _program_json(f: Findings, p: Program) -> dict[str, Any]:
  limit = roofline(p.cost, f.topology.chip)
  return {
      'name': p.name, 'examples': p.examples, 'fits': None if f.memory is None else p.fits(f.memory), 'bytes': p.needs,
      'memory': p.memory and dataclasses.asdict(p.memory), 'compile_seconds': p.seconds,
      'flops_per_device': p.cost and p.cost.flops, 'flops': p.cost and p.cost.flops * f.devices,
      'flops_per_example': p.cost and p.cost.flops * f.devices / p.examples, 'memory_traffic': p.cost and p.cost.bytes,
      'largest_traffic': p.cost and p.cost.moved.most_common(_MOST_MOVING),
      'collectives': p.cost and {k: {'calls': p.cost.calls[k], 'payload': p.cost.payload[k], 'sent': p.cost.sent[k]}
                                 for k in sorted(p.cost.calls)},
      'unknown_loops': p.cost and p.cost.unknown_loops, 'unknown_kernels': p.cost and p.cost.unknown_kernels,
      'roofline': limit and _roofline_json(limit)}


def render(f: Findings) -> str:
  """Return the findings as text."""
  mesh = ', '.join(f'{a} {n}' for a, n in f.mesh.items() if n > 1) or 'one device'
  lines = [f'{f.config} on {f.topology.name}: {f.devices} devices ({mesh})',
           f'parameters: {f.parameters["total"]:,} total, {f.parameters["active"]:,} active']
  lines += [f'assumptions: {"; ".join(f.assumptions)}'] if f.assumptions else []
  for p in f.programs:
    lines += ['', *_program_lines(f, p)]
  if f.trials:
    lines += ['', *_trial_lines(f)]
  if c := f.comparison:
    seconds = f'{1e3 * c.after.seconds:.1f} instead of {1e3 * c.before.seconds:.1f} ms'
    lines += ['', f'Memory traffic bounds {c.step}. With {as_flags(c.change.fields.items())} its roofline is {seconds} '
              f'({c.change.cost}).']
  if f.largest_batch:
    points = ' and '.join(f'{n} ({_gib(b)})' for n, b in f.largest_batch.compiled)
    estimate = f'about {f.largest_batch.examples:.0f} examples, by a straight line through {points}'
    lines += ['', f'largest batch per device: {estimate}']
  if f.out_of_time:
    lines += ['The search ended: another compile would have exceeded --time_budget.']
  lines += ['', f'Preflight took {f.seconds:.0f} s.']
  if f.topology.chip.source:
    lines += ['', f'Peaks of the chip: {f.topology.chip.source}']
  return '\n'.join(lines)


def _program_lines(f: Findings, p: Program) -> Iterable[str]:
  yield f'{p.name}: {p.examples:,} examples per call; compiled in {p.seconds:.0f} s'
  verdict = '' if f.memory is None else f' of {_gib(f.memory)}: {"fits" if p.fits(f.memory) else "DOES NOT FIT"}'
  if p.memory is None:
    yield f'  bytes per device: {_gib(p.needs)}{verdict}; refused by the compiler'
    return
  m = p.memory
  parts = {'parameters': m.params, 'optimizer': m.optimizer, 'batch and target sets': m.inputs, 'results': m.results,
           'temporaries': m.temporaries, 'program': m.code}
  yield f'  bytes per device: {_gib(m.total)}{verdict}'
  yield '    ' + ', '.join(f'{name} {_gib(size)}' for name, size in parts.items() if size >= 2**20)
  flops = p.cost.flops * f.devices
  yield (f'  FLOPs: {_flop(flops)} per call, {_flop(flops / p.examples)} per example, {_flop(p.cost.flops)} per '
         f'device; memory traffic {_gib(p.cost.bytes)} per device')
  for name in sorted(p.cost.calls):
    yield (f'  {name}: {p.cost.calls[name]:,} calls with {_gib(p.cost.payload[name])}; a device sends '
           f'{_gib(p.cost.sent[name])}')
  if limit := roofline(p.cost, f.topology.chip):
    yield (f'  roofline: {1e3 * limit.seconds:.1f} ms, bound by {limit.bound} (compute {1e3 * limit.compute:.1f}, '
           f'memory {1e3 * limit.memory:.1f}, interconnect {1e3 * limit.interconnect:.1f} ms)')
  if p.cost.moved:
    yield '  what moves most, of a device:'
  for label, moved in p.cost.moved.most_common(_MOST_MOVING):
    yield f'    {_gib(moved)} ({moved / p.cost.bytes:.1%}) {label}'
  if p.cost.unknown_loops:
    yield f'  {p.cost.unknown_loops} loops have unknown trip counts: their bodies count once'
  if p.cost.unknown_kernels:
    yield f'  {p.cost.unknown_kernels} custom kernels have no cost estimate: their FLOPs are not counted'


def _trial_lines(f: Findings) -> Iterable[str]:
  yield 'tried, because the config does not fit:'
  for t in f.trials:
    needs, verdict = _gib(t.needs, 'unknown bytes'), 'fits' if t.fits else f'{t.too_large} does not fit'
    yield f'  {t.flags}: {needs}, {verdict} ({"; ".join(c.cost for c in t.changes)})'
  fix = 'a larger --time_budget or more devices' if f.out_of_time else 'more devices'
  yield f'Change this: {f.trials[-1].flags}' if f.trials[-1].fits else f'No trial fits: use {fix}.'


def _gib(size: float | None, unknown: str = 'unknown') -> str:
  if size is None:
    return unknown
  return f'{size / GIB:.2f} GiB' if size >= GIB / 10 else f'{size / 2**20:.1f} MiB'


def _flop(x: float) -> str:
  unit, size = next(((u, n) for u, n in (('P', 1e15), ('T', 1e12), ('G', 1e9)) if x >= n), ('M', 1e6))
  return f'{x / size:.2f} {unit}FLOP'
