"""What is concluded from rounds: medians, ratios of medians, spreads; and that rounds are interleaved."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from uni_moe_jax.tools.bench import timing


class EstimateTest(parameterized.TestCase):

  def test_median_and_quartiles_by_hand(self):
    # Sorted: 1 2 3 4 10. Quartiles lie at places 1 and 3 of 0…4. The outlier moves none of them.
    found = timing.estimate(np.array([3, 1, 10, 2, 4]))
    self.assertEqual((found.low, found.value, found.high), (2, 3, 4))

  def test_quartiles_between_samples_are_interpolated(self):
    # Places 0.75, 1.5 and 2.25 of 0…3.
    found = timing.estimate(np.array([0, 4, 8, 16]))
    self.assertEqual((found.low, found.value, found.high), (3, 6, 10))

  def test_what_was_measured_once_has_no_spread(self):
    self.assertEqual(timing.estimate(np.array([5.0])), timing.Estimate(5.0, None, None))

  def test_a_ratio_is_of_medians_and_its_spread_of_the_rounds_own_ratios(self):
    # Medians 4 and 2: ratio 2. Rounds' own ratios: 4, 2, 1 (median 2), 8/3, 1 → sorted 1 1 2 8/3 4: quartiles 1 and 8/3.
    found = timing.ratio(np.array([4, 4, 2, 8, 3]), np.array([1, 2, 2, 3, 3]))
    self.assertEqual(found.value, 2)
    self.assertAlmostEqual(found.low, 1)
    self.assertAlmostEqual(found.high, 8 / 3)

  def test_a_ratio_of_medians_is_not_the_median_of_ratios(self):
    # 6 / 3 = 2, whereas the rounds' own ratios are 1/3, 3, 6 with median 3.
    self.assertEqual(timing.ratio(np.array([1, 9, 6]), np.array([3, 3, 1])).value, 2)

  def test_a_machine_that_slows_down_does_not_change_a_rounds_ratio(self):
    slower = np.array([1, 2, 4, 8])
    found = timing.ratio(3 * slower, slower)
    self.assertEqual((found.low, found.value, found.high), (3, 3, 3))

  def test_a_rate_is_high_where_seconds_are_few(self):
    # 12 things in 1, 2, 3, 4, 6 s: 12, 6, 4, 3, 2 a second.
    found = timing.per_second(12, np.array([1, 2, 3, 4, 6]))
    self.assertEqual((found.low, found.value, found.high), (3, 4, 6))


class Clock:
  """Goes on by what the calls say they take."""

  def __init__(self):
    self.now, self.log = 0.0, []

  def call(self, name: str, seconds: float):
    def run():
      self.log.append(name)
      self.now += seconds
      return jnp.zeros(())
    return run


class InterleavedTest(absltest.TestCase):

  def test_every_call_runs_once_beforehand_and_once_a_round_in_turning_order(self):
    clock = Clock()
    calls = {name: clock.call(name, 1) for name in 'abc'}
    timing.interleaved(calls, 4, clock=lambda: clock.now)
    self.assertEqual(''.join(clock.log), 'abc' 'abc' 'bca' 'cab' 'abc')

  def test_each_is_given_its_own_seconds_and_the_first_run_is_left_out(self):
    clock = Clock()
    seconds = timing.interleaved({'a': clock.call('a', 2), 'b': clock.call('b', 5)}, 3, clock=lambda: clock.now)
    np.testing.assert_array_equal(seconds['a'], [2, 2, 2])
    np.testing.assert_array_equal(seconds['b'], [5, 5, 5])

  def test_what_is_done_before_a_call_is_not_timed(self):
    clock = Clock()
    before = {'b': clock.call('p', 100)}
    seconds = timing.interleaved({'a': clock.call('a', 2), 'b': clock.call('b', 5)}, 2, before=before, clock=lambda: clock.now)
    self.assertEqual(''.join(clock.log), 'apb' 'apb' 'pba')
    np.testing.assert_array_equal(seconds['b'], [5, 5])


if __name__ == '__main__':
  absltest.main()
