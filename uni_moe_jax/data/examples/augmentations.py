"""Random changes of the pixels of training images and videos, in TensorFlow ops.

RandAugment and random erasing are those that the published system takes from timm; `random_affine` and `random_shift`
are this project's. Settings in timm: rand-m9-mstd0.5-inc1; probability .25, mode 'pixel'. Cubuk et al., RandAugment
(2020), with timm's list of operations, whose strength grows with the magnitude; Zhong et al., Random Erasing (2020).
Every draw is a function of the example's hash, which the stateful augmenters of libraries cannot promise. Images that
RandAugment rotates or shears are interpolated bilinearly (timm: bicubic or bilinear at random).
"""

import functools
import math
from collections.abc import Callable

import tensorflow as tf

from uni_moe_jax.data import hashing
from uni_moe_jax.data.examples.video_pixels import MAX_DRAWS

NUM_LAYERS, PROBABILITY = 2, 0.5  # operations per image, and how often each is applied
MAGNITUDE_STD, MAX_MAGNITUDE = 0.5, 10.0
_FILL = (124, 116, 104)  # ImageNet's mean, for pixels from outside the image
_ERASED_AREA, _ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
_NOISE_MEAN, _NOISE_STD = 0.45, 0.225  # of erased pixels in 0…1: about ImageNet's, the same for all colors


def randaugment(image: tf.Tensor, h: tf.Tensor, magnitude: float) -> tf.Tensor:
  """Applies two of fifteen operations to uint8 [H, W, C] of static shape, each with probability 1/2.

  Args:
    h: uint64 scalar, the example's hash.
    magnitude: 0…10, the mean of the magnitude of each operation.
  """
  for layer in range(NUM_LAYERS):
    def draw(purpose, layer=layer):
      return hashing.uniform(hashing.mix_tensor(hashing.mix_tensor(h, purpose), layer))
    # Box–Muller transform: a normal deviate from two uniform ones.
    normal = tf.sqrt(-2.0 * tf.math.log(1.0 - draw('radius'))) * tf.cos(2 * math.pi * draw('angle'))
    level = tf.clip_by_value(magnitude + MAGNITUDE_STD * normal, 0.0, MAX_MAGNITUDE) / MAX_MAGNITUDE
    sign = tf.where(draw('sign') < 0.5, -1.0, 1.0)
    index = tf.cast(draw('operation') * len(OPERATIONS), tf.int32)
    branches = [functools.partial(op, image, level, sign) for op in OPERATIONS.values()]
    apply = functools.partial(tf.switch_case, index, branches)
    image = tf.cond(draw('applied') < PROBABILITY, apply, lambda x=image: x)
  return image


def _autocontrast(image: tf.Tensor, *_) -> tf.Tensor:
  """Stretches each color channel from its darkest and brightest level to 0…255."""
  x = tf.cast(image, tf.float32)
  low, high = tf.reduce_min(x, (0, 1)), tf.reduce_max(x, (0, 1))
  stretched = (x - low) * 255 / tf.maximum(high - low, 1)
  return _levels(tf.where(high > low, tf.floor(stretched), x))


def _equalize(image: tf.Tensor, *_) -> tf.Tensor:
  """Equalizes the histogram of each color channel (Pillow's table)."""
  def equalize(color):
    counts = tf.math.bincount(tf.reshape(color, [-1]), minlength=256, maxlength=256)
    step = (tf.reduce_sum(counts) - counts[tf.reduce_max(tf.where(counts > 0))]) // 255
    table = tf.minimum((step // 2 + tf.cumsum(counts, exclusive=True)) // tf.maximum(step, 1), 255)
    return tf.gather(tf.cast(tf.where(step > 0, table, tf.range(256)), tf.uint8), color)
  return tf.stack([equalize(tf.cast(color, tf.int32)) for color in tf.unstack(image, axis=-1)], -1)


def _sharpness(image: tf.Tensor, level: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
  """Blends with a smoothed image, or away from it; the outermost pixels stay."""
  C = image.shape[-1]
  kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32)[..., None, None] / 13
  x = tf.cast(image, tf.float32)
  smooth = tf.nn.depthwise_conv2d(x[None], tf.tile(kernel, [1, 1, C, 1]), [1, 1, 1, 1], 'VALID')[0]
  inside = tf.pad(tf.ones(tf.shape(smooth), tf.bool), [[1, 1], [1, 1], [0, 0]])
  smooth = tf.where(inside, tf.pad(smooth, [[1, 1], [1, 1], [0, 0]]), x)
  return _blend(tf.floor(smooth + 0.5), image, level, sign)


def _rotate(image: tf.Tensor, level: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
  """Rotates about the center by up to 30°."""
  H, W = (tf.cast(s, tf.float32) for s in tf.unstack(tf.shape(image)[:2]))
  a = sign * level * math.pi / 6
  x, y = (W - 1) / 2, (H - 1) / 2
  return _affine(image, tf.cos(a), -tf.sin(a), x - x * tf.cos(a) + y * tf.sin(a),
                 tf.sin(a), tf.cos(a), y - x * tf.sin(a) - y * tf.cos(a))


def _solarize_add(image: tf.Tensor, level: tf.Tensor, _) -> tf.Tensor:
  """Brightens pixels below 128 by ⌊110 · level⌋."""
  x = tf.cast(image, tf.int32)
  return tf.cast(tf.where(x < 128, tf.minimum(x + tf.cast(level * 110, tf.int32), 255), x), tf.uint8)


# (image uint8 [H, W, C], level in 0…1, sign ±1) → image. The order is part of a run's randomness.
OPERATIONS: dict[str, Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]] = {
    'autocontrast': _autocontrast,
    'equalize': _equalize,
    'invert': lambda image, *_: 255 - image,
    'rotate': _rotate,
    # Keeps the upper 4 - ⌊4 · level⌋ bits.
    'posterize': lambda image, level, _: image & tf.cast(
        tf.bitwise.left_shift(255, 4 + tf.cast(level * 4, tf.int32)) % 256, tf.uint8),
    # Inverts pixels of at least 256 - ⌊256 · level⌋.
    'solarize': lambda image, level, _: tf.where(
        tf.cast(image, tf.int32) >= 256 - tf.cast(level * 256, tf.int32), 255 - image, image),
    'solarize_add': _solarize_add,
    # Four that blend with another image, or away from it: grays, their mean, black, a smoothed one.
    'color': lambda image, level, sign: _blend(_gray(image), image, level, sign),
    'contrast': lambda image, level, sign: _blend(
        tf.fill(tf.shape(image), tf.floor(tf.reduce_mean(_gray(image)) + 0.5)), image, level, sign),
    'brightness': lambda image, level, sign: _blend(tf.zeros(tf.shape(image)), image, level, sign),
    'sharpness': _sharpness,
    # Row y moves left, column x up, by up to 0.3 of y or x.
    'shear_x': lambda image, level, sign: _affine(image, 1.0, sign * level * 0.3, 0.0, 0.0, 1.0, 0.0),
    'shear_y': lambda image, level, sign: _affine(image, 1.0, 0.0, 0.0, sign * level * 0.3, 1.0, 0.0),
    # By up to 0.45 of a side.
    'translate_x': lambda image, level, sign: _affine(
        image, 1.0, 0.0, sign * level * 0.45 * tf.cast(tf.shape(image)[1], tf.float32), 0.0, 1.0, 0.0),
    'translate_y': lambda image, level, sign: _affine(
        image, 1.0, 0.0, 0.0, 0.0, 1.0, sign * level * 0.45 * tf.cast(tf.shape(image)[0], tf.float32))}


def random_sides(sides: tf.Tensor, area: tf.Tensor, ratio: tf.Tensor, ratio_range: tuple[float, float]) -> tf.Tensor:
  """Sides of random rectangles, float32 [2, ..., n], whose areas are relative to that of an image of sides [..., 2].

  area, ratio: f32 [..., n]: the fraction of the area, and in [0, 1) where in its range, on a logarithmic scale, the
  ratio of the sides is.
  """
  log = [math.log(r) for r in ratio_range]
  area = tf.cast(tf.reduce_prod(sides, -1, keepdims=True), tf.float32) * area
  ratio = hashing.elementwise(tf.exp, log[0] + (log[1] - log[0]) * ratio)
  return tf.round(tf.sqrt([area * ratio, area / ratio]))


def random_erasing(image: tf.Tensor, h: tf.Tensor, probability: float) -> tf.Tensor:
  """With a probability replaces a rectangle of 2 to 33 % of the area by noise: uint8 [H, W, C].

  Takes the first of ten random rectangles that fits; if none does, the image stays as it is.
  """
  H, W = tf.unstack(tf.shape(image)[:2])
  draws = hashing.mix_tensor(h, tf.range(MAX_DRAWS, dtype=tf.int64))
  area, ratio = (hashing.uniform(hashing.mix_tensor(draws, purpose)) for purpose in ('erased area', 'erased aspect'))
  low, high = _ERASED_AREA
  height, width = tf.unstack(tf.cast(
      random_sides(tf.stack([H, W]), low + (high - low) * area, ratio, _ERASED_ASPECT), tf.int32))
  fits = (height < H) & (width < W)
  first = tf.minimum(tf.where(tf.concat([fits, [True]], 0))[0, 0], MAX_DRAWS - 1)
  height, width = height[first], width[first]
  top = hashing.randint(hashing.mix_tensor(h, 'erased down'), tf.maximum(H - height, 1))
  left = hashing.randint(hashing.mix_tensor(h, 'erased right'), tf.maximum(W - width, 1))
  rows, columns = tf.range(H)[:, None, None], tf.range(W)[None, :, None]
  inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
  noise = _NOISE_MEAN + _NOISE_STD * tf.random.stateless_normal(tf.shape(image), hashing.seeds(h, 2))
  is_applied = (hashing.uniform(hashing.mix_tensor(h, 'erased at all')) < probability) & tf.reduce_any(fits)
  return tf.where(is_applied & inside, _levels(tf.round(255 * noise)), image)


def _levels(x: tf.Tensor) -> tf.Tensor:
  return tf.saturate_cast(x, tf.uint8)


def _gray(image: tf.Tensor) -> tf.Tensor:
  """Luma (ITU-R 601) as float levels, the same in every channel."""
  x = tf.cast(image, tf.float32)
  if image.shape[-1] == 1:
    return x
  return tf.repeat(tf.floor(tf.reduce_sum(x * [0.299, 0.587, 0.114], -1, keepdims=True) + 0.5), 3, -1)


def _blend(other: tf.Tensor, image: tf.Tensor, level: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
  """other + f · (image - other) with f = 1 ± 0.9 · level, at least 0.1."""
  factor = tf.maximum(1 + sign * 0.9 * level, 0.1)
  return _levels(tf.floor(other + factor * (tf.cast(image, tf.float32) - other)))


def _affine(image: tf.Tensor, *coefficients: tf.Tensor | float) -> tf.Tensor:
  """Samples pixel (x, y) at (a x + b y + c, d x + e y + f), bilinearly; outside is ImageNet's mean."""
  transform = tf.stack([tf.cast(c, tf.float32) for c in coefficients] + [0.0, 0.0])[None]
  fill = tf.constant(_FILL if image.shape[-1] == 3 else _FILL[:1], tf.float32)
  # Relative to the fill, since the op fills with zeros.
  transformed = tf.raw_ops.ImageProjectiveTransformV3(
      images=(tf.cast(image, tf.float32) - fill)[None], transforms=transform, output_shape=tf.shape(image)[:2],
      fill_value=0.0, interpolation='BILINEAR', fill_mode='CONSTANT')[0]
  return tf.ensure_shape(_levels(tf.floor(transformed + fill + 0.5)), image.shape)


def random_affine(pixels: tf.Tensor, hashes: tf.Tensor, max_affine: float) -> tf.Tensor:
  """Shears, rotates and scales half of the examples, uint8 [n, T, H, W, C], about their center; zeros enter.

  The pixel at p + center shows what was at S R K p + center, by bilinear interpolation, with

    K = [[1, shear], [0, 1]],  R = rotation by an angle,  S = diag(exp(s), exp(t))

  and shear / 2, angle (radians), s and t uniform in ±max_affine. All frames and channels of an example are transformed
  equally. Half of the examples stay as they are, as with `random_shift`. hashes: uint64 [n], see
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
