"""Gradients of single tasks with the forward pass of a run, and interference as a training metric.

Router noise and stochastic depth are off: the measurement is about the tasks, not about one draw of a router, and it
compares with a model without experts, which has no noise. A task's target set is encoded with its batch, so that its
gradient reaches the parameters through both; a vocabulary that training samples is sampled. Neither loss weights of
tasks nor auxiliary losses of routers count.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from uni_moe_jax.analysis import interference, param_subsets
from uni_moe_jax.analysis.param_subsets import ParamSlice
from uni_moe_jax.data.batches.mixtures import UNBATCHED_FIELDS
from uni_moe_jax.train.forward import Batch, StepSpec, TargetSets
from uni_moe_jax.train.run import Run
from uni_moe_jax.train.step import gradients
from uni_moe_jax.utils import splitmix


def quiet_spec(spec: StepSpec, task: str, share: int = 1) -> StepSpec:
  """The step of one task on 1/share of its batch, with loss weight 1, without noise and losses of routers."""
  plan = spec.plan.only(task)
  only_task = dataclasses.replace(plan.tasks[0], loss_weight=1.0, batch_size=plan.tasks[0].batch_size // share)
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


def half_gradient(
    params: Any, batch: Batch, sets: TargetSets, key: jax.Array, half: jax.Array, *, spec: StepSpec, task: str,
    slices: Sequence[ParamSlice]) -> dict[str, Any]:
  """The gradient of a task on one half (0 or 1) of its examples in the batch of a step of all tasks.

  The halves share no example, unless the batch has one twice, and a pair's negatives are those of its half.
  """
  task_spec = next(t for t in spec.plan.tasks if t.name == task)
  rows = spec.task_slices[task]
  size, axis = (rows.stop - rows.start) // 2, 1 if spec.grad_accum_steps == 1 else 2
  fields = {k: v if k in UNBATCHED_FIELDS else jax.lax.dynamic_slice_in_dim(v, rows.start + half * size, size, axis)
            for k, v in batch[task_spec.group].items()}
  return task_gradient(params, {task_spec.group: fields}, sets, key, spec=quiet_spec(spec, task, 2), slices=slices)[0]


def interference_hook(run: Run) -> Callable[[int, Any, Batch, TargetSets], dict[str, jax.Array]] | None:
  """A hook for `train.loop.train` that estimates interference; None if `config.train.interference_every` is 0.

  The halves of every task's examples are the N = 2 batches of `interference`, before the step is taken.
  'interference/<i><-<j>' is Δ_{j→i}, and noisy. I(i, j) for half batches is its mean over some steps, divided by that
  of 'interference/<i><-<i>'; do not average ratios of single steps. It costs two forward and backward passes of half a
  batch per task, and the memory of about eight gradients of the selected parameters per task.

  It returns scalars for step 0, 1, …, which is about to be taken; {} unless it is one of every `interference_every`.

  Raises:
    UsageError: `config.train.interference_parameters` matches no parameter.
  """
  c, seed = run.config.train, run.config.seed
  if not c.interference_every:
    return None
  slices = param_subsets.select(run.shapes.params, run.spec.model.spec.stack, c.interference_parameters,
                                field='config.train.interference_parameters')
  functions = {t.name: jax.jit(functools.partial(half_gradient, spec=run.spec, task=t.name, slices=slices))
               for t in run.plan.tasks}

  def metric(step: int, params: Any, batch: Batch, sets: TargetSets) -> dict[str, jax.Array]:
    if (step + 1) % c.interference_every:
      return {}
    key = jax.random.fold_in(jax.random.key(seed), step)
    gradients = {(task, half): f(params, batch, sets, jax.random.fold_in(key, half), half)
                 for task, f in functions.items() for half in (0, 1)}
    products = interference.products(lambda task, half: gradients[task, half], tuple(functions), 2)
    delta = products[interference.ALL].rows.mean(-1)
    return {f'interference/{i}<-{j}': delta[a, b] for a, i in enumerate(functions) for b, j in enumerate(functions)}

  return metric
