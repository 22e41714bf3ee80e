"""Task interference: by hand, in closed form, and how often the intervals cover the truth."""

import weakref

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from uni_moe_jax.analysis import interference
from uni_moe_jax.analysis.interference import ALL


def _table(**tasks):
  """A gradient function from {task: (gradient of batch 0, 1, …)}; a gradient is {subset: vector} or a vector."""
  def gradient(task, batch):
    g = tasks[task][batch]
    subsets = g if isinstance(g, dict) else {'p': g}
    return {subset: {'w': jnp.asarray(x, jnp.float32)} for subset, x in subsets.items()}
  return gradient


def _measure(tasks, num_batches):
  products = interference.products(_table(**tasks), list(tasks), num_batches)[ALL]
  return products, interference.estimate(products, num_resamples=400)


# Norms 5 and 10; unit gradients (.6, .8) and (1, 0). Of 'other': (0, 1) and (1, 0), mean (.5, .5).
_HAND = dict(one=((3, 4), (10, 0)), other=((0, 5), (4, 0)))


def test_products_of_two_tasks_by_hand():
  products, _ = _measure(_HAND, 2)
  # one against itself without its own batch: (3, 4)·(1, 0) and (10, 0)·(.6, .8); other: orthogonal.
  np.testing.assert_allclose(products.rows[0, 0], [3, 6], rtol=1e-6)
  np.testing.assert_allclose(products.rows[1, 1], [0, 0], atol=1e-6)
  # one with other's mean: (3 + 4)/2, 10/2; other with one's mean (.8, .4): 5 · .4, 4 · .8.
  np.testing.assert_allclose(products.rows[0, 1], [3.5, 5], rtol=1e-6)
  np.testing.assert_allclose(products.rows[1, 0], [2, 3.2], rtol=1e-6)
  # The mean of one is (6.5, 2): other's directions (0, 1), (1, 0) lower its loss by 2 and 6.5; its own by 6 and 3.
  np.testing.assert_allclose(products.columns[0, 1], [2, 6.5], rtol=1e-6)
  np.testing.assert_allclose(products.columns[0, 0], [6, 3], rtol=1e-6)
  np.testing.assert_allclose(np.mean(products.rows, -1), np.mean(products.columns, -1), rtol=1e-6, atol=1e-6)


def test_both_ratios_by_hand():
  _, estimate = _measure(_HAND, 2)
  np.testing.assert_allclose(estimate.delta.value, [[4.5, 4.25], [2.6, 0]], rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(estimate.ratio_of_means.value[0], [1, 4.25 / 4.5], rtol=1e-6)
  np.testing.assert_allclose(estimate.mean_of_ratios.value[0], [1, (3.5 / 3 + 5 / 6) / 2], rtol=1e-6)
  for ratio in (estimate.ratio_of_means, estimate.mean_of_ratios):  # a task without a base has no ratios
    assert np.isnan(ratio.value[1]).all()


def test_gradients_of_the_caller_are_not_donated():
  gradients = {(t, b): {'p': jnp.asarray(g, jnp.float32)} for t, gs in _HAND.items() for b, g in enumerate(gs)}
  once, again = (interference.products(lambda t, b: gradients[t, b], list(_HAND), 2)[ALL].rows for _ in range(2))
  np.testing.assert_array_equal(once, again)
  assert not any(g['p'].is_deleted() for g in gradients.values())


def test_each_subset_has_its_own_directions_and_all_subsets_the_joint_one():
  tasks = dict(one=({'x': (3,), 'y': (4,)},) * 2, other=({'x': (-2,), 'y': (2,)},) * 2)
  products = interference.products(_table(**tasks), ['one', 'other'], 2)
  assert list(products) == [ALL, 'x', 'y']
  ratio = {subset: interference.estimate(p).ratio_of_means.value[0, 1] for subset, p in products.items()}
  assert ratio['x'] == pytest.approx(-1) and ratio['y'] == pytest.approx(1)
  assert ratio[ALL] == pytest.approx((4 - 3) / 2**.5 / 5)  # (3, 4)·(-1, 1)/√2, over ‖(3, 4)‖


def test_a_task_without_gradient_has_no_ratios_and_changes_no_loss():
  _, estimate = _measure(dict(one=((3, 4), (3, 4)), absent=((0, 0), (0, 0))), 2)
  np.testing.assert_array_equal(estimate.ratio_of_means.value, [[1, 0], [np.nan, np.nan]])
  np.testing.assert_array_equal(estimate.delta.high[1], [0, 0])


def test_one_batch_is_not_enough():
  with pytest.raises(ValueError, match='num_batches=1 must be at least 2'):
    interference.products(_table(**_HAND), ['one', 'other'], 1)


def test_gradients_are_streamed_computed_twice_and_few_are_in_memory():
  calls, alive, most = [], [], 0

  def gradient(task, batch):
    nonlocal most
    calls.append((task, batch))
    most = max(most, sum(r() is not None for r in alive))
    tree = {'p': jnp.full((3,), float(batch + 1))}
    alive.append(weakref.ref(tree['p']))
    return tree

  tasks, batches = ['a', 'b', 'c'], 9
  interference.products(gradient, tasks, batches)
  assert calls == 2 * [(t, b) for t in tasks for b in range(batches)]
  assert most <= 4, most


# Quadratic losses L_i(θ) = ½‖θ - c_i‖²: a batch's gradient is θ - c_i with noise, I(i, j) the cosine of the means.
_DIM = 12


def _noisy(means, batches, seed, noise=2.0):
  rng = np.random.default_rng(seed)
  return {name: np.asarray(m) + noise * rng.normal(size=(batches, _DIM)) for name, m in means.items()}


_DIRECTION = np.linspace(1, -1, _DIM) * 2


def test_quadratic_losses_by_closed_form_without_noise():
  theta, centers = np.array([1., 2.]), dict(a=(-2., -2.), b=(1., -4.), c=(5., 6.))
  gradients = {name: (theta - np.array(c),) * 2 for name, c in centers.items()}  # (3, 4), (0, 6), (-4, -4)
  _, estimate = _measure(gradients, 2)
  s = 2**.5
  expected = [[1, 4 / 5, -7 / 5 / s], [4 / 5, 1, -1 / s], [-7 / 5 / s, -1 / s, 1]]
  for ratio in (estimate.ratio_of_means, estimate.mean_of_ratios):
    np.testing.assert_allclose(list(vars(ratio).values()), [expected] * 3, rtol=1e-6)


def test_intervals_cover_the_truth_about_as_often_as_stated():
  """The directions are uncertain too: intervals from the batches of the affected task alone would cover about half."""
  means, covered, repeats = {'i': _DIRECTION, 'twin': _DIRECTION}, 0, 150
  for seed in range(repeats):
    estimate = interference.estimate(_by_hand(_noisy(means, 12, seed)), num_resamples=300, seed=seed)
    covered += estimate.ratio_of_means.low[0, 1] < 1 < estimate.ratio_of_means.high[0, 1]
  assert 0.88 <= covered / repeats <= 0.995, covered / repeats


def _units(g):
  return {k: v / np.linalg.norm(v, axis=1, keepdims=True) for k, v in g.items()}


def _by_hand(g):
  """Products of [N, D] arrays with all gradients in memory: an independent computation."""
  names, N, unit = list(g), len(next(iter(g.values()))), _units(g)
  rows, columns = np.zeros((2, len(names), len(names), N))
  for i, a in enumerate(names):
    for j, b in enumerate(names):
      dots = g[a] @ unit[b].T
      mask = 1 - np.eye(N) if i == j else np.ones((N, N))
      rows[i, j], columns[i, j] = (dots * mask).sum(1) / mask.sum(1), (dots * mask).sum(0) / mask.sum(0)
  return interference.Products(rows, columns)


def test_streaming_equals_the_computation_with_all_gradients_in_memory():
  g = _noisy({'i': _DIRECTION, 'j': np.ones(_DIM), 'k': -_DIRECTION}, 5, seed=3)
  products, _ = _measure(g, 5)
  chex.assert_trees_all_close(products, _by_hand(g), rtol=1e-4, atol=1e-5)


def test_resampling_equals_its_definition_to_first_order():
  """The width of the interval against that of ratios recomputed from all N² products of resampled batches."""
  N, g = 40, _noisy({'i': _DIRECTION, 'j': -_DIRECTION + 1}, 40, seed=4)
  rng, draws, unit = np.random.default_rng(0), [], _units(g)
  for _ in range(600):
    w = {k: rng.multinomial(N, np.full(N, 1 / N)) / N for k in g}
    own = np.outer(w['i'], w['i']) * (1 - np.eye(N))
    draws.append((w['i'] @ g['i'] @ unit['j'].T @ w['j']) / ((own * (g['i'] @ unit['i'].T)).sum() / own.sum()))
  estimate = interference.estimate(_by_hand(g), num_resamples=600).ratio_of_means
  width = estimate.high[0, 1] - estimate.low[0, 1]
  expected = np.subtract(*np.quantile(draws, (.975, .025)))
  assert width == pytest.approx(expected, rel=.2)


def test_estimates_repeat_with_their_seed_and_only_with_it():
  products, _ = _measure(_noisy({'i': _DIRECTION, 'j': np.ones(_DIM)}, 6, seed=5), 6)
  one, two, other = (interference.estimate(products, num_resamples=50, seed=s).ratio_of_means for s in (1, 1, 2))
  np.testing.assert_array_equal(one.low, two.low)
  assert (one.low != other.low).any() and (one.value == other.value).all()
