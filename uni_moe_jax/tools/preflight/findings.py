"""What preflight found, for a person and as JSON."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from uni_moe_jax.tools.preflight import changes
from uni_moe_jax.tools.preflight.changes import Trial
from uni_moe_jax.tools.preflight.compiled_programs import Program
from uni_moe_jax.tools.preflight.fit import Largest
from uni_moe_jax.tools.preflight.roofline import Roofline, roofline
from uni_moe_jax.tools.preflight.topology import GIB, Topology


@dataclasses.dataclass(frozen=True)
class Findings:
  """Everything.

  Attributes:
    config: what was looked at, in words. topology, mesh, devices: what it would run on. memory: bytes of a device, or None.
    parameters: {'total', 'active'}. assumed: what was taken for granted about data that was not read.
    programs: the training steps, and evaluation last. seconds: that all of it took.
    largest: None where it was not asked for, or nothing is known of the device.
    trials: what was tried because a program does not fit; if the last one fits, all do, and `largest` is of the config so changed.
    had_no_time: the search had no time for another compile.
  """
  config: str
  topology: Topology
  mesh: dict[str, int]
  devices: int
  memory: float | None
  parameters: dict[str, int]
  assumed: tuple[str, ...]
  programs: tuple[Program, ...]
  seconds: float
  largest: Largest | None = None
  trials: tuple[Trial, ...] = ()
  had_no_time: bool = False

  @property
  def fits(self) -> bool | None:
    """Whether every program fits; None where nothing is known of the device."""
    return None if self.memory is None else all(p.fits(self.memory) for p in self.programs)


def as_json(f: Findings) -> dict[str, Any]:
  """The same as a tree of plain values; bytes, FLOPs and seconds."""
  return {
      'config': f.config, 'topology': f.topology.name, 'mesh': f.mesh, 'devices': f.devices,
      'chip': dataclasses.asdict(f.topology.chip), 'device_memory': f.memory, 'parameters': f.parameters,
      'assumed': list(f.assumed), 'fits': f.fits, 'programs': [_program(f, p) for p in f.programs],
      'largest_batch': f.largest and {
          'per_device': f.largest.examples, 'does_not_fit': f.largest.too_large, 'estimate': f.largest.estimate,
          'tried': [{'per_device': n, 'bytes': b} for n, b in f.largest.tried]},
      'had_no_time': f.had_no_time, 'seconds': f.seconds,
      'changes': [{'flags': _flags(t), 'costs': [c.costs for c in t.changes], 'fits': t.fits, 'lacks': t.lacks, 'bytes': t.needs}
                  for t in f.trials],
  }


def _program(f: Findings, p: Program) -> dict[str, Any]:
  limit = _roofline(f, p)
  return {
      'name': p.name, 'examples': p.examples, 'fits': None if f.memory is None else p.fits(f.memory), 'bytes': p.needs,
      'memory': p.memory and dataclasses.asdict(p.memory), 'compile_seconds': p.seconds,
      'flops_per_device': p.cost and p.cost.flops, 'flops': p.cost and p.cost.flops * f.devices,
      'flops_per_example': p.cost and p.cost.flops * f.devices / p.examples, 'memory_traffic': p.cost and p.cost.bytes,
      'collectives': p.cost and {k: {'calls': p.cost.calls[k], 'payload': p.cost.payload[k], 'sent': p.cost.sent[k]}
                                 for k in sorted(p.cost.calls)},
      'unknown_loops': p.cost and p.cost.unknown_loops, 'unknown_kernels': p.cost and p.cost.unknown_kernels,
      'roofline': limit and {**dataclasses.asdict(limit), 'seconds': limit.seconds, 'bound': limit.bound}}


def _roofline(f: Findings, p: Program) -> Roofline | None:
  return roofline(p.cost, f.topology.chip) if p.cost else None


def _flags(t: Trial) -> str:
  return changes.typed(field for c in t.changes for field in c.fields)


def render(f: Findings) -> str:
  """For a person."""
  mesh = ', '.join(f'{a} {n}' for a, n in f.mesh.items() if n > 1) or 'one device'
  lines = [f'{f.config} on {f.topology.name}: {f.devices} devices ({mesh})',
           f'parameters: {f.parameters["total"]:,} total, {f.parameters["active"]:,} used per token']
  lines += [f'assumed: {"; ".join(f.assumed)}'] if f.assumed else []
  for p in f.programs:
    lines += ['', *_about(f, p)]
  if f.trials:
    lines += ['', *_about_trials(f)]
  if f.largest:
    lines += ['', *_about_largest(f)]
  if f.had_no_time:
    lines += ['The search ended here: another compile would not have ended in time (--time_budget).']
  lines += ['', f'It took {f.seconds:.0f} s.']
  if f.topology.chip.source:
    lines += ['', f'Peaks of the chip: {f.topology.chip.source}']
  return '\n'.join(lines)


def _about(f: Findings, p: Program) -> Iterable[str]:
  yield f'{p.name}: {p.examples:,} examples a call; compiled in {p.seconds:.0f} s'
  of = '' if f.memory is None else f' of {_gib(f.memory)}: {"fits" if p.fits(f.memory) else "DOES NOT FIT"}'
  if p.memory is None:
    yield f'  bytes per device: {"unknown" if p.needs is None else _gib(p.needs)}{of}; the compiler gave up'
    return
  m = p.memory
  parts = {'parameters': m.params, 'optimizer': m.optimizer, 'batch and sets': m.inputs, 'results': m.results,
           'temporaries': m.temporaries, 'program': m.code}
  yield f'  bytes per device: {_gib(m.total)}{of}'
  yield '    ' + ', '.join(f'{name} {_gib(size)}' for name, size in parts.items() if size >= 2**20)
  yield (f'  FLOPs: {_si(p.cost.flops * f.devices)} a call, {_si(p.cost.flops * f.devices / p.examples)} per example, '
         f'{_si(p.cost.flops)} per device; memory traffic {_gib(p.cost.bytes)} per device')
  for kind in sorted(p.cost.calls):
    yield (f'  {kind}: {p.cost.calls[kind]:,} calls about {_gib(p.cost.payload[kind])}; a device sends '
           f'{_gib(p.cost.sent[kind])}')
  limit = _roofline(f, p)
  if limit:
    yield (f'  roofline: {1e3 * limit.seconds:.1f} ms, bound by {limit.bound} (compute {1e3 * limit.compute:.1f}, memory '
           f'{1e3 * limit.memory:.1f}, interconnect {1e3 * limit.interconnect:.1f} ms)')
  if p.cost.unknown_loops:
    yield f'  {p.cost.unknown_loops} loops do not say how often they run: their bodies are counted once'
  if p.cost.unknown_kernels:
    yield f'  {p.cost.unknown_kernels} custom kernels do not say what they do: their FLOPs are not counted'


def _about_largest(f: Findings) -> Iterable[str]:
  found = f.largest
  tried = ', '.join(f'{n} ({"too large" if b is None else _gib(b)})' for n, b in found.tried)
  what = 'largest batch of a device, so changed' if f.trials and f.trials[-1].fits else 'largest batch of a device'
  if not found.examples:
    yield f'{what}: none that was tried fits; tried {tried}'
    return
  then = f'; {found.too_large} does not' if found.too_large else ''
  full = f'; memory would be full at about {found.estimate:.0f}' if found.estimate else ''
  yield f'{what}, that was compiled and fits: {found.examples} examples{then}{full}'
  yield f'  tried: {tried}'


def _about_trials(f: Findings) -> Iterable[str]:
  yield 'tried, because it does not fit:'
  for t in f.trials:
    verdict = 'fits' if t.fits else f'{t.lacks} does not fit'
    yield (f'  {_flags(t)}: {"unknown bytes" if t.needs is None else _gib(t.needs)}, {verdict} '
           f'({"; ".join(c.costs for c in t.changes)})')
  if not f.trials[-1].fits:
    yield 'Nothing that was tried fits: ' + ('give it more minutes, or more devices.' if f.had_no_time else 'use more devices.')
    return
  yield f'Change this: {_flags(f.trials[-1])}'


def _gib(size: float) -> str:
  return f'{size / GIB:.2f} GiB' if size >= GIB / 10 else f'{size / 2**20:.1f} MiB'


def _si(x: float) -> str:
  for unit, size in (('P', 1e15), ('T', 1e12), ('G', 1e9)):
    if x >= size:
      return f'{x / size:.2f} {unit}FLOP'
  return f'{x / 1e6:.2f} MFLOP'
