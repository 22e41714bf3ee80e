"""Random shifts of image batches, in TensorFlow ops."""

import tensorflow as tf

from uni_moe_jax.data import hashing


def random_shift(pixels: tf.Tensor, hashes: tf.Tensor, max_shift: int) -> tf.Tensor:
  """Shifts half of the examples, uint8 [n, T, H, W, C], by up to `max_shift` pixels per axis and fills with zeros.

  All frames of an example shift by the same amount. Half of the examples stay in place: if all of them shifted, a short
  training run would hardly begin to learn shapes. hashes: uint64 [n], see `hashing.example_hash`.
  """
  if not max_shift:
    return pixels
  n, T, H, W = tf.shape(pixels)[0], *pixels.shape[1:4]
  padding = [max_shift, max_shift]
  padded = tf.pad(pixels, [[0, 0], [0, 0], padding, padding, [0, 0]])
  down = hashing.randint(hashing.mix_tensor(hashes, 'shift down'), 2 * max_shift + 1)
  right = hashing.randint(hashing.mix_tensor(hashes, 'shift right'), 2 * max_shift + 1)
  unshifted = hashing.uniform(hashing.mix_tensor(hashes, 'shift at all')) < 0.5
  rows = tf.where(unshifted, max_shift, down)[:, None] + tf.range(H)[None]
  columns = tf.where(unshifted, max_shift, right)[:, None] + tf.range(W)[None]
  padded = tf.gather(padded, tf.broadcast_to(rows[:, None], [n, T, H]), axis=2, batch_dims=2)
  return tf.gather(padded, tf.broadcast_to(columns[:, None, None], [n, T, H, W]), axis=3, batch_dims=3)
