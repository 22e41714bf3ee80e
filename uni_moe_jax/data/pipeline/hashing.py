"""Hash-based order and randomness: pure functions of (seed, purpose, example), without state.

`mix` is SplitMix64's finalizer (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014). There is a
Python version for decisions of the host and a TensorFlow version for decisions per example; both give the same numbers.
"""

import functools
import zlib

import numpy as np
import tensorflow as tf

_GAMMA, _STEPS = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_MASK = (1 << 64) - 1
_MANTISSA = 24  # bits of a float32 in [0, 1)


def mix(*values: int | str | np.ndarray) -> int | np.ndarray:
  """Returns a 64-bit hash of integers and strings, or of arrays uint64 element by element; their order matters."""
  return functools.reduce(fold, values, 0)


def fold(h: int | np.ndarray, value: int | str | np.ndarray) -> int | np.ndarray:
  """Returns `mix` of the values of a hash and one more: what `mix_tensor` returns, as a number or an array."""
  if not isinstance(value, np.ndarray):
    value = zlib.crc32(value.encode()) if isinstance(value, str) else int(value)
  h = (h ^ value) + _GAMMA & _MASK
  for shift, factor in _STEPS:
    h = (h ^ h >> shift) * factor & _MASK
  return h ^ h >> 31


def mix_uniform(*values: int | str) -> float:
  """Returns a number in [0, 1] from `mix` of the values; 1 only by rounding."""
  return mix(*values) / 2**64


def mix_constant(*values: int | str) -> tf.Tensor:
  """Returns `mix` of the values as a tensor, uint64 scalar."""
  return _u64(mix(*values))


def _u64(value: int) -> tf.Tensor:
  return tf.constant(np.uint64(value & _MASK))


def mix_tensor(h: tf.Tensor, value: tf.Tensor | int | str) -> tf.Tensor:
  """Folds a value into hashes, uint64 [...], as `mix` with the value appended; both are broadcast."""
  if isinstance(value, str):
    value = zlib.crc32(value.encode())
  h = (h ^ (_u64(value) if isinstance(value, int) else tf.cast(value, tf.uint64))) + _u64(_GAMMA)
  for shift, factor in _STEPS:
    h = (h ^ tf.bitwise.right_shift(h, _u64(shift))) * _u64(factor)
  return h ^ tf.bitwise.right_shift(h, _u64(31))


def uniform(h: tf.Tensor) -> tf.Tensor:
  """Converts hashes to float32 in [0, 1), from their upper 24 bits."""
  return tf.cast(tf.bitwise.right_shift(h, _u64(64 - _MANTISSA)), tf.float32) * (1.0 / (1 << _MANTISSA))


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
