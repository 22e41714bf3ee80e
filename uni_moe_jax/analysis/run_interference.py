"""Measures the task interference of a run: joins checkpoints, gradients of tasks and the estimator."""

import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
import tqdm

from uni_moe_jax.analysis import interference, interference_file, param_subsets
from uni_moe_jax.analysis.task_gradients import TaskGradients
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.run import Run, build_to_read, initial_state, read_params
from uni_moe_jax.utils.errors import UsageError


def measure_interference(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str], step: int | None, at_init: bool, pattern: str,
    layers: list[int] | None, num_batches: int, seed: int, devices=None) -> list[pathlib.Path]:
  """Measures a run, at the parameters that training updates, not their averages; returns the paths of the files.

  The arguments are flags of uni-moe interference; devices: by default all of them, or one if the mesh does not fit.

  Raises:
    UsageError: a run that trains no task, a step without a checkpoint, parameters that do not exist, a task whose
      gradient is not finite.
  """
  run = build_to_read(config, workdir, devices)
  if not run.plan.tasks:
    raise UsageError('this run trains no task, so that there are no gradients to measure; give --workdir of the run '
                     f'that it starts from, {run.config.train.init!r}.')
  slices = param_subsets.select(run.shapes.params, run.spec.model.spec.stack, pattern, layers, '--parameters')
  params, checkpoint = load_params(run, workdir, step, at_init, averaged=False)
  tasks = [t.name for t in run.plan.tasks]
  gradients = TaskGradients(run, params, slices, num_batches, seed)
  for task, epochs in gradients.epochs().items():
    if epochs > 1:
      print(f'{task}: {num_batches} batches are {epochs:.1f} epochs of its examples, so that they are not independent; '
            'reduce --num_batches.', flush=True)
  with tqdm.tqdm(total=2 * num_batches * len(tasks), unit='gradient', disable=not sys.stderr.isatty()) as bar:
    def gradient(task: str, batch: int) -> dict[str, Any]:
      if bar.disable and batch == 0:
        print(f'{task}: {num_batches} gradients', flush=True)  # the first pass compiles, the second one is fast
      bar.update()
      return gradients(task, batch)
    measured = interference.products(gradient, tasks, num_batches)
  rows = np.asarray(measured[interference.ALL].rows)
  if wrong := [task for i, task in enumerate(tasks) if not np.isfinite(rows[i, i]).all()]:
    raise UsageError(f'the gradient of {", ".join(wrong)} is not finite at {checkpoint}; measure an earlier --step.')
  estimates = {subset: interference.estimate(p, seed=seed) for subset, p in measured.items()}
  facts = dict(checkpoint=checkpoint, router=config.moe.router, parameters=pattern, num_batches=num_batches, seed=seed,
               noise=False, confidence=interference.CONFIDENCE, epochs=gradients.epochs())
  stem = file_stem(interference_file.FILE, checkpoint, step is not None or at_init)
  return interference_file.write(to_json(facts, tasks, estimates, slices), workdir, stem)


def file_stem(file: str, checkpoint: str, is_named: bool) -> str:
  """Stem of the files of a measurement: that of `file`, followed by the checkpoint if a flag named it."""
  return file.removesuffix('.json') + (f'_{checkpoint.replace(" ", "_")}' if is_named else '')


def to_json(
    facts: Mapping[str, Any], tasks: Sequence[str], estimates: Mapping[str, interference.Estimate],
    slices: Sequence[param_subsets.ParamSlice]) -> dict[str, Any]:
  """Content of interference.json: facts about the measurement, the tasks, and every subset, `ALL` first."""
  subsets = {interference.ALL: (None, None), **{s.subset: (s.layer, s.projection) for s in slices}}  # by layer
  axes = {'rows': 'task whose loss is measured', 'columns': 'task of the step'}

  def plain(values: np.ndarray) -> Any:
    """Nested lists; None for NaN, which JSON does not have."""
    return np.where(np.isfinite(values), values, None).tolist()

  return {**facts, 'tasks': list(tasks), **axes, 'subsets': [
      {'subset': subset, 'layer': layer, 'projection': projection, **{
          key: {bound: plain(values) for bound, values in vars(interval).items()}
          for key, interval in vars(estimates[subset]).items()}}
      for subset, (layer, projection) in subsets.items()]}


def load_params(
    run: Run, workdir: str | os.PathLike[str], step: int | None, at_init: bool, averaged: bool) -> tuple[Any, str]:
  """(parameters, name) of a checkpoint, of the newest one if step is None, or of the state that the run starts from.

  averaged: whether they are the averages if the run keeps them.
  """
  if at_init:
    return initial_state(run).params, 'init'  # which are their average, too
  with Checkpoints(workdir, max_to_keep=None) as checkpoints:
    params, step = read_params(run, checkpoints, step, averaged)
    return params, f'step {step}'
