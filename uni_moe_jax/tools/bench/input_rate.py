"""Subject: how fast the input pipeline is, and what it costs the step."""

import dataclasses
from collections.abc import Iterator

from uni_moe_jax.data.pipeline.mixtures import Batch, Mixture
from uni_moe_jax.tools.bench.cases import Context, Repeated
from uni_moe_jax.tools.bench.results_table import Budget, Row
from uni_moe_jax.tools.bench.timing import estimate, interleaved, per_second, ratio

_BUDGET = Budget(1.05, 1.02)
_AHEAD = 4  # batches that the pipeline may have ready: two that wait, two that are being made
_FOR_EVER = 100_000  # steps
_RECORDED = {'pictures/s': '14,000', 'clips/s': '90,000 frames a second'}  # from memory; as tools/bench/file_rate.py has those of files


def feeding(context: Context) -> list[Row]:
  """Pictures and clips per second, and the step on real batches against the step on one batch."""
  s, config = context.sizes, context.own_config()
  config.train.mixture = 'all_tasks'
  step = Repeated(context.build(config))
  run, calls, before, counts = step.run, {}, {}, {}
  for t in run.plan.tasks:
    if t.type.visual:
      stream = Stream(dataclasses.replace(run.mixture(), plan=run.plan.only(t.name)), s.steps)
      clip = stream.shape('pixels')[-4] > 1
      name = f'{t.name}, batches of {t.batch_size}'
      calls[name], before[name] = stream.drain, stream.skip
      counts[name] = t.batch_size * s.steps, 'clips/s' if clip else 'pictures/s'
  alone = interleaved(calls, s.rounds, before=before)
  rows = [Row('input', name, per_second(count, alone[name]), unit,
              note=f'pipeline alone, on all cores; recorded on two cores: {_RECORDED[unit]}')
          for name, (count, unit) in counts.items()]
  real = Stream(run.mixture(), s.steps)

  def constant_steps():
    return [step() for _ in range(s.steps)][-1]

  def real_steps():
    return [step.step(run.put_batch(batch)) for batch in real.take(s.steps)][-1]

  seconds = interleaved({'real': real_steps, 'constant': constant_steps}, s.rounds, before={'real': real.skip})
  note = f'{s.steps} steps per round; {_AHEAD} batches are thrown away before each, so that none is ready'
  return rows + [
      Row('input', 'constant-batch step', estimate(seconds['constant'] / s.steps), 's', note=note),
      Row('input', 'real-data step / constant-batch step', ratio(seconds['real'], seconds['constant']), 'x', _BUDGET, note)]


class Stream:
  """Batches of a mixture, on and on."""

  def __init__(self, mixture: Mixture, steps: int):
    self._batches, self._steps = mixture.iterate(0, _FOR_EVER), steps
    self._first = next(self._batches)[1]

  def shape(self, field: str) -> tuple[int, ...]:
    """Of a field of the only group."""
    [fields] = self._first.values()
    return fields[field].shape

  def take(self, count: int) -> Iterator[Batch]:
    """The next `count` batches."""
    for _ in range(count):
      yield next(self._batches)[1]

  def skip(self) -> None:
    """Throws away what may wait ready when a round begins: it was made at no cost to the round."""
    for _ in self.take(_AHEAD):
      pass

  def drain(self) -> None:
    """Reads the batches of a round."""
    for _ in self.take(self._steps):
      pass
