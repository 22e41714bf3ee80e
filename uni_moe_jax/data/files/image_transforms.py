"""What the published system does to a decoded picture before the model sees it, as plain TensorFlow functions.

A picture is uint8 [..., H, W, C]; axes before, the frames of a clip, are treated alike. Pictures differ in size until
they are cropped, so these functions take one at a time. Every random choice is a function of the example's hash and a
purpose: `h` is that hash (`hashing.example_hash`), a uint64 scalar, and each function adds purposes of its own.
"""

import math

import tensorflow as tf

from uni_moe_jax.data.files import augmentations
from uni_moe_jax.data.files.video_pixels import AREA, RATIO, TRIES
from uni_moe_jax.data.pipeline import hashing


def prepared(
    picture: tf.Tensor, size: int, h: tf.Tensor | None, crop: str, flipped: bool, randaugment: float = 0.0,
    erasing: float = 0.0) -> tf.Tensor:
  """A decoded picture as a task wants it: uint8 [size, size, C].

  Args:
    picture: uint8 [H, W, C]. h: its hash in training; None at evaluation, where only the crop counts.
    crop: 'resize_crop' (pairs and captions), 'random_resized_crop' (classification), 'jittered_crop' (as videos).
    flipped: mirrored in half of the cases. randaugment: magnitude, 0 = off. erasing: how often a part becomes noise.
  """
  if h is None:
    return class_test(picture, size) if crop == 'random_resized_crop' else pair_test(picture, size)
  if crop == 'random_resized_crop':
    picture = random_area(picture, size, h)
  else:
    short = size if crop == 'resize_crop' else jittered(size, h)
    picture = random_crop(resize_short(picture, short), size, h)
  if flipped:
    picture = flip(picture, h)
  if randaugment:
    picture = augmentations.randaugment(picture, h, randaugment)
  return augmentations.erase(picture, h, erasing) if erasing else picture


def jittered(size: int, h: tf.Tensor) -> tf.Tensor:
  """A short side between 256/224 and 320/224 of `size`: int32."""
  low, high = 256 * size // 224, 320 * size // 224
  return low + hashing.randint(hashing.mix_tensor(h, 'short side'), high - low + 1)


def random_area(picture: tf.Tensor, size: int, h: tf.Tensor) -> tf.Tensor:
  """A part of 8 to 100 % of the area, 3/4 to 4/3 as wide as high, resized: uint8 [size, size, C] (Inception's crop).

  The first of ten draws that fits counts; of a picture so long that none does, the middle, as wide as the ratios allow.
  """
  H, W = tf.unstack(tf.cast(tf.shape(picture)[:2], tf.float32))
  draws = hashing.mix_tensor(h, tf.range(TRIES, dtype=tf.int64))
  area = H * W * (AREA[0] + (AREA[1] - AREA[0]) * hashing.uniform(hashing.mix_tensor(draws, 'area')))
  log = [math.log(r) for r in RATIO]
  ratio = tf.exp(log[0] + (log[1] - log[0]) * hashing.uniform(hashing.mix_tensor(draws, 'ratio')))
  height, width = tf.round(tf.sqrt(area / ratio)), tf.round(tf.sqrt(area * ratio))
  fits = (height <= H) & (width <= W) & (height >= 1) & (width >= 1)
  # The last resort stands behind the draws, and always fits.
  height = tf.concat([height, [tf.minimum(H, tf.round(W / RATIO[0]))]], 0)
  width = tf.concat([width, [tf.minimum(W, tf.round(H * RATIO[1]))]], 0)
  first = tf.where(tf.concat([fits, [True]], 0))[0, 0]
  sides = tf.cast(tf.stack([height[first], width[first]]), tf.int32)
  places = tf.shape(picture)[:2] - sides
  drawn = [hashing.randint(hashing.mix_tensor(h, purpose), places[i] + 1) for i, purpose in enumerate(('crop down', 'crop right'))]
  corner = tf.where(first < TRIES, tf.stack(drawn), places // 2)
  part = tf.slice(picture, tf.pad(corner, [[0, 1]]), tf.concat([sides, [-1]], 0))[None]
  part = _bicubic(_bicubic(part, tf.stack([sides[0], size])), tf.constant([size, size]))[0]
  return tf.ensure_shape(part, [size, size, picture.shape[-1]])


def class_test(picture: tf.Tensor, size: int) -> tf.Tensor:
  """Classification, evaluation: the short side to 256/224 of `size`, then the middle: uint8 [..., size, size, C]."""
  return centre_crop(resize_short(picture, 256 * size // 224), size)


def pair_test(picture: tf.Tensor, size: int) -> tf.Tensor:
  """Captions, retrieval, evaluation: the short side to `size`, then the middle: uint8 [..., size, size, C]."""
  return centre_crop(resize_short(picture, size), size)


def resize_short(picture: tf.Tensor, size: int | tf.Tensor) -> tf.Tensor:
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
  down = hashing.randint(hashing.mix_tensor(h, 'crop down'), places[0])
  right = hashing.randint(hashing.mix_tensor(h, 'crop right'), places[1])
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
