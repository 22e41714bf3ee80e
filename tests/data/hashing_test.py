"""Hash-based order and randomness: equal in Python and TensorFlow, shuffled, without state."""

import numpy as np
import pytest
import tensorflow as tf

from uni_moe_jax.data import hashing
from uni_moe_jax.utils import splitmix

U64 = np.uint64


def _hashes(value):
  return tf.constant(np.array(value, U64))


def test_one_round_is_splitmix64_and_the_hash_depends_on_order_and_on_every_value():
  # The first output of SplitMix64 with seed 0 (Vigna's reference implementation): finalizer of 0 + gamma.
  assert splitmix.mix(0) == 0xE220A8397B1DCDAF
  assert len({splitmix.mix(*v) for v in ((1, 2), (2, 1), (1,), (1, 2, 0), (1, 3), ('1', 2))}) == 6


@pytest.mark.parametrize('value', [0, 1, -1, 2**31, 2**62, -2**62, 'shift down', 'größe'])
@pytest.mark.parametrize('start', [(), (7,), (7, 'glyphs', -3)])
def test_the_tensorflow_hash_equals_the_python_hash(start, value):
  folded = hashing.mix_tensor(_hashes(splitmix.mix(*start)), value)
  assert int(folded.numpy()) == splitmix.mix(*start, value)


def test_the_tensorflow_hash_broadcasts_tensors():
  rows, columns = [3, 2**40], [0, 1, -5]
  folded = hashing.mix_tensor(_hashes([[splitmix.mix(r)] for r in rows]), tf.constant([columns], tf.int64))
  expected = [[splitmix.mix(r, c) for c in columns] for r in rows]
  np.testing.assert_array_equal(folded, np.array(expected, U64))


def test_uniform_draws_are_uniform_and_the_upper_24_bits():
  draws = hashing.uniform(_hashes([0, 2**63, 2**64 - 1, 2**40 - 1]))
  np.testing.assert_array_equal(draws, np.array([0, .5, 1 - 2**-24, 0], np.float32))
  assert draws.dtype == tf.float32
  draws = hashing.uniform(hashing.mix_tensor(_hashes(splitmix.mix(3)), tf.range(40000, dtype=tf.int64))).numpy()
  counts = np.histogram(draws, bins=20, range=(0, 1))[0]
  assert abs(counts - 2000).max() < 5 * np.sqrt(2000)


@pytest.mark.parametrize('function', [tf.exp, tf.cos, tf.sin, tf.math.log])
def test_an_elementwise_function_of_a_value_does_not_depend_on_the_number_of_others(function):
  x = tf.constant(np.random.default_rng(0).random((20, 10)), tf.float32)
  expected = hashing.elementwise(function, x).numpy()
  np.testing.assert_allclose(expected, function(x), rtol=1e-6)
  for n in range(21):
    np.testing.assert_array_equal(hashing.elementwise(function, x[:n]), expected[:n])


def test_seeds_are_the_lower_31_bits_of_the_hash_with_a_number_appended():
  expected = [[splitmix.mix('a', epoch, k) & (2**31 - 1) for k in range(3)] for epoch in (5, 6)]
  h = hashing.mix_tensor(hashing.mix_constant('a'), tf.constant([5, 6], tf.int64))
  np.testing.assert_array_equal(hashing.seeds(h, 3), expected)
  np.testing.assert_array_equal(hashing.seeds(hashing.mix_constant('a', 5), 3), expected[0])
  assert hashing.seeds(h, 3).dtype == tf.int32


def test_randint_is_the_remainder():
  draws = hashing.randint(_hashes([0, 7, 10, 2**63 + 5]), 7)
  np.testing.assert_array_equal(draws, [0, 0, 3, (2**63 + 5) % 7])
  assert draws.dtype == tf.int32


def _epochs(size, epochs, seed=1, name='task'):
  ids, epoch = hashing.shuffled_ids(tf.range(size * epochs, dtype=tf.int64), size, seed, name)
  np.testing.assert_array_equal(epoch, np.repeat(np.arange(epochs), size))
  return ids.numpy().reshape(epochs, size)


@pytest.mark.parametrize('size', [1, 2, 3, 5, 64, 1000])
def test_each_epoch_is_a_permutation(size):
  for ids in _epochs(size, 3):
    assert sorted(ids.tolist()) == list(range(size))


def test_the_id_at_a_position_does_not_depend_on_other_positions():
  ids, epoch = hashing.shuffled_ids(tf.constant([150, 3], tf.int64), 100, 1, 'task')
  np.testing.assert_array_equal(ids, _epochs(100, 2).reshape(-1)[[150, 3]])
  np.testing.assert_array_equal(epoch, [1, 0])


@pytest.mark.parametrize('epoch, other', [(0, dict(seed=2)), (0, dict(name='other task')), (1, {})])
def test_seeds_tasks_and_epochs_have_different_orders(epoch, other):
  a, b = _epochs(5000, 1)[0], _epochs(5000, 1 + epoch, **other)[epoch]
  assert np.mean(a == b) < .003  # unrelated permutations agree at about one position
  assert abs(np.corrcoef(a, b)[0, 1]) < .06


@pytest.mark.parametrize('size', [5000, 100_000, 1_000_000])
def test_neighbors_are_uncorrelated(size):
  # With the operation's default of 4 rounds, the correlation at lag 1 is 0.4 at a million.
  ids, _ = hashing.shuffled_ids(tf.range(min(size, 20_000), dtype=tf.int64), size, 1, 'task')
  ids = ids.numpy()
  for lag in (1, 2):
    assert abs(np.corrcoef(ids[lag:], ids[:-lag])[0, 1]) < .05, lag


def test_the_hash_of_an_example_depends_on_seed_task_epoch_and_id():
  def example_hash(seed=0, name='a', epoch=0, example=5):
    epoch, ids = tf.constant([epoch], tf.int64), tf.constant([example], tf.int64)
    return int(hashing.example_hash(seed, name, epoch, ids)[0])

  changes = ({}, {'seed': 1}, {'name': 'b'}, {'epoch': 1}, {'example': 6})
  assert len({example_hash(**change) for change in (*changes, {})}) == 5
  assert example_hash(epoch=1) == splitmix.mix(0, 'a', 'example', 1, 5)
