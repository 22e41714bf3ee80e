"""Order and randomness of the data as pure functions of (seed, purpose, example): no state, nothing to save.

`mix` is SplitMix64's finaliser (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), in numpy for
what the host decides and in TensorFlow for what a pipeline decides per example; both give the same numbers.
"""

import zlib

import numpy as np
import tensorflow as tf

_GAMMA = 0x9E3779B97F4A7C15
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_MASK = (1 << 64) - 1
_MANTISSA = 24  # bits of a float32 in [0, 1)


def mix(*values: int | str) -> int:
  """A 64-bit hash of integers and strings, order-sensitive."""
  h = 0
  for v in values:
    v = zlib.crc32(v.encode()) if isinstance(v, str) else int(v)
    h = (h ^ v) + _GAMMA & _MASK
    for shift, factor in _STEPS:
      h = (h ^ h >> shift) * factor & _MASK
    h ^= h >> 31
  return h


def _u64(value: int) -> tf.Tensor:
  return tf.constant(np.uint64(value & _MASK))


def mix_tensor(h: tf.Tensor, value: tf.Tensor | int | str) -> tf.Tensor:
  """Folds one more value into hashes: uint64 [...], broadcast against `value`; equals `mix` with it appended."""
  if isinstance(value, str):
    value = zlib.crc32(value.encode())
  value = _u64(value) if isinstance(value, int) else tf.cast(value, tf.uint64)
  h = tf.bitwise.bitwise_xor(*_broadcast(h, value)) + _u64(_GAMMA)
  for shift, factor in _STEPS:
    h = tf.bitwise.bitwise_xor(h, tf.bitwise.right_shift(h, _u64(shift))) * _u64(factor)
  return tf.bitwise.bitwise_xor(h, tf.bitwise.right_shift(h, _u64(31)))


def _broadcast(a: tf.Tensor, b: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  shape = tf.broadcast_dynamic_shape(tf.shape(a), tf.shape(b))
  return tf.broadcast_to(a, shape), tf.broadcast_to(b, shape)


def uniform(h: tf.Tensor) -> tf.Tensor:
  """float32 in [0, 1) from hashes: the upper 24 bits."""
  return tf.cast(tf.bitwise.right_shift(h, _u64(64 - _MANTISSA)), tf.float32) * (1.0 / (1 << _MANTISSA))


def below(h: tf.Tensor, bound: tf.Tensor | int) -> tf.Tensor:
  """int32 in 0…bound-1 from hashes (bias below bound · 2^-64)."""
  return tf.cast(h % tf.cast(bound, tf.uint64), tf.int32)


def permuted(position: tf.Tensor, size: int, seed: int, name: str) -> tuple[tf.Tensor, tf.Tensor]:
  """Example ids at positions of an endless sequence of shuffled epochs.

  Args:
    position: int64 [n], 0, 1, 2 …; position // size is the epoch.
    size: N.
    seed: of the run. name: of the task; two tasks of one source have orders of their own.

  Returns:
    (id int64 [n] in 0…N-1, epoch int64 [n]). Within an epoch every id occurs once.
  """
  epoch, index = position // size, position % size
  # Neighbouring seeds give correlated permutations, and 4 rounds (the default) a visible order: hash, and 16 rounds.
  h = mix_tensor(_u64(mix(seed, name, 'order')), epoch)
  thirds = [tf.cast(tf.bitwise.bitwise_and(mix_tensor(h, k), _u64(0x7FFFFFFF)), tf.int32) for k in range(3)]
  ids = tf.raw_ops.RandomIndexShuffle(
      index=index, seed=tf.stack(thirds, axis=-1), max_index=tf.cast(size - 1, tf.int64), rounds=16)
  return ids, epoch


def example_hash(seed: int, name: str, epoch: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
  """uint64 [n]: what the randomness of one example in one epoch starts from; fold in a purpose."""
  return mix_tensor(mix_tensor(_u64(mix(seed, name, 'example')), epoch), ids)
