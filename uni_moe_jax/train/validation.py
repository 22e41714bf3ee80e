"""Evaluation during training: by evaluators with `during_training`, on the parameters that a checkpoint would save."""

import dataclasses
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager

from uni_moe_jax.config.metric_names import is_measured
from uni_moe_jax.eval import suite
from uni_moe_jax.parallel import distributed, multihost
from uni_moe_jax.train import metrics_log
from uni_moe_jax.train.hang_detection import EVALUATE
from uni_moe_jax.train.run import Run
from uni_moe_jax.train.step import TrainState
from uni_moe_jax.utils.errors import UsageError


class _Stopped(Exception):
  """The run is to stop."""


class Validation:
  """The evaluators of a run that run while it trains.

  Attributes:
    evaluations: what they measure; () if the run has no evaluations in between.
  """

  def __init__(self, run: Run, phase: Callable[..., AbstractContextManager[None]]):
    """Opens what they read.

    phase: of the hang detector.

    Raises:
      UsageError: a split does not exist, or `train.best_metric` is not measured among so few targets.
    """
    self._run, self._phase, self._every = run, phase, run.config.train.evaluate_every
    self.evaluations = tuple(
        dataclasses.replace(e, baselines=False) for e in run.plan.evaluations if e.during_training and self._every)
    best = run.config.train.best_metric
    for e in self.evaluations:
      suite.examples(e, run.data)
      num_targets = run.data.target_sets[e.task.target_set].size if e.task.target_set else 0
      if best.startswith(prefix := f'eval/{e.name}/') and not is_measured(best.removeprefix(prefix), num_targets):
        raise UsageError(f'config.train.best_metric={best!r} is not measured among {num_targets} targets '
                         f'(config.target_sets.{e.task.target_set}); choose another metric of this evaluator.')

  def fingerprints(self) -> dict[str, str]:
    """Evaluator → digest of the data that it reads."""
    return self._run.data.evaluation_fingerprints(self.evaluations)

  def is_due(self, step: int) -> bool:
    """Whether the run evaluates after this step: every `evaluate_every` steps, and after the last one."""
    return bool(self._every) and (step % self._every == 0 or step == self._run.config.train.steps)

  def is_missing(self, step: int, workdir: str | os.PathLike[str]) -> bool:
    """Whether a run was stopped before the evaluations that follow a step. All processes take part."""
    # Of step 0, which a converted checkpoint has, there are none.
    return bool(step and self.is_due(step) and multihost.broadcast_from_primary(
        distributed.is_primary() and not metrics_log.is_evaluated(workdir, step)))

  def __call__(self, step: int, state: TrainState, stopped: Callable[[], bool]) -> dict[str, float] | None:
    """{'eval/EVALUATOR/METRIC': value} of what is finite; None if the run is to stop. All processes take part.

    state: after `step` steps. stopped: called before each batch, in all processes.
    """
    def check():
      if stopped():
        raise _Stopped

    # A new one each time, since it keeps the features of target sets; the functions that it calls are compiled once.
    predictor = self._run.predictor(state.params if state.ema_params is None else state.ema_params)
    metrics = {}
    for e in self.evaluations:
      with self._phase(EVALUATE, step):
        try:
          check()
          measured = suite.scores(e, self._run.data, predictor, {}, check)
        except _Stopped:
          return None
        metrics |= {f'eval/{e.name}/{s.name}': s.value for s in measured}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
