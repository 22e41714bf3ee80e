"""Task interference as a training metric: an estimate from the batch of a step, before the step is taken.

Every task's rows are halved, so that there are two independent gradients of each task, and `eval.interference` is asked with
these N = 2 batches. Logged is Δ_{j→i} under 'interference/<i><-<j>': what a short step on j takes from the loss of i per unit
of step size. One estimate is noisy, but such numbers may be averaged over steps: I(i, j), for half batches, is the mean of
'interference/<i><-<j>' over some steps divided by that of 'interference/<i><-<i>'. Ratios of single steps may not be averaged.

It costs two forward and backward passes of half a batch per task, and the memory of about eight gradients of the chosen
parameters per task. It reads the state and changes nothing: a run ends with the same parameters, whether it is on or off.
"""

import functools
from typing import Any

import jax

from uni_moe_jax.analysis import interference, param_subsets
from uni_moe_jax.analysis.task_gradients import half_gradient
from uni_moe_jax.train.run import Run
from uni_moe_jax.train.step import Batch, Sets


class InterferenceMetric:
  """Estimates of a run's own steps; see `config.train.interference_every`."""

  def __init__(self, run: Run):
    """Raises UsageError for parameters that are not there."""
    c = run.config.train
    self._every, self._seed = c.interference_every, run.config.seed
    pieces = param_subsets.choose(
        run.shapes.params, run.spec.model.spec.stack, c.interference_parameters, field='config.train.interference_parameters')
    self._functions = {t.name: jax.jit(functools.partial(
        half_gradient, spec=run.spec, task=t.name, pieces=pieces)) for t in run.plan.tasks}

  def __call__(self, step: int, params: Any, batch: Batch, sets: Sets) -> dict[str, jax.Array]:
    """Scalars of the step that has number `step` (0, 1, …) and is about to be taken; {} where none is due."""
    if (step + 1) % self._every:
      return {}
    key = jax.random.fold_in(jax.random.key(self._seed), step)
    held = {(name, half): f(params, batch, sets, jax.random.fold_in(key, half), half)
            for name, f in self._functions.items() for half in (0, 1)}
    names = tuple(self._functions)
    delta = interference.products(lambda name, half: held[name, half], names, 2)[interference.WHOLE].rows.mean(-1)
    return {f'interference/{i}<-{j}': delta[a, b] for a, i in enumerate(names) for b, j in enumerate(names)}


def interference_hook(run: Run) -> InterferenceMetric | None:
  """A hook for `train.loop.train`; None where `config.train.interference_every` is 0."""
  return InterferenceMetric(run) if run.config.train.interference_every else None
