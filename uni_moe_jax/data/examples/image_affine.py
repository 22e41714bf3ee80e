"""Random affine transforms of image batches, in TensorFlow ops."""

import tensorflow as tf

from uni_moe_jax.data import hashing


def random_affine(pixels: tf.Tensor, hashes: tf.Tensor, max_affine: float) -> tf.Tensor:
  """Shears, rotates and scales half of the examples, uint8 [n, T, H, W, C], about their center; zeros enter.

  The pixel at p + center shows what was at S R K p + center, by bilinear interpolation, with

    K = [[1, shear], [0, 1]],  R = rotation by an angle,  S = diag(exp(s), exp(t))

  and shear / 2, angle (radians), s and t uniform in ±max_affine. All frames and channels of an example are transformed
  equally. Half of the examples stay as they are, as with `image_shift.random_shift`. hashes: uint64 [n], see
  `hashing.example_hash`.
  """
  if not max_affine:
    return pixels
  T, H, W, C = pixels.shape[1:]
  rows = tf.where(hashing.uniform(hashing.mix_tensor(hashes, 'affine at all')) < 0.5)
  hashes = tf.gather(hashes, rows[:, 0])

  def draw(name):
    return max_affine * (2 * hashing.uniform(hashing.mix_tensor(hashes, name)) - 1)

  shear, angle = 2 * draw('shear'), draw('angle')
  scale_x, scale_y = (hashing.elementwise(tf.exp, draw(name)) for name in ('scale x', 'scale y'))
  cos, sin = (hashing.elementwise(function, angle) for function in (tf.cos, tf.sin))
  a, b = scale_x * cos, scale_x * (shear * cos - sin)
  c, d = scale_y * sin, scale_y * (shear * sin + cos)
  x, y, zeros = (W - 1) / 2, (H - 1) / 2, tf.zeros_like(angle)
  transforms = tf.stack([a, b, x - a * x - b * y, c, d, y - c * x - d * y, zeros, zeros], axis=1)
  frames = tf.raw_ops.ImageProjectiveTransformV3(
      images=tf.reshape(tf.gather(pixels, rows[:, 0]), [-1, H, W, C]), transforms=tf.repeat(transforms, T, axis=0),
      output_shape=[H, W], fill_value=0.0, interpolation='BILINEAR', fill_mode='CONSTANT')
  return tf.tensor_scatter_nd_update(pixels, rows, tf.reshape(frames, [-1, T, H, W, C]))
