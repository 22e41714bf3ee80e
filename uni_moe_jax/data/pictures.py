"""What the published system does to a decoded picture before the model sees it, as plain TensorFlow functions.

A picture is uint8 [..., H, W, C]; axes before, the frames of a clip, are treated alike. Pictures differ in size until
they are cropped, so these functions take one at a time. Every random choice is a function of the example's hash and a
purpose: `h` is that hash (`hashing.example_hash`), a uint64 scalar, and each function adds purposes of its own.
"""

import tensorflow as tf

from uni_moe_jax.data import hashing

# Means and standard deviations per colour, for values in 0…1: what published checkpoints were trained with.
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
VIDEO_MEAN = VIDEO_STD = (0.5, 0.5, 0.5)


def class_test(picture: tf.Tensor, size: int) -> tf.Tensor:
  """Classification, evaluation: the short side to 256/224 of `size`, then the middle: uint8 [..., size, size, C]."""
  return centre_crop(resize_short(picture, 256 * size // 224), size)


def pair_train(picture: tf.Tensor, size: int, h: tf.Tensor) -> tf.Tensor:
  """Captions, retrieval, training: short side to `size`, random crop, mirrored or not: uint8 [..., size, size, C]."""
  return flip(random_crop(resize_short(picture, size), size, h), h)


def pair_test(picture: tf.Tensor, size: int) -> tf.Tensor:
  """Captions, retrieval, evaluation: the short side to `size`, then the middle: uint8 [..., size, size, C]."""
  return centre_crop(resize_short(picture, size), size)


def resize_short(picture: tf.Tensor, size: int) -> tf.Tensor:
  """The short side becomes `size` pixels, the long one keeps the ratio, rounded down.

  Bicubic (Keys' kernel, a = -1/2), widened where the picture shrinks, first across, then down, in whole grey levels
  after each: Pillow's BICUBIC to within two levels. The kernel overshoots at edges; one rounding for both axes would
  keep the overshoot of the first, and differ from Pillow by 20 levels.
  """
  H, W = tf.unstack(tf.shape(picture)[-3:-1])
  sides = size * tf.stack([H, W]) // tf.minimum(H, W)
  frames = tf.reshape(picture, tf.concat([[-1], tf.shape(picture)[-3:]], 0))
  resized = _bicubic(_bicubic(frames, tf.stack([H, sides[1]])), sides)
  return tf.reshape(resized, tf.concat([tf.shape(picture)[:-3], sides, tf.shape(picture)[-1:]], 0))


def _bicubic(frames: tf.Tensor, sides: tf.Tensor) -> tf.Tensor:
  """uint8 [n, H, W, C] to [n, *sides, C]."""
  resized = tf.image.resize(tf.cast(frames, tf.float32), sides, tf.image.ResizeMethod.BICUBIC, antialias=True)
  return tf.saturate_cast(tf.floor(resized + 0.5), tf.uint8)  # halves go up, as Pillow's


def centre_crop(picture: tf.Tensor, size: int) -> tf.Tensor:
  """The middle: uint8 [..., size, size, C]. An odd margin is halved to the even number, as Python's `round` does.

  Raises:
    InvalidArgumentError: a side is shorter than `size`.
  """
  margin = tf.cast(_margin(picture, size), tf.float32)
  return _crop(picture, tf.cast(tf.round(margin / 2), tf.int32), size)


def random_crop(picture: tf.Tensor, size: int, h: tf.Tensor) -> tf.Tensor:
  """Every place is as likely, all frames of a clip alike: uint8 [..., size, size, C].

  Raises:
    InvalidArgumentError: a side is shorter than `size`.
  """
  places = _margin(picture, size) + 1
  down = hashing.below(hashing.mix_tensor(h, 'crop down'), places[0])
  right = hashing.below(hashing.mix_tensor(h, 'crop right'), places[1])
  return _crop(picture, tf.stack([down, right]), size)


def flip(picture: tf.Tensor, h: tf.Tensor) -> tf.Tensor:
  """Left and right change places in one of two cases, in all frames of a clip alike."""
  mirrored = hashing.uniform(hashing.mix_tensor(h, 'flip')) < 0.5
  return tf.where(mirrored, tf.reverse(picture, [-2]), picture)


def _margin(picture: tf.Tensor, size: int) -> tf.Tensor:
  """int32 [2]: rows and columns that a crop leaves over."""
  sides = tf.shape(picture)[-3:-1]
  tf.debugging.assert_greater_equal(sides, size, 'The picture is smaller than its crop; resize it first.')
  return sides - size


def _crop(picture: tf.Tensor, corner: tf.Tensor, size: int) -> tf.Tensor:
  """[..., size, size, C] from `corner`, int32 [2]."""
  before = len(picture.shape) - 3
  cropped = tf.slice(picture, tf.pad(corner, [[before, 1]]), [-1] * before + [size, size, -1])
  return tf.ensure_shape(cropped, [*picture.shape[:before], size, size, picture.shape[-1]])  # else unknown in a graph
