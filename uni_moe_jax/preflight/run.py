"""Preflight of a config on a topology, start to end."""

from collections.abc import Callable
from typing import Any

import ml_collections

from uni_moe_jax import resolve, sharding
from uni_moe_jax.plan import Plan
from uni_moe_jax.preflight import changes, fit, programs, topology
from uni_moe_jax.preflight.programs import Program
from uni_moe_jax.preflight.report import Findings
from uni_moe_jax.preflight.topology import Topology

Say = Callable[[str], None]


def preflight(
    config: ml_collections.ConfigDict, name: str, where: Topology, memory: float | None = None, search: bool = True,
    say: Say = print) -> Findings:
  """Compiles a config's programs for a topology and looks at them.

  Args:
    config: of a run. name: of it, for the report. where: what it would run on.
    memory: bytes of a device; None: those of the chip.
    search: also look for the largest batch and, where the training step does not fit, for a change that fits: more compiles.
    say: told what is being compiled.

  Raises:
    ValueError: see `programs.prepare` and `topology.devices`.
  """
  there = topology.devices(where)
  config = for_tpu(config) if where.is_tpu else config
  memory = where.chip.device.memory if memory is None else memory

  def compiled(c: ml_collections.ConfigDict, words: str) -> tuple[Any, list[Program]]:
    run = programs.prepare(c, there)
    found = []
    for task in programs.steps(run):
      say(f'compiling {words}{f": {task}" if task else ""}')
      found.append(programs.train_step(run, task))
    return run, found

  run, steps = compiled(config, 'the training step')
  worst = max(steps, key=_size)
  say('compiling evaluation')
  evaluated = programs.evaluation(run)
  largest, trials = None, ()
  if search and memory is not None:
    at = lambda c, words: max(compiled(c, words)[1], key=_size)
    if not worst.fits(memory):
      trials = changes.cheapest(
          config, worst.needs, lambda c: _mesh(c, len(there)), lambda c: sum(programs.state_bytes(programs.prepare(c, there))),
          memory, lambda c: _verdict(at(c, 'a change'), memory))
    elif not trials:
      own, unit = fit.scale_of(config, sharding.batch_shards(run.mesh))
      largest = fit.largest((own, worst), unit, sum(programs.state_bytes(run)), memory,
                            lambda scale: at(fit.scaled(config, own, scale), f'batches of {scale * unit} a device'))
  return Findings(
      config=name, topology=where, mesh=dict(run.mesh.shape), devices=len(there), memory=memory,
      parameters=run.parameter_counts(), assumed=_assumed(config, run.plan, run.data), programs=(*steps, evaluated),
      largest=largest, trials=tuple(trials))


def for_tpu(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A config whose `moe.grouped` does not depend on the devices of this process, which are none of the topology's.

  On a TPU 'auto' takes the megablox kernel, which is compiled where there is one. Here buffers stand for it, or, without a
  capacity, XLA's own ragged product: the same products on as many rows.
  """
  out = config.copy_and_resolve_references()
  if config.moe.router in resolve.DISPATCHED and config.moe.grouped in ('auto', 'megablox'):
    out.moe.grouped = 'buffers' if config.moe.capacity else 'ragged'
  return out


def _size(p: Program) -> float:
  return float('inf') if p.memory is None else p.memory.total


def _verdict(p: Program, memory: float) -> tuple[bool, float | None]:
  return p.fits(memory), p.needs


def _mesh(config: ml_collections.ConfigDict, devices: int) -> dict[str, int]:
  return sharding.mesh_shape({axis: config.mesh[axis] for axis in sharding.AXES}, devices)


def _assumed(config: ml_collections.ConfigDict, plan: Plan, data: Any) -> tuple[str, ...]:
  """What stands for data that was not read."""
  found = [f'{s.name} {data.sets[s.name].size:,} entries' for s in plan.sets]
  frames = {t.name: config.declared.frames.get(t.name, t.frames or 1) for t in plan.tasks if t.kind.visual}
  clips = [f'{name} {n} frames' for name, n in frames.items() if n > 1]
  grouped = [f'grouped products as {config.moe.grouped}'] if config.moe.router in resolve.DISPATCHED else []
  return tuple(found + clips + grouped)
