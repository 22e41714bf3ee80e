"""Which checkpoints of a run are kept, and which is read: the newest, or the best. This module imports nothing slow."""

import dataclasses
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from uni_moe_jax.config.metric_names import lower_is_better
from uni_moe_jax.io import storage
from uni_moe_jax.train import manifest
from uni_moe_jax.train.workdir import CHECKPOINTS, load_config, saved_steps, trained_in


def best_of(metrics: Mapping[int, Mapping[str, float]], name: str) -> int | None:
  """The step with the best value of a metric, of equal values the later one; None if no step has it."""
  sign = 1 if lower_is_better(name) else -1
  known = [step for step, values in metrics.items() if name and name in values]
  return min(known, key=lambda step: (sign * metrics[step][name], -step), default=None)


def best_step(workdir: str | os.PathLike[str], config: ml_collections.ConfigDict, newest: int) -> int | None:
  """The step with the best `train.best_metric`, up to the newest intact one; None: none has it. See `intact`."""
  folder, metric = _source(workdir, config)
  return _best(folder, [step for step in saved_steps(folder.parent) if step <= newest], metric)


def intact(workdir: str | os.PathLike[str], config: ml_collections.ConfigDict, best: bool) -> Iterator[tuple[int, str]]:
  """Step and digest of a run's newest or best checkpoint and, only if the newest is damaged, of those before it.

  The newest is verified, which reads it, when the next one is requested.

  Args:
    workdir, config: of the run; if it trains nothing, the checkpoints are those of the run in `train.init`.
    best: whether that with the best `train.best_metric` is meant.
  """
  folder, metric = _source(workdir, config)
  listed = saved_steps(folder.parent)
  steps = [*listed]
  while steps and (step := _best(folder, steps, metric) if best else steps[-1]) is not None:
    yield step, manifest.fingerprint(folder / str(step))
    newest = folder / str(steps.pop())
    if not (damage := manifest.damage(newest)):
      return
    if saved_steps(folder.parent) != listed:  # its run trains on, and has deleted what was verified
      yield from intact(workdir, config, best)
      return
    print(f'warning: {newest} is damaged: {damage}.', file=sys.stderr, flush=True)


def _best(folder: storage.Path, steps: Collection[int], metric: str) -> int | None:
  return best_of({step: manifest.metrics(folder / str(step)) for step in steps}, metric)


def _source(workdir: str | os.PathLike[str], config: ml_collections.ConfigDict) -> tuple[storage.Path, str]:
  """(folder of the checkpoints, metric of the best one) of a run."""
  source = trained_in(workdir, config.train.init)
  metric = (config if source == workdir else load_config(source)).train.best_metric
  return storage.path(source) / CHECKPOINTS, metric


@dataclasses.dataclass(frozen=True)
class Retention:
  """Orbax's interface for which steps to keep: the newest `max_to_keep` (None: all), multiples, and the best."""
  max_to_keep: int | None
  keep_every: int
  best_of: Callable[[Sequence[int]], int | None]

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    steps = [c.step for c in checkpoints]
    multiples = [s for s in steps if self.keep_every and s % self.keep_every == 0]
    newest = steps if self.max_to_keep is None else sorted(steps)[-self.max_to_keep:]
    kept = {self.best_of(steps), *multiples, *newest}
    return [s in kept for s in steps]
