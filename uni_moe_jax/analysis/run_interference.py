"""Measures task interference of a run: joins its checkpoints, its tasks' gradients and the estimator."""

import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
import tqdm

from uni_moe_jax.analysis import interference as estimator
from uni_moe_jax.analysis import interference_file, param_subsets
from uni_moe_jax.analysis.task_gradients import TaskGradients
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.run import Run, build, initial_state
from uni_moe_jax.train.step import TrainState
from uni_moe_jax.utils.errors import UsageError


def interference(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str], step: int | None, init: bool, pattern: str,
    layers: list[int] | None, batches: int, seed: int, devices=None) -> list[pathlib.Path]:
  """Measures and writes; returns the paths of what it wrote.

  The parameters are those that a training step would change, not averaged ones.

  Args:
    config: of the run.
    workdir: its folder.
    step: of a checkpoint; None: the newest one.
    init: ask the parameters that the run starts from instead; no checkpoint is read.
    pattern, layers: which parameters, see `parts.choose`.
    batches: N, per task. seed: draws them, and the resamples.
    devices: all of them by default.

  Raises:
    UsageError: a step that is not saved, parameters that are not there, a task whose gradient is not finite.
  """
  run = build(config, devices)
  pieces = param_subsets.choose(run.shapes.params, run.spec.model.spec.stack, pattern, layers, '--parameters')
  state, name = state_of(run, workdir, step, init)
  params = state.params
  tasks = [t.name for t in run.plan.tasks]
  gradients = TaskGradients(run, params, pieces, batches, seed)
  for task, epochs in gradients.epochs().items():
    if epochs > 1:
      print(f'{task}: {batches} batches go {epochs:.1f} times through its examples, so that they are not independent; fewer '
            '--batches are.', flush=True)
  with tqdm.tqdm(total=2 * batches * len(tasks), unit='gradient', disable=not sys.stderr.isatty()) as bar:
    def gradient(task: str, batch: int) -> dict[str, Any]:
      if bar.disable and batch == 0:
        print(f'{task}: {batches} gradients', flush=True)  # the first time it compiles, the second it is fast
      bar.update()
      return gradients(task, batch)
    measured = estimator.products(gradient, tasks, batches)
  own = np.asarray(measured[estimator.WHOLE].rows)
  if broken := [task for i, task in enumerate(tasks) if not np.isfinite(own[i, i]).all()]:
    raise UsageError(f'the gradient of {", ".join(broken)} is not finite at {name}: nothing can be said about it; measure an '
                     'earlier --step.')
  estimates = {part: estimator.estimate(p, tasks, seed=seed) for part, p in measured.items()}
  facts = dict(
      checkpoint=name, router=config.moe.router, parameters=pattern, batches=batches, seed=seed, noise=False,
      confidence=estimator.CONFIDENCE, epochs=gradients.epochs())
  content = record(facts, tasks, estimates, pieces)
  return interference_file.write(content, workdir, stem_of(interference_file.FILE, name, step is not None or init))


def stem_of(file: str, name: str, named: bool) -> str:
  """How files of a measurement begin: as `file`, of the newest checkpoint; with its name where it was asked for by name."""
  return file.removesuffix('.json') + (f'_{name.replace(" ", "_")}' if named else '')


def record(
    facts: Mapping[str, Any], tasks: Sequence[str], estimates: Mapping[str, estimator.Estimate],
    pieces: Sequence[param_subsets.Piece]) -> dict:
  """What interference.json holds: facts about the measurement, the tasks, and every part, the whole first."""
  where = {p.part: (p.layer, p.projection) for p in pieces}  # in the order of the layers
  found = []
  for name in (estimator.WHOLE, *where):
    layer, projection = where.get(name, (None, None))
    found.append({'part': name, 'layer': layer, 'projection': projection, **{
        measure: {bound: _plain(values) for bound, values in vars(interval).items()}
        for measure, interval in vars(estimates[name]).items()}})
  return {**facts, 'tasks': list(tasks), 'rows': 'task whose loss is looked at', 'columns': 'task that is stepped on',
          'parts': found}


def state_of(run: Run, workdir: str | os.PathLike[str], step: int | None, init: bool) -> tuple[TrainState, str]:
  """(state, what to call it): of a checkpoint, the newest by default, or the one that the run starts from.

  Raises:
    UsageError: there is no checkpoint, or none of this step.
  """
  if init:
    return initial_state(run), 'init'
  with Checkpoints(workdir, max_to_keep=None) as checkpoints:
    saved = checkpoints.steps()
    if not saved:
      raise UsageError(f'workdir {workdir} has no checkpoint yet; train it first, or ask its --init.')
    step = saved[-1] if step is None else step
    if step not in saved:
      raise UsageError(f'workdir {workdir} has no checkpoint of step {step}; it has those of {", ".join(map(str, saved))}.')
    return checkpoints.restore(run.abstract_state(), step), f'step {step}'


def _plain(values: np.ndarray) -> Any:
  """Nested lists; JSON knows no NaN."""
  if np.ndim(values):
    return [_plain(v) for v in values]
  return float(values) if np.isfinite(values) else None
