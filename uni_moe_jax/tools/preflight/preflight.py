"""Preflight of a config on a topology, start to end."""

import math
import time
from collections.abc import Callable
from typing import Any

import ml_collections

from uni_moe_jax.config import validate
from uni_moe_jax.config.plan import Plan
from uni_moe_jax.parallel import sharding
from uni_moe_jax.tools.preflight import compiled_programs, fit, remedy, topology
from uni_moe_jax.tools.preflight.compiled_programs import EVALUATION, Program
from uni_moe_jax.tools.preflight.compiler import Compiler
from uni_moe_jax.tools.preflight.findings import Findings
from uni_moe_jax.tools.preflight.remedy import Remedy
from uni_moe_jax.tools.preflight.topology import Topology

Config = ml_collections.ConfigDict


def preflight(
    config: Config, name: str, where: Topology, memory: float | None = None, search: bool = True,
    say: Callable[[str], None] = print, minutes: float = math.inf, started: float | None = None) -> Findings:
  """Compiles a config's programs for a topology and looks at them.

  Args:
    config: of a run. name: of it, for the report. where: what it would run on.
    memory: bytes of a device; None: those of the chip.
    search: also look for a change that fits, where the config does not, and for the largest batch: more compiles.
    say: told what is being compiled.
    minutes: the search ends before compiles that would not end in time. The config's own programs are always compiled.
    started: by `time.monotonic`, from when these minutes and the seconds that are reported count: a command began before its
      libraries were loaded. None: now.

  Raises:
    UsageError: see `programs.prepare` and `topology.devices`.
  """
  started = time.monotonic() if started is None else started
  there = topology.devices(where)
  compiler = Compiler(where, there, say, started + 60 * minutes)
  config = for_tpu(config) if where.is_tpu else config
  memory = where.chip.memory if memory is None else memory
  run = compiler.prepare(config)
  made = {which: compiler.program(run, which) for which in (*compiled_programs.steps(run), EVALUATION)}
  largest, found = None, Remedy((), config, made)
  if search and memory is not None:
    if not all(p.fits(memory) for p in made.values()):
      found = remedy.find(compiler, config, made, memory)
    worst = remedy.steps(made, memory)[0]
    largest = _largest(compiler, found.config, worst, found.programs[worst], memory)
  return Findings(
      config=name, topology=where, mesh=dict(run.mesh.shape), devices=len(there), memory=memory,
      parameters=run.parameter_counts(), assumed=_assumed(config, run.plan, run.data, where), programs=tuple(made.values()),
      seconds=time.monotonic() - started, largest=largest, trials=found.trials, had_no_time=compiler.had_no_time)


def _largest(compiler: Compiler, config: Config, task: str | None, step: Program, memory: float) -> fit.Largest:
  """The largest batch of a mixed step, or of the step of one task of a sampled mixture, with all others in proportion."""
  mesh = compiler.mesh(config)
  shards = math.prod(mesh[axis] for axis in sharding.BATCH_AXES)
  counted = [name for name, t in config.tasks.items() if t.batch_size and task in (None, name)]
  own = fit.examples(config, shards, counted)
  at = lambda n: fit.scaled(config, shards, n / own)
  return fit.largest(
      (own, step), compiler.state(config), memory, lambda n: fit.examples(at(n), shards, counted),
      lambda n: compiler.program(compiler.prepare(at(n)), task, f', with about {n} examples a device'),
      lambda: compiler.has_time([task]))


def for_tpu(config: Config) -> Config:
  """A config whose `moe.gmm` does not depend on the devices of this process, which are none of the topology's.

  On a TPU 'auto' takes the megablox kernel, which is compiled where there is one. Here XLA's own products stand for it: the same
  products on as many rows. Which ones is said where tokens are dispatched: training may have a capacity, evaluation has none.
  """
  out = config.copy_and_resolve_references()
  if config.moe.router in validate.DISPATCHED and config.moe.gmm in ('auto', 'megablox'):
    out.moe.gmm = 'xla'
  return out


def _assumed(config: Config, plan: Plan, data: Any, where: Topology) -> tuple[str, ...]:
  """What stands for data that was not read, and for programs that were not made."""
  found = [f'{s.name} {data.sets[s.name].size:,} entries' for s in plan.sets]
  frames = {t.name: config.preflight.num_frames.get(t.name, t.num_frames or 1) for t in plan.tasks if t.type.visual}
  clips = [f'{name} {n} frames' for name, n in frames.items() if n > 1]
  grouped = [f'grouped products as {config.moe.gmm}'] if config.moe.router in validate.DISPATCHED else []
  captions = ['the search for captions is not compiled'] if any(e.type == 'caption' for e in plan.evaluations) else []
  sizes = ['sizes of programs by their fusions'] if where.is_tpu else []
  return tuple(found + clips + grouped + captions + sizes)
