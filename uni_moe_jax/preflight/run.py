"""Preflight of a config on a topology, start to end."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from uni_moe_jax import resolve, sharding
from uni_moe_jax.plan import Plan
from uni_moe_jax.preflight import changes, fit, programs, topology
from uni_moe_jax.preflight.changes import Trial
from uni_moe_jax.preflight.programs import Program
from uni_moe_jax.preflight.report import Findings
from uni_moe_jax.preflight.topology import Topology
from uni_moe_jax.train.setup import Run

Config = ml_collections.ConfigDict
Say = Callable[[str], None]


class _Compiler:
  """Compiles programs of configs for the devices, says so, and knows whether there is time for another one."""

  def __init__(self, devices: Sequence[Any], say: Say, minutes: float):
    self._devices, self._say, self._end = devices, say, time.monotonic() + 60 * minutes
    self._last, self.had_no_time = 0.0, False

  def step(self, run: Run, task: str | None, words: str) -> Program:
    self._say(f'compiling {words}{f": {task}" if task else ""}')
    return self._kept(programs.train_step(run, task))

  def evaluation(self, run: Run, words: str) -> Program:
    self._say(f'compiling {words}')
    return self._kept(programs.evaluation(run))

  def _kept(self, program: Program) -> Program:
    self._last = program.seconds
    return program

  def has_time(self) -> bool:
    """Whether a compile that takes as long as the last one would end in time."""
    self.had_no_time = self.had_no_time or time.monotonic() + self._last > self._end
    return not self.had_no_time

  def prepare(self, config: Config) -> Run:
    return programs.prepare(config, self._devices)

  def mesh(self, config: Config) -> dict[str, int]:
    return sharding.mesh_shape({axis: config.mesh[axis] for axis in sharding.AXES}, len(self._devices))

  def state(self, config: Config) -> float:
    return sum(programs.state_bytes(self.prepare(config)))


def preflight(
    config: Config, name: str, where: Topology, memory: float | None = None, search: bool = True, say: Say = print,
    minutes: float = math.inf) -> Findings:
  """Compiles a config's programs for a topology and looks at them.

  Args:
    config: of a run. name: of it, for the report. where: what it would run on.
    memory: bytes of a device; None: those of the chip.
    search: also look for a change that fits, where the config does not, and for the largest batch: more compiles.
    say: told what is being compiled.
    minutes: the search ends before a compile that would not end in time. The config's own programs are always compiled.

  Raises:
    ValueError: see `programs.prepare` and `topology.devices`.
  """
  there = topology.devices(where)
  compiler = _Compiler(there, say, minutes)
  config = for_tpu(config) if where.is_tpu else config
  memory = where.chip.memory if memory is None else memory
  run = compiler.prepare(config)
  evaluated = compiler.evaluation(run, 'evaluation')  # first: how long the last one took tells how long the next step will
  steps = {task: compiler.step(run, task, 'the training step') for task in programs.steps(run)}
  largest, trials = None, []
  if search and memory is not None:
    worst = max(steps, key=lambda task: _size(steps[task]))
    step, changed = steps[worst], config
    if not step.fits(memory):
      again = lambda run, words: compiler.step(run, worst, words)
      trials, changed, step = _changed(compiler, config, step, again, memory, evaluation=False)
    elif not evaluated.fits(memory):
      trials, *_ = _changed(compiler, config, evaluated, compiler.evaluation, memory, evaluation=True)
    largest = _largest(compiler, changed, worst, step, memory)
  return Findings(
      config=name, topology=where, mesh=dict(run.mesh.shape), devices=len(there), memory=memory,
      parameters=run.parameter_counts(), assumed=_assumed(config, run.plan, run.data), programs=(*steps.values(), evaluated),
      largest=largest, trials=tuple(trials), had_no_time=compiler.had_no_time)


def _changed(
    compiler: _Compiler, config: Config, program: Program, again: Callable[[Run, str], Program], memory: float,
    evaluation: bool) -> tuple[list[Trial], Config, Program]:
  """(what was tried, the config that fits and its program, or those that were given)."""
  last = [program]

  def attempt(changed: Config) -> tuple[bool, float | None]:
    last.append(again(compiler.prepare(changed), 'a change'))
    return last[-1].fits(memory), last[-1].needs

  trials = changes.cheapest(
      config, program.needs, compiler.mesh, compiler.state, memory, attempt, evaluation, compiler.has_time)
  if not (trials and trials[-1].fits):
    return trials, config, program
  for change in trials[-1].changes:
    config = change.apply(config)
  return trials, config, last[-1]


def _largest(compiler: _Compiler, config: Config, task: str | None, step: Program, memory: float) -> fit.Largest:
  """The largest batch of a mixed step, or of the step of one task of a sampled mixture, with all others in proportion."""
  mesh = compiler.mesh(config)
  shards = math.prod(mesh[axis] for axis in sharding.BATCH_AXES)
  counted = [name for name, t in config.tasks.items() if t.batch and task in (None, name)]
  own = fit.examples(config, shards, counted)
  at = lambda n: fit.scaled(config, shards, n / own)
  return fit.largest(
      (own, step), compiler.state(config), memory, lambda n: fit.examples(at(n), shards, counted),
      lambda n: compiler.step(compiler.prepare(at(n)), task, f'a batch of about {n} examples a device'), compiler.has_time)


def for_tpu(config: Config) -> Config:
  """A config whose `moe.grouped` does not depend on the devices of this process, which are none of the topology's.

  On a TPU 'auto' takes the megablox kernel, which is compiled where there is one. Here XLA's own products stand for it: the same
  products on as many rows. Which ones is said where tokens are dispatched: training may have a capacity, evaluation has none.
  """
  out = config.copy_and_resolve_references()
  if config.moe.router in resolve.DISPATCHED and config.moe.grouped in ('auto', 'megablox'):
    out.moe.grouped = 'xla'
  return out


def _size(p: Program) -> float:
  return float('inf') if p.memory is None else p.memory.total


def _assumed(config: Config, plan: Plan, data: Any) -> tuple[str, ...]:
  """What stands for data that was not read."""
  found = [f'{s.name} {data.sets[s.name].size:,} entries' for s in plan.sets]
  frames = {t.name: config.declared.frames.get(t.name, t.frames or 1) for t in plan.tasks if t.kind.visual}
  clips = [f'{name} {n} frames' for name, n in frames.items() if n > 1]
  grouped = [f'grouped products as {config.moe.grouped}'] if config.moe.router in resolve.DISPATCHED else []
  return tuple(found + clips + grouped)
