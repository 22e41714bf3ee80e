"""Hash-based order and randomness in TensorFlow: pure functions of (seed, purpose, example), without state.

The hashes are those of `utils/splitmix.py`, for decisions per example.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from uni_moe_jax.utils import splitmix

_MANTISSA = 24  # bits of a float32 in [0, 1)


def mix_constant(*values: int | str) -> tf.Tensor:
  """Returns `mix` of the values as a tensor, uint64 scalar."""
  return _u64(splitmix.mix(*values))


def _u64(value: int) -> tf.Tensor:
  return tf.constant(np.uint64(value & splitmix.MASK))


def mix_tensor(h: tf.Tensor, value: tf.Tensor | int | str) -> tf.Tensor:
  """Folds a value into hashes, uint64 [...], as `mix` with the value appended; both are broadcast."""
  value = _u64(splitmix.number(value)) if isinstance(value, int | str) else tf.cast(value, tf.uint64)
  h = (h ^ value) + _u64(splitmix.GAMMA)
  for shift, factor in splitmix.STEPS:
    h = (h ^ tf.bitwise.right_shift(h, _u64(shift))) * _u64(factor)
  return h ^ tf.bitwise.right_shift(h, _u64(splitmix.LAST_SHIFT))


def uniform(h: tf.Tensor) -> tf.Tensor:
  """Converts hashes to float32 in [0, 1), from their upper 24 bits."""
  return tf.cast(tf.bitwise.right_shift(h, _u64(64 - _MANTISSA)), tf.float32) * (1.0 / (1 << _MANTISSA))


def elementwise(function: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor) -> tf.Tensor:
  """Returns exp, cos, log … of x, float32 [...], to bits that do not depend on how many other values x has.

  Eigen computes packets of up to 16 values otherwise than those that are left over, so that there are none.
  """
  values = tf.reshape(x, [-1])
  n = tf.size(values)
  return tf.reshape(function(tf.pad(values, [[0, -n % 16]]))[:n], tf.shape(x))


def randint(h: tf.Tensor, bound: tf.Tensor | int) -> tf.Tensor:
  """Converts hashes to int32 in 0…bound-1 (bias below bound · 2^-64)."""
  return tf.cast(h % tf.cast(bound, tf.uint64), tf.int32)


def seeds(h: tf.Tensor, count: int) -> tf.Tensor:
  """Returns seeds of TensorFlow's random ops, int32 [..., count], not negative, from hashes [...]."""
  words = mix_tensor(h[..., None], tf.range(count, dtype=tf.int64))
  return tf.cast(words & _u64(0x7FFFFFFF), tf.int32)


def shuffled_ids(position: tf.Tensor, size: int, seed: int, name: str) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns (example ids in 0…size-1, epochs), int64 [n], at positions 0, 1, 2 … of an endless sequence of epochs.

  Every id occurs once per epoch. Two tasks (`name`) with the same source have different orders.
  """
  epoch, index = position // size, position % size
  # Adjacent seeds give correlated permutations, and 4 rounds (the default) a visible order: hash, and use 16 rounds.
  h = mix_tensor(mix_constant(seed, name, 'order'), epoch)
  ids = tf.raw_ops.RandomIndexShuffle(
      index=index, seed=seeds(h, 3), max_index=tf.cast(size - 1, tf.int64), rounds=16)
  return ids, epoch


def example_hash(seed: int, name: str, epoch: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
  """Returns uint64 [n], the base hash of an example in an epoch; fold a purpose into it before use."""
  return mix_tensor(mix_tensor(mix_constant(seed, name, 'example'), epoch), ids)
