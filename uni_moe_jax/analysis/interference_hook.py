"""Task interference as a training metric, estimated from the batch of a step before it is taken.

Every task's examples are split into halves: the N = 2 batches of `analysis.interference`. 'interference/<i><-<j>' is
Δ_{j→i}, and noisy. I(i, j) for half batches is its mean over some steps, divided by that of 'interference/<i><-<i>'; do
not average ratios of single steps.

It costs two forward and backward passes of half a batch per task, and the memory of about eight gradients of the
selected parameters per task. It only reads the state: the trained parameters are the same with and without it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from uni_moe_jax.analysis import interference, param_subsets
from uni_moe_jax.analysis.task_gradients import half_gradient
from uni_moe_jax.train.forward import Batch, TargetSets
from uni_moe_jax.train.run import Run


def interference_hook(run: Run) -> Callable[[int, Any, Batch, TargetSets], dict[str, jax.Array]] | None:
  """A hook for `train.loop.train`; None if `config.train.interference_every` is 0.

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
