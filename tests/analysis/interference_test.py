"""Task interference: against numbers worked out by hand, against losses that are known, and how often intervals hold."""

import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from uni_moe_jax.analysis import interference
from uni_moe_jax.analysis.interference import WHOLE


def _table(**tasks):
  """A gradient function from {task: (gradient of batch 0, of batch 1, …)}; a gradient is {part: vector} or a vector."""
  def gradient(task, batch):
    g = tasks[task][batch]
    return {name: {'w': jnp.asarray(x, jnp.float32)} for name, x in (g if isinstance(g, dict) else {'p': g}).items()}
  return gradient


def _measure(tasks, batches, streams=(), part=WHOLE):
  found = interference.products(_table(**tasks), list(tasks), batches, streams)
  return found[part], interference.estimate(found[part], streams or list(tasks), resamples=400)


# Norms 5 and 10; unit gradients (.6, .8) and (1, 0). Of 'other': (0, 1) and (1, 0), mean (.5, .5).
_HAND = dict(one=((3, 4), (10, 0)), other=((0, 5), (4, 0)))


def test_products_of_two_tasks_by_hand():
  products, _ = _measure(_HAND, 2)
  # one against itself without its own batch: (3, 4)·(1, 0) and (10, 0)·(.6, .8); other: at right angles.
  np.testing.assert_allclose(products.rows[0, 0], [3, 6], rtol=1e-6)
  np.testing.assert_allclose(products.rows[1, 1], [0, 0], atol=1e-6)
  # one with other's mean: (3 + 4)/2, 10/2; other with one's mean (.8, .4): 5 · .4, 4 · .8.
  np.testing.assert_allclose(products.rows[0, 1], [3.5, 5], rtol=1e-6)
  np.testing.assert_allclose(products.rows[1, 0], [2, 3.2], rtol=1e-6)
  # The mean of one is (6.5, 2): other's directions (0, 1), (1, 0) take 2 and 6.5 from it; its own take 10 · .6 and 3.
  np.testing.assert_allclose(products.columns[0, 1], [2, 6.5], rtol=1e-6)
  np.testing.assert_allclose(products.columns[0, 0], [6, 3], rtol=1e-6)
  np.testing.assert_allclose(np.mean(products.rows, -1), np.mean(products.columns, -1), rtol=1e-6, atol=1e-6)


def test_both_ratios_by_hand():
  _, found = _measure(_HAND, 2)
  np.testing.assert_allclose(found.delta.value, [[4.5, 4.25], [2.6, 0]], rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(found.ratio_of_means.value[0], [1, 4.25 / 4.5], rtol=1e-6)
  np.testing.assert_allclose(found.mean_of_ratios.value[0], [1, (3.5 / 3 + 5 / 6) / 2], rtol=1e-6)
  for ratio in (found.ratio_of_means, found.mean_of_ratios):  # a task without a base has no ratios
    assert np.isnan(ratio.value[1]).all()


def test_resampled_batches_count_as_harmed_and_as_stepped_ones_by_hand():
  products, _ = _measure(_HAND, 2)
  weights = np.array([[[1, 1], [2, 0]]])  # both batches of one; of other the first, twice
  delta, ratio, mean = interference._ratios(np.asarray(products.rows), np.asarray(products.columns), weights)
  # The mean of one, (6.5, 2), along other's (0, 1); other's (0, 5) along one's mean (.8, .4).
  np.testing.assert_allclose(delta[0], [[4.5, 2], [2, 0]], rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(ratio[0, 0], [1, 2 / 4.5], rtol=1e-6)
  # Every Δ moves with the mean, by 2 - 4.25.
  np.testing.assert_allclose(mean[0, 0], [1, (1.25 / 3 + 2.75 / 6) / 2], rtol=1e-6)


def test_gradients_that_the_caller_keeps_stay_his():
  held = {(t, b): {'p': jnp.asarray(g, jnp.float32)} for t, gs in _HAND.items() for b, g in enumerate(gs)}
  once, again = (interference.products(lambda t, b: held[t, b], list(_HAND), 2)[WHOLE].rows for _ in range(2))
  np.testing.assert_array_equal(once, again)
  assert not any(g['p'].is_deleted() for g in held.values())


def test_tasks_that_share_their_batches_are_compared_on_different_ones():
  products, _ = _measure(_HAND, 2, streams=('s', 's'))
  np.testing.assert_allclose(products.rows[0, 1], [3, 0], rtol=1e-6, atol=1e-6)  # (3, 4)·(1, 0), (10, 0)·(0, 1)
  np.testing.assert_allclose(products.rows[1, 0], [0, 2.4], rtol=1e-6, atol=1e-6)  # (0, 5)·(1, 0), (4, 0)·(.6, .8)
  np.testing.assert_allclose(products.columns[0, 1], [0, 3], rtol=1e-6, atol=1e-6)  # as rows, batch by batch of other
  np.testing.assert_allclose(products.rows[0, 0], [3, 6], rtol=1e-6)


def test_each_part_has_its_own_directions_and_the_whole_has_the_joint_one():
  tasks = dict(one=({'x': (3,), 'y': (4,)},) * 2, other=({'x': (-2,), 'y': (2,)},) * 2)
  found = interference.products(_table(**tasks), ['one', 'other'], 2)
  assert list(found) == [WHOLE, 'x', 'y']
  ratio = {part: interference.estimate(p, ['one', 'other']).ratio_of_means.value[0, 1] for part, p in found.items()}
  assert ratio['x'] == pytest.approx(-1) and ratio['y'] == pytest.approx(1)
  assert ratio[WHOLE] == pytest.approx((4 - 3) / 2**.5 / 5)  # (3, 4)·(-1, 1)/√2, over ‖(3, 4)‖


def test_a_task_that_does_not_reach_the_parameters_has_no_ratios_and_harms_nobody():
  tasks = dict(one=((3, 4), (3, 4)), absent=((0, 0), (0, 0)))
  _, found = _measure(tasks, 2)
  np.testing.assert_array_equal(found.ratio_of_means.value, [[1, 0], [np.nan, np.nan]])
  np.testing.assert_array_equal(found.delta.high[1], [0, 0])


def test_one_batch_is_not_enough():
  with pytest.raises(ValueError, match='batches=1 must be at least 2'):
    interference.products(_table(**_HAND), ['one', 'other'], 1)


def test_gradients_are_streamed_each_asked_twice_and_few_held():
  asked, alive, most = [], [], 0

  def gradient(task, batch):
    nonlocal most
    asked.append((task, batch))
    most = max(most, sum(r() is not None for r in alive))
    tree = {'p': jnp.full((3,), float(batch + 1))}
    alive.append(weakref.ref(tree['p']))
    return tree

  tasks, batches = ['a', 'b', 'c'], 9
  interference.products(gradient, tasks, batches)
  assert asked == 2 * [(t, b) for t in tasks for b in range(batches)]
  assert most <= 4, most


# Quadratic losses L_i(θ) = ½‖θ - c_i‖²: a batch's gradient is θ - c_i with noise, and I(i, j) is the cosine of the means.
_DIM = 12


def _noisy(means, batches, seed, noise=2.0):
  rng = np.random.default_rng(seed)
  return {name: tuple(np.asarray(m) + noise * rng.normal(size=(batches, _DIM))) for name, m in means.items()}


_DIRECTION = np.linspace(1, -1, _DIM) * 2


@pytest.mark.parametrize('j, truth', [('opposite', -1), ('twin', 1)])
def test_opposite_tasks_are_minus_one_and_one_task_under_two_names_is_one_within_the_interval(j, truth):
  means = {'i': _DIRECTION, j: truth * _DIRECTION}
  _, found = _measure(_noisy(means, 24, seed=1, noise=1.0), 24)
  for ratio in (found.ratio_of_means, found.mean_of_ratios):
    assert ratio.low[0, 1] < truth < ratio.high[0, 1]
    assert -truth < ratio.low[0, 1] or ratio.high[0, 1] < -truth  # an interval that says something
  assert found.ratio_of_means.high[0, 1] - found.ratio_of_means.low[0, 1] < 0.5
  assert found.ratio_of_means.low[0, 0] == found.ratio_of_means.high[0, 0] == 1


def test_quadratic_losses_by_closed_form_without_noise():
  theta, centres = np.array([1., 2.]), dict(a=(-2., -2.), b=(1., -4.), c=(5., 6.))
  gradients = {name: (theta - np.array(c),) * 2 for name, c in centres.items()}  # (3, 4), (0, 6), (-4, -4)
  _, found = _measure(gradients, 2)
  s = 2**.5
  expected = [[1, 4 / 5, -7 / 5 / s], [4 / 5, 1, -1 / s], [-7 / 5 / s, -1 / s, 1]]
  for ratio in (found.ratio_of_means, found.mean_of_ratios):
    np.testing.assert_allclose(ratio.value, expected, rtol=1e-6)
    np.testing.assert_allclose(ratio.low, expected, rtol=1e-6)
    np.testing.assert_allclose(ratio.high, expected, rtol=1e-6)
  # Of six pairs: 4/5 twice, -7/5/√2 and -1/√2 twice.
  for found_at, share in ((found.between, (8 / 5 - 24 / 5 / s) / 6), (found.negative, 4 / 6)):
    np.testing.assert_allclose(list(vars(found_at).values()), [share] * 3, rtol=1e-6)


def test_what_holds_for_all_pairs_has_an_interval_and_leaves_out_rows_without_a_base():
  means = {'i': _DIRECTION, 'j': -_DIRECTION, 'lost': 0 * _DIRECTION}
  _, found = _measure(_noisy(means, 24, seed=1, noise=1.0), 24)
  assert found.delta.low[2, 2] < 0 < found.delta.low[0, 0]
  counted = found.ratio_of_means.value[[0, 0, 1, 1], [1, 2, 0, 2]]  # not the third row
  assert found.between.value == pytest.approx(counted.mean())
  assert found.between.low < -.5 < found.between.high < 0  # the truth: -1, 0, -1, 0
  assert found.negative.value == (counted < 0).mean() >= .5 and found.negative.low >= .5
  _, nobody = _measure(_noisy({'a': 0 * _DIRECTION, 'b': 0 * _DIRECTION}, 6, seed=1), 6)
  assert np.isnan([*vars(nobody.between).values(), *vars(nobody.negative).values()]).all()


def test_intervals_hold_the_truth_about_as_often_as_they_say():
  """Directions drawn once are part of what is uncertain: intervals from the harmed task's batches alone would hold half."""
  means = {'i': _DIRECTION, 'twin': _DIRECTION}
  held, repeats = 0, 150
  for seed in range(repeats):
    g = {k: np.array(v) for k, v in _noisy(means, 12, seed).items()}
    found = interference.estimate(_by_hand(g), list(g), resamples=300, seed=seed)
    held += found.ratio_of_means.low[0, 1] < 1 < found.ratio_of_means.high[0, 1]
  assert 0.88 <= held / repeats <= 0.995, held / repeats


def _by_hand(g):
  """Products of [N, D] arrays with all gradients at once: an independent way to them."""
  names, N = list(g), len(next(iter(g.values())))
  unit = {k: v / np.linalg.norm(v, axis=1, keepdims=True) for k, v in g.items()}
  rows, columns = np.zeros((2, len(names), len(names), N))
  for i, a in enumerate(names):
    for j, b in enumerate(names):
      dots = g[a] @ unit[b].T
      mask = 1 - np.eye(N) if i == j else np.ones((N, N))
      rows[i, j], columns[i, j] = (dots * mask).sum(1) / mask.sum(1), (dots * mask).sum(0) / mask.sum(0)
  return interference.Products(rows, columns)


def test_streaming_gives_what_holding_all_gradients_gives():
  g = _noisy({'i': _DIRECTION, 'j': np.ones(_DIM), 'k': -_DIRECTION}, 5, seed=3)
  products, _ = _measure(g, 5)
  expected = _by_hand({k: np.array(v) for k, v in g.items()})
  np.testing.assert_allclose(products.rows, expected.rows, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(products.columns, expected.columns, rtol=1e-4, atol=1e-5)


def test_resampling_is_that_of_the_definition_to_first_order():
  """Draws of the ratio against recomputing it from all N² products of resampled batches."""
  N, g = 40, {k: np.array(v) for k, v in _noisy({'i': _DIRECTION, 'j': -_DIRECTION + 1}, 40, seed=4).items()}
  rng, draws = np.random.default_rng(0), []
  unit = {k: v / np.linalg.norm(v, axis=1, keepdims=True) for k, v in g.items()}
  for _ in range(600):
    w = {k: rng.multinomial(N, np.full(N, 1 / N)) / N for k in g}
    own = np.outer(w['i'], w['i']) * (1 - np.eye(N))
    draws.append((w['i'] @ g['i'] @ unit['j'].T @ w['j']) / ((own * (g['i'] @ unit['i'].T)).sum() / own.sum()))
  found = interference.estimate(_by_hand(g), list(g), resamples=600).ratio_of_means
  width = found.high[0, 1] - found.low[0, 1]
  expected = np.subtract(*np.quantile(draws, (.975, .025)))
  assert width == pytest.approx(expected, rel=.2)


def test_estimates_repeat_with_their_seed_and_only_with_it():
  g = _noisy({'i': _DIRECTION, 'j': np.ones(_DIM)}, 6, seed=5)
  products, _ = _measure(g, 6)
  one, two, other = (interference.estimate(products, list(g), resamples=50, seed=s).ratio_of_means for s in (1, 1, 2))
  np.testing.assert_array_equal(one.low, two.low)
  assert (one.low != other.low).any() and (one.value == other.value).all()
