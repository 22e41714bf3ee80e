"""Measures which experts the tasks of a run use: joins its checkpoints, its batches and `eval.usage`."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from uni_moe_jax.analysis import expert_usage, expert_usage_file, run_interference
from uni_moe_jax.data.pipeline import hashing
from uni_moe_jax.train import synonyms
from uni_moe_jax.train.run import Run, build, conditions
from uni_moe_jax.train.step import Batch, Sets, StepSpec, place, sample_sets, sequences
from uni_moe_jax.utils.errors import UsageError


def experts(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str], step: int | None, init: bool, batches: int,
    seed: int, devices=None) -> list[pathlib.Path]:
  """Measures and writes; returns the paths of what it wrote. The parameters are averaged ones where the run keeps them.

  Args:
    config: of the run. workdir: its folder.
    step: of a checkpoint; None: the newest one. init: ask the parameters that the run starts from instead.
    batches: steps whose batches are looked at, where routers look at tokens. seed: draws them.
    devices: all of them by default.

  Raises:
    UsageError: the model has no experts, a step that is not saved, a run that trains no task.
  """
  run = build(config, devices)
  if not expert_usage.layers(run.spec.model.spec):
    raise UsageError(f'config.moe.router={config.moe.router!r}, placement={config.moe.placement!r}: such a model has no '
                     'experts.')
  state, name = run_interference.state_of(run, workdir, step, init)
  content = measured(run, state.params if state.ema_params is None else state.ema_params, name, batches, seed)
  return expert_usage_file.write(content, workdir, run_interference.stem_of(expert_usage_file.FILE, name, step is not None or init))


def beside_evaluation(run: Run, params: Any, step: int, workdir: str | os.PathLike[str]) -> None:
  """Writes experts.json where it costs nothing, and says what to do where it does, or where parameters lie in several processes."""
  spec = run.spec.model.spec
  if expert_usage.layers(spec) and (expert_usage.by_token(spec) or jax.process_count() > 1):
    print(f'python launch/experts.py --workdir={workdir} measures which experts tokens use.', flush=True)
  elif expert_usage.layers(spec):
    expert_usage_file.write(measured(run, params, f'step {step}', 0, 0), workdir, run_interference.stem_of(expert_usage_file.FILE, '', False))


def measured(run: Run, params: Any, name: str, batches: int, seed: int) -> dict[str, Any]:
  """What experts.json holds, see `usage.record`. Routers that merge need no batch: what they decide follows from parameters.

  Args:
    name: of the parameters. batches, seed: as in `experts`.
  """
  spec, plan = run.spec.model.spec, run.plan
  sets = {s.name: s for s in (*plan.sets, *plan.probe_sets)}
  facts = {'checkpoint': name, 'batches': 0, 'seed': seed}
  if not expert_usage.by_token(spec):
    rows, of_task = expert_usage.rows_of_conditions(spec, conditions(plan), plan.tasks or plan.probes, sets)
    return expert_usage.record(facts, spec, spec.router_input_names(conditions(plan)), of_task, expert_usage.coefficients(spec, params, rows))
  if not plan.tasks:
    raise UsageError(f'this run trains no task, so that there are no batches to ask the {spec.router} router about.')
  rows, of_task = expert_usage.rows_of_tokens(plan.tasks, sets)
  found = _sums(run, params, of_task, len(rows), batches, seed)
  tokens = np.asarray(found.tokens, np.float64)
  count = np.maximum(tokens, 1)
  shares, own = np.asarray(found.gates) / count[:, None], np.asarray(found.entropy) / count
  return expert_usage.record({**facts, 'batches': batches}, spec, rows, of_task, shares, tokens, own)


def _sums(run: Run, params: Any, of_task: dict[str, dict[str, int]], rows: int, batches: int, seed: int) -> expert_usage.Sums:
  """Over batches that the training mixture would draw with another seed; routing is exact and without noise."""
  seed = hashing.mix(run.config.seed, 'experts', seed)
  mixture = dataclasses.replace(run.mixture(), seed=seed, kind='all_tasks')
  function = jax.jit(functools.partial(step_sums, spec=run.spec, of_task=of_task, rows=rows))
  sets, total = run.target_sets(), None
  for number, (_, batch) in enumerate(mixture.iterate(0, batches)):
    batch = run.put_batch(batch)
    for i in range(run.spec.grad_accum_steps):
      micro = batch if run.spec.grad_accum_steps == 1 else jax.tree.map(lambda x, i=i: x[i], batch)
      found = function(params, micro, sets, jax.random.key(hashing.mix(seed, number, i) & 0x7FFFFFFF))
      total = found if total is None else jax.tree.map(jnp.add, total, found)
  return total


def step_sums(
    params: Any, batch: Batch, sets: Sets, key: jax.Array, *, spec: StepSpec, of_task: dict[str, dict[str, int]], rows: int
) -> expert_usage.Sums:
  """What the tokens of one (micro-)batch and of its target sets chose, in every layer whole.

  Args:
    key: draws the sampled vocabulary; nothing else is random.
    of_task, rows: see `usage.rows_of_tokens`.
  """
  found, names = sequences(spec, batch, synonyms.sample_synonyms(sets, key), sample_sets(spec, batch, key))
  by_name = {s.name: s for s in spec.plan.sets}
  pieces = expert_usage.pieces(spec.plan.tasks, by_name, of_task, names, functools.partial(place, spec))
  encode = lambda model: model.encode(found, all_rows=True, taps=True).collected
  collected = spec.model.apply({'params': params}, method=encode)
  return expert_usage.gate_sums(spec.model.spec, collected, pieces, rows, spec.model.shards)
