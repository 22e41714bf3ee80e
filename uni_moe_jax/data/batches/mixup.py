"""Mixup and CutMix: adjacent examples of a batch are mixed, pixels and labels.

Zhang et al., mixup (2018); Yun et al., CutMix (2019). Examples 2k and 2k + 1 of the global batch are mixed; both are on
one shard, so the batch is the same on any mesh. Each pair has its own λ. (The published system mixes with the reversed
batch of its process and uses one λ for all.)
"""

import tensorflow as tf

from uni_moe_jax.data import hashing

SWITCH_PROB = 0.5  # probability of CutMix where both are enabled


def sample_lambda(alpha: float, num_pairs: int, seed: int, name: str, count: tf.Tensor) -> tf.Tensor:
  """Draws λ ~ Beta(α, α), f32 [num_pairs], for every pair of a task's global batch number `count`."""
  seeds = hashing.seeds(hashing.mix_tensor(hashing.mix_constant(seed, name, 'mix'), count), 4)
  # Mixup and CutMix with the same α may share their draws: no pair uses both.
  a, b = (tf.random.stateless_gamma([num_pairs], seeds[2 * i:2 * i + 2], alpha, dtype=tf.float32) for i in range(2))
  return a / tf.maximum(a + b, 1e-30)


def apply(
    features: dict[str, tf.Tensor], mixup_lambda: tf.Tensor | None, cutmix_lambda: tf.Tensor | None,
    box_center: tf.Tensor, hashes: tf.Tensor) -> dict[str, tf.Tensor]:
  """Mixes pixels and gives every example two labels.

  Args:
    features: pixels uint8 [n, T, S, S, C], label int32 [n, 1], weight f32 [n, 1], …; rows 2k and 2k + 1 are a pair.
    mixup_lambda, cutmix_lambda: f32 [n], λ of each row's pair; None disables one of them, not both.
    box_center: f32 [n, 2] in [0, 1), center of the pair's box: vertical, horizontal.
    hashes: uint64 [n], equal within a pair; they choose mixup or CutMix where both are enabled.

  Returns:
    The features, with label int32 [n, 2] (own, other) and weight f32 [n, 2] (λ and 1 - λ times the old weight).
  """
  pixels = features['pixels']
  n, S = tf.shape(pixels)[0], pixels.shape[2]
  partner = tf.reshape(tf.reverse(tf.reshape(tf.range(n), [-1, 2]), [1]), [-1])
  partner_pixels = tf.gather(pixels, partner)
  blend_lambda = cutmix_lambda if mixup_lambda is None else mixup_lambda
  box_lambda = mixup_lambda if cutmix_lambda is None else cutmix_lambda
  # The box covers 1 - λ of the area and is clipped at the borders: λ becomes what remains outside of it.
  half = tf.sqrt(1 - box_lambda)[:, None] * S / 2
  middle = tf.floor(box_center * S)
  low, high = (tf.clip_by_value(tf.floor(edge + 0.5), 0.0, float(S)) for edge in (middle - half, middle + half))
  index = tf.range(S, dtype=tf.float32)
  rows, columns = ((index >= low[:, axis, None]) & (index < high[:, axis, None]) for axis in range(2))
  in_box = (rows[:, :, None] & columns[:, None, :])[:, None, :, :, None]
  clipped_lambda = 1 - tf.reduce_prod(high - low, axis=1) / (S * S)
  cut = tf.where(in_box, partner_pixels, pixels)
  factor = tf.reshape(blend_lambda, [-1, 1, 1, 1, 1])
  blend = tf.saturate_cast(
      tf.round(factor * tf.cast(pixels, tf.float32) + (1 - factor) * tf.cast(partner_pixels, tf.float32)), tf.uint8)
  cut_prob = 0.0 if cutmix_lambda is None else 1.0 if mixup_lambda is None else SWITCH_PROB
  is_cut = hashing.uniform(hashing.mix_tensor(hashes, 'cut')) < cut_prob
  final_lambda = tf.where(is_cut, clipped_lambda, blend_lambda)
  label, weight = features['label'], features['weight']
  return {**features, 'pixels': tf.where(tf.reshape(is_cut, [-1, 1, 1, 1, 1]), cut, blend),
          'label': tf.concat([label, tf.gather(label, partner)], 1),
          'weight': tf.stack([final_lambda, 1 - final_lambda], 1) * weight}
