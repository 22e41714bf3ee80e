"""Suite `input`: the rate of the input pipeline, and its cost to the step."""

import dataclasses
from collections.abc import Iterator

from uni_moe_jax.data.pipeline.mixtures import Batch, Mixture
from uni_moe_jax.tools.bench.cases import Context, RepeatedStep
from uni_moe_jax.tools.bench.results_table import Budget, Row
from uni_moe_jax.tools.bench.timing import estimate, interleaved, per_second, ratio

_BUDGET = Budget(1.05, 1.02)
_PREFETCHED = 4  # batches that the pipeline may have ready: two are waiting, two are being made
_RECORDED = {'images/s': '14,000', 'videos/s': '90,000 frames a second'}  # from memory; file_rate.py has those of files
_STEPS = 100_000  # of a stream: more than are read


def input_rate(context: Context) -> list[Row]:
  """Measure images and videos per second, and the step on real batches against a constant batch."""
  s, config = context.sizes, context.own_config()
  config.train.mixture = 'all_tasks'
  step = RepeatedStep(context.build(config))
  run, calls, before, counts = step.run, {}, {}, {}
  for t in run.plan.tasks:
    if t.type.visual:
      stream = Stream(dataclasses.replace(run.mixture(), plan=run.plan.only(t.name)), s.steps)
      name = f'{t.name}, batches of {t.batch_size}'
      calls[name], before[name] = stream.drain, stream.skip
      counts[name] = t.batch_size * s.steps, 'videos/s' if stream.shape('pixels')[-4] > 1 else 'images/s'
  seconds = interleaved(calls, s.rounds, before=before)
  rows = [Row('input', name, per_second(count, seconds[name]), unit,
              note=f'pipeline only, on all cores; recorded on two cores: {_RECORDED[unit]}')
          for name, (count, unit) in counts.items()]
  real = Stream(run.mixture(), s.steps)

  def constant_steps():
    return [step() for _ in range(s.steps)][-1]

  def real_steps():
    return [step.step(run.put_batch(batch)) for batch in real.take(s.steps)][-1]

  seconds = interleaved({'real': real_steps, 'constant': constant_steps}, s.rounds, before={'real': real.skip})
  note = f'{s.steps} steps per round; {_PREFETCHED} batches are skipped before each, so that none is ready'
  slowdown = ratio(seconds['real'], seconds['constant'])
  return rows + [
      Row('input', 'constant-batch step', estimate(seconds['constant'] / s.steps), 's', note=note),
      Row('input', 'real-data step / constant-batch step', slowdown, 'x', _BUDGET, note)]


class Stream:
  """Batches of a mixture, one after another."""

  def __init__(self, mixture: Mixture, steps: int):
    """steps: batches per round."""
    self._batches, self._steps = mixture.iterate(0, _STEPS), steps
    self._first = next(self._batches)[1]

  def shape(self, field: str) -> tuple[int, ...]:
    """Return the shape of a field of the only group."""
    [fields] = self._first.values()
    return fields[field].shape

  def take(self, count: int) -> Iterator[Batch]:
    """Yield the next `count` batches."""
    for _ in range(count):
      yield next(self._batches)[1]

  def skip(self) -> None:
    """Discard the batches that may be ready when a round begins, as they cost the round nothing."""
    for _ in self.take(_PREFETCHED):
      pass

  def drain(self) -> None:
    """Read the batches of a round."""
    for _ in self.take(self._steps):
      pass
