"""The gradient of one task's own loss, with the run's own forward: what task interference is measured with.

Router noise and stochastic depth are off: the question is what tasks do to each other's loss, not to one draw of a router, and
a model without experts, which has no noise, is asked the same. The task's target set is encoded with its batch, so that its
gradient reaches the parameters through both; a vocabulary that training samples is sampled. Weights of tasks do not count.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from uni_moe_jax.analysis import param_subsets
from uni_moe_jax.analysis.param_subsets import Piece
from uni_moe_jax.data.pipeline import hashing
from uni_moe_jax.data.pipeline.mixtures import UNBATCHED_FIELDS
from uni_moe_jax.train.run import Run
from uni_moe_jax.train.step import Batch, Sets, StepSpec, gradients, place


def quiet_spec(spec: StepSpec, task: str, share: int = 1) -> StepSpec:
  """The step of one task alone on 1/share of its batch, its loss counted once, without noise."""
  plan = spec.plan.only(task)
  alone = dataclasses.replace(plan.tasks[0], loss_weight=1.0, batch_size=plan.tasks[0].batch_size // share)
  model = spec.model.clone(spec=dataclasses.replace(spec.model.spec, noise_std=0.0, drop_path=0.0))
  return dataclasses.replace(spec, plan=dataclasses.replace(plan, tasks=(alone,)), model=model)


def task_gradient(
    params: Any, batch: Batch, sets: Sets, key: jax.Array, *, spec: StepSpec, pieces: Sequence[Piece]
) -> tuple[dict[str, Any], jax.Array]:
  """(gradient in parts, loss) of a task.

  Args:
    params, batch, sets: of a step that holds this task.
    key: draws the sampled vocabulary; nothing else is random.
    spec: see `quiet_spec`.
    pieces: the parameters that are asked about; under jit no other gradient is computed.
  """
  grads, loss, *_ = gradients(spec, params, batch, sets, key)
  return param_subsets.take(pieces, grads), loss


class TaskGradients:
  """(task, batch) → gradient in parts, on batches that the training mixture would draw with another seed."""

  def __init__(self, run: Run, params: Any, pieces: Sequence[Piece], batches: int, seed: int):
    """seed: of the batches; their order has nothing to do with that of training, whatever it is."""
    self._run, self._params, self._batches, self._sets = run, params, batches, run.target_sets()
    self._seed = hashing.mix(run.config.seed, 'interference', seed)
    self._mixture = dataclasses.replace(run.mixture(), seed=self._seed, kind='all_tasks')
    self._functions = {t.name: jax.jit(functools.partial(
        task_gradient, spec=quiet_spec(run.spec, t.name), pieces=tuple(pieces))) for t in run.plan.tasks}
    self._open: dict[str, tuple[int, Iterator]] = {}

  def __call__(self, task: str, batch: int) -> dict[str, Any]:
    """The gradient on batch 0…N-1 of a task; asked in order, the data is read in one go."""
    at, batches = self._open.pop(task, (None, None))
    if at != batch:
      mixture = dataclasses.replace(self._mixture, plan=self._run.plan.only(task))
      batches = mixture.iterate(batch, self._batches)
    _, fields = next(batches)
    if batch + 1 < self._batches:
      self._open[task] = batch + 1, batches
    key = jax.random.key(hashing.mix(self._seed, task, batch) & 0x7FFFFFFF)
    return self._functions[task](self._params, self._run.put_batch(fields), self._sets, key)[0]

  def epochs(self) -> dict[str, float]:
    """How often the batches of a task go through its examples; above 1 they are not independent."""
    return {t.name: self._batches * t.batch_size / self._mixture.examples[t.name].size for t in self._run.plan.tasks}


def half_gradient(
    params: Any, batch: Batch, sets: Sets, key: jax.Array, half: jax.Array, *, spec: StepSpec, task: str,
    pieces: Sequence[Piece]) -> dict[str, Any]:
  """The gradient of a task on one half (0 or 1) of its rows in the batch of a step of all tasks.

  The halves have no example in common, unless the batch holds one twice, and a pair's negatives are those of its half.
  """
  chosen = next(t for t in spec.plan.tasks if t.name == task)
  start, stop = place(spec, chosen)
  size, axis = (stop - start) // 2, 1 if spec.grad_accum_steps == 1 else 2
  mine = {k: v if k in UNBATCHED_FIELDS else jax.lax.dynamic_slice_in_dim(v, start + half * size, size, axis)
          for k, v in batch[chosen.group].items()}
  return task_gradient(params, {chosen.group: mine}, sets, key, spec=quiet_spec(spec, task, 2), pieces=pieces)[0]
