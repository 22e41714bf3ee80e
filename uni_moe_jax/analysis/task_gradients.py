"""Gradients of single tasks with the forward pass of a run.

Router noise and stochastic depth are off: the measurement is about the tasks, not about one draw of a router, and it
compares with a model without experts, which has no noise. A task's target set is encoded with its batch, so that its
gradient reaches the parameters through both; a vocabulary that training samples is sampled. Neither loss weights of
tasks nor auxiliary losses of routers count.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from uni_moe_jax.analysis import param_subsets
from uni_moe_jax.analysis.param_subsets import ParamSlice
from uni_moe_jax.train.forward import Batch, StepSpec, TargetSets
from uni_moe_jax.train.run import Run
from uni_moe_jax.train.step import gradients
from uni_moe_jax.utils import splitmix


def quiet_spec(spec: StepSpec, task: str) -> StepSpec:
  """The step of one task, with loss weight 1, without noise and losses of routers."""
  plan = spec.plan.only(task)
  only_task = dataclasses.replace(plan.tasks[0], loss_weight=1.0)
  model = spec.model.clone(spec=dataclasses.replace(spec.model.spec, noise_std=0.0, drop_path=0.0))
  return dataclasses.replace(spec, plan=dataclasses.replace(plan, tasks=(only_task,)), model=model, auxiliary=(),
                             cpu_bfloat16=False)


def task_gradient(
    params: Any, batch: Batch, sets: TargetSets, key: jax.Array, *, spec: StepSpec, slices: Sequence[ParamSlice]
) -> tuple[dict[str, Any], jax.Array]:
  """(gradient by subset, loss) of the only task of a `quiet_spec`. The key draws sampled vocabularies and synonyms."""
  output = gradients(spec, params, batch, sets, key)
  return param_subsets.extract(slices, output.grads), output.loss


class TaskGradients:
  """(task, batch) → gradient by subset, on batches that the training mixture draws with another seed.

  Whatever the seed is, the batches are independent of those of training.
  """

  def __init__(self, run: Run, params: Any, slices: Sequence[ParamSlice], num_batches: int, seed: int):
    self._run, self._params, self._num_batches, self._sets = run, params, num_batches, run.target_sets()
    self._seed = splitmix.mix(run.config.seed, 'interference', seed)
    self._mixture = dataclasses.replace(run.mixture(), seed=self._seed, mode='all_tasks')
    self._functions = {t.name: jax.jit(functools.partial(
        task_gradient, spec=quiet_spec(run.spec, t.name), slices=tuple(slices))) for t in run.plan.tasks}
    self._iterators: dict[str, tuple[int, Iterator]] = {}  # task → (next batch, iterator)

  def __call__(self, task: str, batch: int) -> dict[str, Any]:
    """The gradient on batch 0…N-1 of a task. Batches in order read the data once, sequentially."""
    next_batch, batches = self._iterators.pop(task, (None, None))
    if next_batch != batch:
      mixture = dataclasses.replace(self._mixture, plan=self._run.plan.only(task))
      batches = mixture.iterate(batch, self._num_batches)
    _, fields = next(batches)
    if batch + 1 < self._num_batches:
      self._iterators[task] = batch + 1, batches
    key = jax.random.key(splitmix.mix(self._seed, task, batch) & 0x7FFFFFFF)
    return self._functions[task](self._params, self._run.put_batch(fields), self._sets, key)[0]

  def epochs(self) -> dict[str, float]:
    """Number of epochs in the batches of each task; above 1 the batches are not independent."""
    examples = self._mixture.examples
    return {t.name: self._num_batches * t.batch_size / examples[t.name].size for t in self._run.plan.tasks}
