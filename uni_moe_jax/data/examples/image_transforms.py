"""From the bytes of an image to the pixels that a model receives, in TensorFlow ops.

An image is uint8 [H, W, C]; images differ in size until they are cropped, so functions take one. What an image draws
is a row of `draws`, which makes those of a whole batch, a function of the examples' hashes (`hashing.example_hash`).

Two methods of resizing (config.data.resize). 'pillow' is published: the image is decoded, resized as by Pillow's
BICUBIC and cropped. 'fast' crops first, to whole pixels of the file: only that part of a JPEG is decoded, at a half,
quarter or eighth of its size where that suffices; what is left is averaged over areas, or interpolated bilinearly if it
grows.
"""

from collections.abc import Callable, Mapping

import tensorflow as tf

from uni_moe_jax.data import hashing
from uni_moe_jax.data.examples import augmentations
from uni_moe_jax.data.examples.video_pixels import ASPECT_RANGE, MAX_DRAWS
from uni_moe_jax.utils import splitmix

Draw = Mapping[str, tf.Tensor]  # of one image, by purpose

_JPEG_MAGIC, _PNG_MAGIC = b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n'
_RATIOS = (1, 2, 4, 8)  # by which a JPEG can be decoded smaller


def draws(hashes: tf.Tensor, crop: str, min_area: float) -> dict[str, tf.Tensor]:
  """What images draw, by purpose, from their hashes uint64 [n].

  'corner' uint64 [n, 2], 'flip' bool [n]; of a random part 'area', its fraction, from `min_area`, and 'ratio' in
  [0, 1), f32 [n, MAX_DRAWS]; of a jittered crop 'short side' uint64 [n].
  """
  corner = tf.stack([hashing.mix_tensor(hashes, purpose) for purpose in ('crop down', 'crop right')], 1)
  made = {'corner': corner, 'flip': hashing.uniform(hashing.mix_tensor(hashes, 'flip')) < 0.5}
  if crop == 'random_resized_crop':
    several = hashing.mix_tensor(hashes[:, None], tf.range(MAX_DRAWS, dtype=tf.int64))
    area, ratio = (hashing.uniform(hashing.mix_tensor(several, purpose)) for purpose in ('area', 'ratio'))
    made |= {'area': min_area + (1 - min_area) * area, 'ratio': ratio}
  elif crop == 'jittered_crop':
    made['short side'] = hashing.mix_tensor(hashes, 'short side')
  return made


def read(encoded: tf.Tensor, channels: int, size: int, draw: Draw | None, crop: str, resize: str) -> tf.Tensor:
  """The part of an encoded image that a task needs: uint8 [size, size, channels].

  Args:
    encoded: the bytes of a file that TensorFlow can decode.
    draw: of the image in training. None in evaluation, which takes the center of an image whose short side is `size`,
      or 256/224 of it for classification.
    crop: 'resize_crop' (pairs and captions), 'random_resized_crop' (classification) or 'jittered_crop' (as for
      videos).
    resize: 'pillow' or 'fast', see above.
  """
  if resize == 'pillow':
    return resize_and_crop(_decode(encoded, channels), size, draw, crop)

  def decode_part():
    corner, sides = part(tf.io.extract_jpeg_shape(encoded)[:2], size, draw, crop)
    smaller = tf.reduce_sum(tf.cast(tf.reduce_min(sides) >= tf.constant(_RATIOS[1:]) * size, tf.int32))
    window = tf.concat([corner, sides], 0) // tf.gather(_RATIOS, smaller)
    return tf.switch_case(smaller, [
        lambda ratio=ratio: tf.io.decode_and_crop_jpeg(encoded, window, channels, ratio) for ratio in _RATIOS])

  def decode_all():
    image = _decode(encoded, channels)
    return _slice(image, *part(tf.shape(image)[:2], size, draw, crop))

  is_jpeg = tf.strings.substr(encoded, 0, len(_JPEG_MAGIC)) == _JPEG_MAGIC
  image = tf.ensure_shape(tf.cond(is_jpeg, decode_part, decode_all), [None, None, channels])
  return _fit(image, tf.shape(image)[:2], size)


def _decode(encoded: tf.Tensor, channels: int) -> tf.Tensor:
  """uint8 [H, W, channels]."""
  def decode(channels):
    return tf.ensure_shape(tf.io.decode_image(encoded, channels, expand_animations=False), [None, None, channels])

  if channels != 1:
    return decode(channels)
  # TensorFlow decodes WebP to colors only.
  is_webp = tf.strings.substr(encoded, 0, 4) + tf.strings.substr(encoded, 8, 4) == b'RIFFWEBP'
  return tf.cond(is_webp, lambda: tf.image.rgb_to_grayscale(decode(3)), lambda: decode(1))


def are_png(encoded: tf.Tensor) -> tf.Tensor:
  """Whether all files are PNGs, from their bytes, string [n]."""
  return tf.reduce_all(tf.strings.substr(encoded, 0, len(_PNG_MAGIC)) == _PNG_MAGIC)


def png_reader(encoded: tf.Tensor, channels: int, size: int, draw: Draw, crop: str) -> Callable[..., tf.Tensor]:
  """Index → `read` of a PNG with 'fast'; what a small image needs besides decoding is computed for all at once.

  encoded: the bytes of PNGs, string [n]. draw: of `draws`, of n images; empty in evaluation.
  """
  # Height and width follow the name of the first chunk, which begins at byte 12.
  sides = tf.io.decode_raw(tf.strings.substr(encoded, 16, 8), tf.int32, little_endian=False)[:, ::-1]
  corner, inner = part(tf.ensure_shape(sides, [None, 2]), size, draw or None, crop)
  stop = corner + inner

  def read_one(i):
    one, start, end, sides = (tf.gather(x, i) for x in (encoded, corner, stop, inner))
    image = tf.strided_slice(tf.io.decode_png(one, channels), start, end)
    return _fit(tf.ensure_shape(image, [None, None, channels]), sides, size)
  return read_one


def part(sides: tf.Tensor, size: int, draw: Draw | None, crop: str) -> tuple[tf.Tensor, tf.Tensor]:
  """(corner, sides) of the part of an image of `sides` that becomes [size, size], all int32 [..., 2]; see `read`."""
  if draw is not None and crop == 'random_resized_crop':
    return _random_part(sides, draw)
  short = short_side(size, draw, crop)
  short = short if isinstance(short, int) else short[..., None]
  side = tf.maximum(1, tf.reduce_min(sides, -1, keepdims=True) * size // short)
  inner = tf.concat([side, side], -1)
  return (sides - inner) // 2 if draw is None else _random_corner(sides - inner, draw), inner


def _fit(image: tf.Tensor, sides: tf.Tensor, size: int) -> tf.Tensor:
  """uint8 [*sides, C] to [size, size, C]: means of areas, or interpolated bilinearly if a side grows."""
  target = [size, size]

  def resize():
    resized = tf.cond(
        tf.reduce_all(sides >= size), lambda: tf.raw_ops.ResizeArea(images=image[None], size=target),
        lambda: tf.raw_ops.ResizeBilinear(images=image[None], size=target, half_pixel_centers=True))
    return tf.cast(resized[0] + 0.5, tf.uint8)

  return tf.ensure_shape(tf.cond(tf.reduce_all(sides == size), lambda: image, resize), [*target, image.shape[-1]])


def resize_and_crop(image: tf.Tensor, size: int, draw: Draw | None, crop: str) -> tf.Tensor:
  """`read` of a decoded image with 'pillow'."""
  if draw is not None and crop == 'random_resized_crop':
    area = _slice(image, *_random_part(tf.shape(image)[:2], draw))
    return tf.ensure_shape(_resize(area, tf.constant([size, size])), [size, size, image.shape[-1]])
  return square(resize_short_side(image, short_side(size, draw, crop)), size, draw)


def short_side(size: int, draw: Draw | None, crop: str) -> int | tf.Tensor:
  """Of a resized image from which a square of `size` is taken, see `read`; jittered, 256/224 to 320/224 of `size`."""
  low, high = 256 * size // 224, 320 * size // 224
  if draw is None:
    return low if crop == 'random_resized_crop' else size
  return size if crop == 'resize_crop' else low + hashing.randint(draw['short side'], high - low + 1)


def _random_part(sides: tf.Tensor, draw: Draw) -> tuple[tf.Tensor, tf.Tensor]:
  """Inception's crop: a part (published: 8 to 100 % of the area), width / height 3/4 to 4/3.

  Returns (corner, sides), int32 [..., 2].

  The first of ten draws that fits; if none does, as in a very long image, the largest center that the ratios allow.
  """
  H, W = tf.split(tf.cast(sides, tf.float32), 2, -1)
  width, height = tf.unstack(augmentations.random_sides(sides, draw['area'], draw['ratio'], ASPECT_RANGE))
  fits = (height <= H) & (width <= W) & (height >= 1) & (width >= 1)
  # The fallback comes after the draws and always fits.
  height = tf.concat([height, tf.minimum(H, tf.round(W / ASPECT_RANGE[0]))], -1)
  width = tf.concat([width, tf.minimum(W, tf.round(H * ASPECT_RANGE[1]))], -1)
  first = tf.argmax(tf.concat([fits, tf.ones_like(H, tf.bool)], -1), -1)
  batch_dims = sides.shape.rank - 1
  inner = tf.cast(tf.stack([tf.gather(side, first, batch_dims=batch_dims) for side in (height, width)], -1), tf.int32)
  margin = sides - inner
  return tf.where(first[..., None] < MAX_DRAWS, _random_corner(margin, draw), margin // 2), inner


def resize_short_side(image: tf.Tensor, size: int | tf.Tensor) -> tf.Tensor:
  """Resizes the short side to `size` pixels; the long one keeps the ratio, rounded down."""
  sides = tf.shape(image)[:2]
  return _resize(image, size * sides // tf.reduce_min(sides))


def _resize(image: tf.Tensor, sides: tf.Tensor) -> tf.Tensor:
  """uint8 [H, W, C] to [*sides, C], within two levels of Pillow's BICUBIC in this order (Pillow 13 may take the other).

  Keys' kernel, a = -1/2, widened when the image shrinks, first across, then down, rounded to integer levels after each:
  it overshoots at edges, which a single rounding for both axes would keep, 20 levels from Pillow.
  """
  across = tf.transpose(_resize_down(tf.transpose(image, [1, 0, 2]), sides[1]), [1, 0, 2])
  return _resize_down(across, sides[0])


def _resize_down(image: tf.Tensor, height: tf.Tensor) -> tf.Tensor:
  """uint8 [H, W, C] to [height, W, C]."""
  H, W, C = tf.unstack(tf.shape(image))
  # As one column with W · C channels, which the op handles as vectors and not pixel by pixel.
  column = tf.cast(tf.reshape(image, [H, 1, W * C]), tf.float32)
  resized = tf.image.resize(column, [height, 1], tf.image.ResizeMethod.BICUBIC, antialias=True)
  levels = tf.cast(tf.clip_by_value(resized + 0.5, 0.0, 255.0), tf.uint8)  # rounds halves up, as Pillow does
  return tf.ensure_shape(tf.reshape(levels, [height, W, C]), [None, None, image.shape[-1]])


def square(image: tf.Tensor, size: int, draw: Draw | None) -> tf.Tensor:
  """A part, uint8 [size, size, C], at a uniformly distributed position; in evaluation the center.

  Half of an odd margin is rounded to even, as by `round`.
  """
  margin = tf.shape(image)[:2] - size
  corner = (tf.cast(tf.round(tf.cast(margin, tf.float32) / 2), tf.int32) if draw is None else
            _random_corner(margin, draw))
  cropped = _slice(image, corner, tf.constant([size, size]))
  return tf.ensure_shape(cropped, [size, size, image.shape[-1]])  # unknown in a graph otherwise


def is_mirrored(h: int) -> bool:
  """Whether `random_flip` mirrors the image of an example."""
  return splitmix.fold(h, 'flip') < 1 << 63


def random_flip(image: tf.Tensor, draw: Draw) -> tf.Tensor:
  """Mirrors an image [H, W, C] left to right, or not."""
  return tf.cond(draw['flip'], lambda: tf.reverse(image, [1]), lambda: image)


def _random_corner(margin: tf.Tensor, draw: Draw) -> tf.Tensor:
  """A uniformly distributed upper left corner, int32 [2] in 0…margin."""
  return hashing.randint(draw['corner'], margin + 1)


def _slice(image: tf.Tensor, corner: tf.Tensor, sides: tf.Tensor) -> tf.Tensor:
  return tf.slice(image, tf.pad(corner, [[0, 1]]), tf.concat([sides, [-1]], 0))
