"""Mixup and cutmix: neighbours of a batch are mixed with each other, pixels and labels alike.

Zhang et al., mixup (2018); Yun et al., CutMix (2019). Examples 2k and 2k + 1 of the global batch are mixed, which lie on one
shard, so that the batch is the same on any mesh; each pair has a share of its own (the published system mixes with the reversed
batch of its process, with one share for all).
"""

import numpy as np
import tensorflow as tf

from uni_moe_jax.data.pipeline import hashing

SWITCH = 0.5  # where both are on: how often a pair is cut instead of blended


def shares(alpha: float, pairs: int, seed: int, name: str, count: tf.Tensor) -> tf.Tensor:
  """λ ~ Beta(α, α) of every pair of a global batch: f32 [pairs]. count: which batch of the task."""
  h = hashing.mix_tensor(tf.constant(np.uint64(hashing.mix(seed, name, 'mix'))), count)
  words = tf.bitwise.bitwise_and(hashing.mix_tensor(h, tf.range(4, dtype=tf.int64)), 0x7FFFFFFF)
  words = tf.cast(words, tf.int32)
  # Mixup and cutmix of one α are never on for one pair: they may share their draws.
  a, b = (tf.random.stateless_gamma([pairs], words[2 * i:2 * i + 2], alpha, dtype=tf.float32) for i in range(2))
  return a / tf.maximum(a + b, 1e-30)


def mix(
    fields: dict[str, tf.Tensor], blended: tf.Tensor | None, boxed: tf.Tensor | None, place: tf.Tensor, hashes: tf.Tensor
) -> dict[str, tf.Tensor]:
  """Fields with pixels mixed and two labels each.

  Args:
    fields: pixels uint8 [n, T, S, S, C], label int32 [n, 1], weight f32 [n, 1], …; rows 2k and 2k + 1 are a pair.
    blended, boxed: f32 [n], λ of each row's pair for mixup and for cutmix; None: it is off. Not both.
    place: f32 [n, 2] in [0, 1), middle of the pair's box: down, right.
    hashes: uint64 [n], equal within a pair: whether it is blended or cut where both are on.

  Returns:
    The fields; label int32 [n, 2]: its own and the other's; weight f32 [n, 2], λ and 1 - λ times the old weight.
  """
  pixels = fields['pixels']
  n, S = tf.shape(pixels)[0], pixels.shape[2]
  other = tf.reshape(tf.reverse(tf.reshape(tf.range(n), [-1, 2]), [1]), [-1])
  theirs = tf.gather(pixels, other)
  share, box = (boxed if blended is None else blended), (blended if boxed is None else boxed)
  # The box has a share 1 - λ of the area, and is cut off at the edges: λ is what is left.
  side = tf.sqrt(1 - box)[:, None] * S
  middle = tf.floor(place * S)
  low = tf.clip_by_value(tf.floor(middle - side / 2 + 0.5), 0.0, float(S))
  high = tf.clip_by_value(tf.floor(middle + side / 2 + 0.5), 0.0, float(S))
  at = tf.range(S, dtype=tf.float32)
  rows = (at >= low[:, :1]) & (at < high[:, :1])
  columns = (at >= low[:, 1:]) & (at < high[:, 1:])
  inside = (rows[:, :, None] & columns[:, None, :])[:, None, :, :, None]
  kept = 1 - tf.reduce_prod(high - low, axis=1) / (S * S)
  cut = tf.where(inside, theirs, pixels)
  by = tf.reshape(share, [-1, 1, 1, 1, 1])
  blend = tf.saturate_cast(
      tf.round(by * tf.cast(pixels, tf.float32) + (1 - by) * tf.cast(theirs, tf.float32)), tf.uint8)
  cuts = 0.0 if boxed is None else 1.0 if blended is None else SWITCH  # how often
  is_cut = hashing.uniform(hashing.mix_tensor(hashes, 'cut')) < cuts
  share = tf.where(is_cut, kept, share)
  label, weight = fields['label'], fields['weight']
  return {**fields, 'pixels': tf.where(tf.reshape(is_cut, [-1, 1, 1, 1, 1]), cut, blend),
          'label': tf.concat([label, tf.gather(label, other)], 1),
          'weight': tf.stack([share, 1 - share], 1) * weight}
