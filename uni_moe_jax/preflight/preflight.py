"""Preflight of a config on a topology."""

import time
from collections.abc import Callable

from uni_moe_jax.config import schema
from uni_moe_jax.parallel import sharding
from uni_moe_jax.preflight import compiled_programs, remedies, topology
from uni_moe_jax.preflight.compiled_programs import EVALUATION, Compiler, Config
from uni_moe_jax.preflight.findings import BatchEstimate, Findings
from uni_moe_jax.preflight.topology import Topology
from uni_moe_jax.tasks.router_names import DISPATCHED
from uni_moe_jax.train.run import Run


def preflight(
    config: Config, name: str, target: Topology, memory: float | None, search: bool, report: Callable[[str], None],
    time_budget: float, started: float) -> Findings:
  """Compile the programs of a config for a topology and analyze them.

  Args:
    config: of a run. name: of the config, for the report. memory: bytes per device; None: those of the chip.
    search: also search for a change that fits, if the config does not, try FSDP where memory traffic bounds the
      slowest step, and estimate the largest batch: more compiles.
    report: receives a line for each compile.
    time_budget: minutes for the compiles of the search; the config's own programs are always compiled.
    started: start of the command by `time.monotonic`, for the budget and the reported seconds.

  Raises:
    UsageError: see `compiled_programs.prepare` and `topology.devices`.
  """
  devices = topology.devices(target)
  compiler = Compiler(target, devices, report, started + 60 * time_budget)
  config = schema.apply_choices(for_tpu(config) if target.is_tpu else config)
  memory = target.chip.memory if memory is None else memory
  run = compiler.run(config)
  programs = {which: compiler.program(config, which) for which in (*compiled_programs.training_steps(run), EVALUATION)}
  trials, comparison, largest_batch = (), None, None
  if search and memory is not None:
    if not all(p.fits(memory) for p in programs.values()):
      trials = remedies.search(compiler, config, programs, memory)
    else:
      comparison = remedies.compare_fsdp(compiler, config, programs, target.chip)
    largest_batch = estimate_largest_batch(compiler, config, remedies.steps_by_need(programs, memory)[0], memory)
  return Findings(
      config=name, topology=target, mesh=dict(run.mesh.shape), devices=len(devices), memory=memory,
      parameters=run.parameter_counts(), assumptions=_assumptions(config, run, target),
      programs=tuple(programs.values()), seconds=time.monotonic() - started, largest_batch=largest_batch, trials=trials,
      comparison=comparison, out_of_time=compiler.out_of_time)


def estimate_largest_batch(compiler: Compiler, config: Config, task: str | None, memory: float) -> BatchEstimate | None:
  """Estimate the batch at which memory is full, by a line through the config's batch and another one.

  The other batch is twice as large, or half as large if the config's own does not fit. None: there is no other batch,
  no time to compile it, or the compiler did not report what a program needs.

  Args:
    task: whose step is meant, of a 'one_task' mixture; None: all tasks, whose batches keep their proportions.
    memory: bytes per device.
  """
  shards = sharding.batch_shards(compiler.mesh(config))
  tasks = [name for name, t in config.tasks.items() if t.batch_size and task in (None, name)]
  examples = lambda c: sum(c.tasks[name].batch_size for name in tasks) // (shards * c.train.grad_accum_steps)
  own = compiler.program(config, task)
  scaled = remedies.scale_batches(config, shards, 2 if own.fits(memory) else 0.5)
  sizes = examples(config), examples(scaled)
  if sizes[0] == sizes[1] or not compiler.has_time([task]):
    return None
  other = compiler.program(scaled, task, f', with {sizes[1]} examples per device')
  if own.needs is None or other.needs is None or (slope := (other.needs - own.needs) / (sizes[1] - sizes[0])) <= 0:
    return None
  return BatchEstimate(sizes[0] + (memory - own.needs) / slope, tuple(zip(sizes, (own.needs, other.needs))))


def for_tpu(config: Config) -> Config:
  """Return a config whose `moe.gmm` does not depend on the devices of this process.

  On a TPU 'auto' selects the megablox kernel where there is no capacity (evaluation). Like tokamax's, it can only be
  compiled on one. XLA's own grouped products replace it, on as many tokens: 'xla' is batched with a capacity (training)
  and ragged without one.
  """
  changed = config.copy_and_resolve_references()
  if config.moe.router in DISPATCHED and config.moe.gmm in ('auto', 'megablox', 'tokamax'):
    changed.moe.gmm = 'xla'
  return changed


def _assumptions(config: Config, run: Run, target: Topology) -> tuple[str, ...]:
  """Describe what replaces data that was not read and programs that were not compiled."""
  sets = [f'{s.name} {run.data.target_sets[s.name].size:,} entries' for s in run.plan.sets]
  frames = {t.name: config.preflight.num_frames.get(t.name, t.num_frames or 1) for t in run.plan.tasks if t.type.visual}
  videos = [f'{name} {n} frames' for name, n in frames.items() if n > 1]
  gmm = [f'grouped products as {config.moe.gmm}'] if config.moe.router in DISPATCHED else []
  captions = ['caption search is not compiled'] if any(e.type == 'caption' for e in run.plan.evaluations) else []
  code = ['program sizes estimated from fusions'] if target.is_tpu else []
  return (*sets, *videos, *gmm, *captions, *code)
