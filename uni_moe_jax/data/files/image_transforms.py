"""Transforms of a decoded image as the published system applies them, as plain TensorFlow functions.

An image is uint8 [H, W, C]; images differ in size until they are cropped, so each function takes one. Every random
choice is a function of the example's hash `h` (`hashing.example_hash`, a uint64 scalar) and of a purpose, which each
function folds in.
"""

from collections.abc import Callable

import tensorflow as tf

from uni_moe_jax.data.files import augmentations
from uni_moe_jax.data.files.video_pixels import AREA_RANGE, ASPECT_RANGE, MAX_DRAWS
from uni_moe_jax.data.pipeline import hashing


def transform(
    image: tf.Tensor, size: int, h: tf.Tensor | None, crop: str, flip: bool, randaugment: float = 0.0,
    erasing: float = 0.0) -> tf.Tensor:
  """A decoded image uint8 [H, W, C] as a task needs it: uint8 [size, size, C].

  Args:
    h: the example's hash in training. None in evaluation, which takes the center of an image whose short side is
      `size`, or 256/224 of it for classification.
    crop: 'resize_crop' (pairs and captions), 'random_resized_crop' (classification) or 'jittered_crop' (as for
      videos).
    flip: mirror half of the images.
    randaugment: magnitude; 0 turns it off.
    erasing: probability that a rectangle becomes noise.
  """
  if h is None:
    short_side = 256 * size // 224 if crop == 'random_resized_crop' else size
    return center_crop(resize_short_side(image, short_side), size)
  if crop == 'random_resized_crop':
    image = random_resized_crop(image, size, h)
  else:
    short_side = size if crop == 'resize_crop' else jittered_short_side(size, h)
    image = random_crop(resize_short_side(image, short_side), size, h)
  if flip:
    image = random_flip(image, h)
  if randaugment:
    image = augmentations.randaugment(image, h, randaugment)
  return augmentations.random_erasing(image, h, erasing) if erasing else image


def jittered_short_side(size: int, h: tf.Tensor) -> tf.Tensor:
  """A short side between 256/224 and 320/224 of `size`: int32."""
  low, high = 256 * size // 224, 320 * size // 224
  return low + hashing.randint(hashing.mix_tensor(h, 'short side'), high - low + 1)


def random_resized_crop(image: tf.Tensor, size: int, h: tf.Tensor) -> tf.Tensor:
  """Inception's crop: 8 to 100 % of the area, aspect ratio 3/4 to 4/3, to uint8 [size, size, C].

  The first of ten draws that fits; if none does, as in a very long image, the largest center that the ratios allow.
  """
  H, W = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
  width, height = tf.unstack(augmentations.random_sides(image, h, AREA_RANGE, ASPECT_RANGE, ('area', 'ratio')))
  fits = (height <= H) & (width <= W) & (height >= 1) & (width >= 1)
  # The fallback comes after the draws and always fits.
  height = tf.concat([height, [tf.minimum(H, tf.round(W / ASPECT_RANGE[0]))]], 0)
  width = tf.concat([width, [tf.minimum(W, tf.round(H * ASPECT_RANGE[1]))]], 0)
  first = tf.where(tf.concat([fits, [True]], 0))[0, 0]
  sides = tf.cast(tf.stack([height[first], width[first]]), tf.int32)
  margin = tf.shape(image)[:2] - sides
  corner = tf.where(first < MAX_DRAWS, _random_corner(margin, h), margin // 2)
  part = tf.slice(image, tf.pad(corner, [[0, 1]]), tf.concat([sides, [-1]], 0))
  return tf.ensure_shape(_resize(part, tf.constant([size, size])), [size, size, image.shape[-1]])


def resize_short_side(image: tf.Tensor, size: int | tf.Tensor) -> tf.Tensor:
  """Resizes the short side to `size` pixels; the long one keeps the ratio, rounded down."""
  sides = tf.shape(image)[:2]
  return _resize(image, size * sides // tf.reduce_min(sides))


def _resize(image: tf.Tensor, sides: tf.Tensor) -> tf.Tensor:
  """uint8 [H, W, C] to [*sides, C], within two levels of Pillow's BICUBIC.

  Keys' kernel, a = -1/2, widened when the image shrinks, first across, then down, rounded to integer levels after each:
  it overshoots at edges, which a single rounding for both axes would keep, 20 levels from Pillow.
  """
  for shape in (tf.stack([tf.shape(image)[0], sides[1]]), sides):
    resized = tf.image.resize(tf.cast(image, tf.float32), shape, tf.image.ResizeMethod.BICUBIC, antialias=True)
    image = tf.saturate_cast(tf.floor(resized + 0.5), tf.uint8)  # rounds halves up, as Pillow does
  return image


def center_crop(image: tf.Tensor, size: int) -> tf.Tensor:
  """The center: uint8 [size, size, C]. Half of an odd margin is rounded to even, as by `round`."""
  return _crop(image, lambda margin: tf.cast(tf.round(tf.cast(margin, tf.float32) / 2), tf.int32), size)


def random_crop(image: tf.Tensor, size: int, h: tf.Tensor) -> tf.Tensor:
  """A crop at a uniformly distributed position: uint8 [size, size, C]."""
  return _crop(image, lambda margin: _random_corner(margin, h), size)


def is_mirrored(h: int) -> bool:
  """Whether `random_flip` mirrors the image of an example."""
  return hashing.fold(h, 'flip') < 1 << 63


def random_flip(image: tf.Tensor, h: tf.Tensor) -> tf.Tensor:
  """Mirrors half of the images left to right."""
  return tf.where(hashing.uniform(hashing.mix_tensor(h, 'flip')) < 0.5, tf.reverse(image, [-2]), image)


def _random_corner(margin: tf.Tensor, h: tf.Tensor) -> tf.Tensor:
  """A uniformly distributed upper left corner, int32 [2] in 0…margin."""
  down, right = (hashing.randint(hashing.mix_tensor(h, purpose), margin[i] + 1)
                 for i, purpose in enumerate(('crop down', 'crop right')))
  return tf.stack([down, right])


def _crop(image: tf.Tensor, corner: Callable[[tf.Tensor], tf.Tensor], size: int) -> tf.Tensor:
  """[size, size, C] from `corner` of the margin, both int32 [2]. Raises InvalidArgumentError for a shorter side."""
  sides = tf.shape(image)[:2]
  tf.debugging.assert_greater_equal(sides, size, 'The image is smaller than its crop; resize it first.')
  cropped = tf.slice(image, tf.pad(corner(sides - size), [[0, 1]]), [size, size, -1])
  return tf.ensure_shape(cropped, [size, size, image.shape[-1]])  # unknown in a graph otherwise
