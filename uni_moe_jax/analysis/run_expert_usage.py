"""Measures the expert usage of a run: joins its checkpoints, its batches and `analysis.expert_usage`."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from uni_moe_jax.analysis import expert_usage, expert_usage_file
from uni_moe_jax.analysis.run_interference import file_stem, load_params
from uni_moe_jax.model.sequences import InputSequence
from uni_moe_jax.moe import precision, routers
from uni_moe_jax.train.forward import Batch, StepSpec, TargetSets, sample_synonyms, sample_vocabularies, step_inputs
from uni_moe_jax.train.run import Run, build_to_read
from uni_moe_jax.utils import splitmix
from uni_moe_jax.utils.errors import UsageError


def measure_expert_usage(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str], step: int | None, at_init: bool,
    num_batches: int, seed: int, devices=None) -> list[pathlib.Path]:
  """Measures averaged parameters if the run keeps them; returns the paths of the files it wrote.

  The arguments are flags of uni-moe experts; devices: by default all of them, or one if the mesh does not fit.

  Raises:
    UsageError: a model without experts, a step without a checkpoint, a run that trains no task.
  """
  run = build_to_read(config, workdir, devices)
  if not expert_usage.expert_layers(run.spec.model.spec):
    raise UsageError(f'config.moe.router={config.moe.router!r}, placement={config.moe.placement!r}: the model has no '
                     'experts.')
  if not (run.plan.tasks or at_init):
    needs_batches = routers.routes_tokens(config.moe.router)
    raise UsageError('this run trains no task and has no checkpoints; give --workdir of the run that it starts from, '
                     f'{config.train.init!r}' +
                     ('.' if needs_batches else ', or --at_init for its parameters in the tasks of this one.'))
  params, checkpoint = load_params(run, workdir, step, at_init, averaged=True)
  content = compute_usage(run, params, checkpoint, num_batches, seed)
  stem = file_stem(expert_usage_file.FILE, checkpoint, step is not None or at_init)
  return expert_usage_file.write(content, workdir, stem)


def write_after_evaluation(run: Run, params: Any, step: int, workdir: str | os.PathLike[str]) -> None:
  """Writes experts.json; only prints the command if that needs batches or parameters of other processes."""
  spec = run.spec.model.spec
  if not expert_usage.expert_layers(spec):
    return
  if routers.routes_tokens(spec.router) or jax.process_count() > 1:
    if run.plan.tasks:  # else there are neither batches nor a checkpoint
      print(f'uni-moe experts --workdir={workdir} measures which experts tokens use.', flush=True)
  else:
    content = compute_usage(run, params, f'step {step}', 0, 0)
    expert_usage_file.write(content, workdir, file_stem(expert_usage_file.FILE, '', False))


def compute_usage(run: Run, params: Any, checkpoint: str, num_batches: int, seed: int) -> dict[str, Any]:
  """Content of experts.json, see `expert_usage.to_json`. Routers that merge need no batches."""
  spec, plan = run.spec.model.spec, run.plan
  sets = {s.name: s for s in (*plan.sets, *plan.probe_sets)}
  facts = {'checkpoint': checkpoint, 'num_batches': 0, 'seed': seed}
  if not routers.routes_tokens(spec.router):
    inputs, by_task = expert_usage.merging_conditions(spec, plan.conditions, plan.tasks or plan.probes, sets)
    shares = expert_usage.coefficients(spec, params, inputs)
    return expert_usage.to_json(facts, spec, spec.router_input_names(plan.conditions), by_task, shares)
  if not plan.tasks:
    raise UsageError(f'this run trains no task, so that the {spec.router} router has no batches to be measured on.')
  names, by_task = expert_usage.token_conditions(plan.tasks, sets)
  sums = _sum_batches(run, params, by_task, len(names), num_batches, seed)
  tokens = np.asarray(sums.tokens, np.float64)
  count = np.maximum(tokens, 1)
  shares, entropy = np.asarray(sums.gates) / count[:, None], np.asarray(sums.entropy) / count
  return expert_usage.to_json({**facts, 'num_batches': num_batches}, spec, names, by_task, shares, tokens, entropy)


def _sum_batches(
    run: Run, params: Any, by_task: expert_usage.Conditions, num_conditions: int, num_batches: int, seed: int
) -> expert_usage.GateSums:
  """Sums over batches that the training mixture draws with another seed. Routing is exact and without noise."""
  seed = splitmix.mix(run.config.seed, 'experts', seed)
  mixture = dataclasses.replace(run.mixture(), seed=seed, mode='all_tasks')
  step = jax.jit(functools.partial(step_sums, spec=run.spec, by_task=by_task, num_conditions=num_conditions))
  sets, total = run.target_sets(), None
  for number, (_, batch) in enumerate(mixture.iterate(0, num_batches)):
    batch = run.put_batch(batch)
    for i in range(run.spec.grad_accum_steps):
      micro_batch = batch if run.spec.grad_accum_steps == 1 else jax.tree.map(lambda x, i=i: x[i], batch)
      sums = step(params, micro_batch, sets, jax.random.key(splitmix.mix(seed, number, i) & 0x7FFFFFFF))
      total = sums if total is None else jax.tree.map(jnp.add, total, sums)
  return total


def step_sums(
    params: Any, batch: Batch, sets: TargetSets, key: jax.Array, *, spec: StepSpec, by_task: expert_usage.Conditions,
    num_conditions: int) -> expert_usage.GateSums:
  """Sums the gates of the tokens of one (micro-)batch and of its target sets, over all layers.

  The key draws sampled vocabularies and synonyms. by_task, num_conditions: see `expert_usage.token_conditions`.
  """
  inputs = step_inputs(spec, batch, sample_synonyms(sets, key), sample_vocabularies(spec, batch, key))
  leaves = jax.tree_util.tree_leaves_with_path(inputs, is_leaf=lambda x: isinstance(x, InputSequence))
  names = [(path[0].name, path[1].key) for path, _ in leaves]
  target_sets = {s.name: s for s in spec.plan.sets}
  slices = expert_usage.token_slices(spec.plan.tasks, target_sets, by_task, names, spec.task_slices)
  with precision.of_evaluation(spec.model.spec.dtype):
    collected = spec.model.apply(
        {'params': params}, method=lambda model: model.encode(inputs, all_rows=True, taps=True).collected)
  return expert_usage.gate_sums(spec.model.spec, collected, slices, num_conditions, spec.model.shards)
