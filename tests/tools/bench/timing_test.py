"""Statistics of rounds: medians, ratios of medians, spreads; and the order of interleaved rounds."""

import jax.numpy as jnp
import numpy as np
import pytest

from uni_moe_jax.tools.bench import timing


@pytest.mark.parametrize('estimate, quartiles', [
    # Sorted: 1 2 3 4 10. Quartiles are at positions 1 and 3 of 0…4. The outlier moves none of them.
    (timing.estimate(np.array([3, 1, 10, 2, 4])), (2, 3, 4)),
    # Quartiles between samples are interpolated: positions 0.75, 1.5 and 2.25 of 0…3.
    (timing.estimate(np.array([0, 4, 8, 16])), (3, 6, 10)),
    # A single measurement has no spread.
    (timing.estimate(np.array([5.0])), (None, 5.0, None)),
    # A machine that slows down does not change a round's ratio.
    (timing.ratio(np.array([3, 6, 12, 24]), np.array([1, 2, 4, 8])), (3, 3, 3)),
    # A rate is high if seconds are few. 12 items in 1, 2, 3, 4, 6 s: 12, 6, 4, 3, 2 per second.
    (timing.per_second(12, np.array([1, 2, 3, 4, 6])), (3, 4, 6)),
])
def test_median_and_quartiles_by_hand(estimate, quartiles):
  assert (estimate.low, estimate.value, estimate.high) == quartiles


def test_a_ratio_is_of_medians_and_its_spread_of_the_rounds_own_ratios():
  # Medians 4 and 2: ratio 2. Rounds' own ratios: 4, 2, 1 (median 2), 8/3, 1 → sorted 1 1 2 8/3 4: quartiles 1 and 8/3.
  result = timing.ratio(np.array([4, 4, 2, 8, 3]), np.array([1, 2, 2, 3, 3]))
  assert result.value == 2
  assert (result.low, result.high) == pytest.approx((1, 8 / 3))
  # 6 / 3 = 2, whereas the rounds' own ratios are 1/3, 3, 6 with median 3.
  assert timing.ratio(np.array([1, 9, 6]), np.array([3, 3, 1])).value == 2


class _Clock:
  """Advances by the given seconds of each call."""

  def __init__(self):
    self.now, self.log = 0.0, []

  def call(self, name: str, seconds: float):
    def run():
      self.log.append(name)
      self.now += seconds
      return jnp.zeros(())
    return run


def test_every_call_runs_once_first_and_then_once_per_round_in_rotating_order():
  clock = _Clock()
  calls = {name: clock.call(name, s) for name, s in (('a', 2), ('b', 5), ('c', 1))}
  seconds = timing.interleaved(calls, 4, clock=lambda: clock.now)
  assert ''.join(clock.log) == 'abc' 'abc' 'bca' 'cab' 'abc'
  assert {name: s.tolist() for name, s in seconds.items()} == {'a': [2] * 4, 'b': [5] * 4, 'c': [1] * 4}


def test_each_call_gets_its_own_seconds_without_the_first_run_and_without_its_preparation():
  clock = _Clock()
  calls, before = {'a': clock.call('a', 2), 'b': clock.call('b', 5)}, {'b': clock.call('p', 100)}
  seconds = timing.interleaved(calls, 2, before=before, clock=lambda: clock.now)
  assert ''.join(clock.log) == 'apb' 'apb' 'pba'
  np.testing.assert_array_equal(seconds['a'], [2, 2])
  np.testing.assert_array_equal(seconds['b'], [5, 5])
