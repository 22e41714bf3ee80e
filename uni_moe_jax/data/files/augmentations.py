"""RandAugment and random erasing of pictures, as the published system takes them from timm: rand-m9-mstd0.5-inc1, .25 'pixel'.

Cubuk et al., RandAugment (2020), with timm's list of operations, whose strength grows with the magnitude; Zhong et al., Random
Erasing (2020). Every draw follows from the example's hash, which stateful augmenters of libraries cannot promise. Turned and
sheared pictures are read bilinearly (there: bicubic or bilinear by lot).
"""

import math
from collections.abc import Callable

import tensorflow as tf

from uni_moe_jax.data.pipeline import hashing

LAYERS, APPLIED, DEVIATION, MOST = 2, 0.5, 0.5, 10.0  # operations; how often each acts; of its magnitude; the largest one
_FILL = (124, 116, 104)  # ImageNet's mean: what enters from outside
_ERASED = (0.02, 1 / 3)  # share of the area
_ASPECT, _TRIES = (0.3, 1 / 0.3), 10
_NOISE_MEAN, _NOISE_STD = 0.45, 0.225  # of erased pixels, of 0…1: about ImageNet's, all colours alike


def randaugment(picture: tf.Tensor, h: tf.Tensor, magnitude: float) -> tf.Tensor:
  """Two of fifteen operations, each left out in half of the cases: uint8 [H, W, C] of static shape.

  Args:
    picture: uint8 [H, W, C]. h: uint64 scalar. magnitude: 0…10; each operation's is drawn around it.
  """
  for layer in range(LAYERS):
    def draw(purpose, layer=layer):
      return hashing.uniform(hashing.mix_tensor(hashing.mix_tensor(h, purpose), layer))
    # Box and Muller: a normal deviate from two uniform ones.
    normal = tf.sqrt(-2.0 * tf.math.log(1.0 - draw('radius'))) * tf.cos(2 * math.pi * draw('angle'))
    level = tf.clip_by_value(magnitude + DEVIATION * normal, 0.0, MOST) / MOST
    sign = tf.where(draw('sign') < 0.5, -1.0, 1.0)
    which = tf.cast(draw('operation') * len(OPERATIONS), tf.int32)
    branches = [lambda op=op, p=picture: op(p, level, sign) for op in OPERATIONS.values()]
    picture = tf.cond(draw('applied') < APPLIED, lambda b=branches: tf.switch_case(which, b), lambda p=picture: p)
  return picture


def autocontrast(picture: tf.Tensor, *_) -> tf.Tensor:
  """Every colour from its darkest to its brightest level is stretched to 0…255."""
  x = tf.cast(picture, tf.float32)
  low, high = tf.reduce_min(x, (0, 1)), tf.reduce_max(x, (0, 1))
  stretched = (x - low) * 255 / tf.maximum(high - low, 1)
  return _levels(tf.where(high > low, tf.floor(stretched), x))


def equalize(picture: tf.Tensor, *_) -> tf.Tensor:
  """Levels of every colour become about as frequent (Pillow's table)."""
  def table(colour):
    counts = tf.math.bincount(tf.reshape(tf.cast(colour, tf.int32), [-1]), minlength=256, maxlength=256)
    last = counts[tf.reduce_max(tf.where(counts > 0))]
    step = (tf.reduce_sum(counts) - last) // 255
    before = tf.cumsum(counts, exclusive=True)
    mapped = tf.cond(step > 0, lambda: tf.minimum((step // 2 + before) // tf.maximum(step, 1), 255), lambda: tf.range(256))
    return tf.gather(tf.cast(mapped, tf.uint8), tf.cast(colour, tf.int32))
  return tf.stack([table(picture[..., c]) for c in range(picture.shape[-1])], -1)


def invert(picture: tf.Tensor, *_) -> tf.Tensor:
  """255 - x."""
  return 255 - picture


def posterize(picture: tf.Tensor, level: tf.Tensor, _) -> tf.Tensor:
  """Keeps the upper 4 - ⌊4 · level⌋ bits."""
  kept = 4 - tf.cast(level * 4, tf.int32)
  return tf.bitwise.bitwise_and(picture, tf.cast(tf.bitwise.left_shift(255, 8 - kept) % 256, tf.uint8))


def solarize(picture: tf.Tensor, level: tf.Tensor, _) -> tf.Tensor:
  """Inverts what is at least as bright as 256 - ⌊256 · level⌋."""
  return tf.where(tf.cast(picture, tf.int32) >= 256 - tf.cast(level * 256, tf.int32), 255 - picture, picture)


def solarize_add(picture: tf.Tensor, level: tf.Tensor, _) -> tf.Tensor:
  """Makes what is darker than 128 brighter by ⌊110 · level⌋."""
  x = tf.cast(picture, tf.int32)
  return tf.cast(tf.where(x < 128, tf.minimum(x + tf.cast(level * 110, tf.int32), 255), x), tf.uint8)


def colour(picture: tf.Tensor, level: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
  """Nearer to grey, or further from it."""
  return _blend(_grey(picture), picture, level, sign)


def contrast(picture: tf.Tensor, level: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
  """Nearer to its mean grey, or further from it."""
  mean = tf.floor(tf.reduce_mean(_grey(picture)) + 0.5)
  return _blend(tf.fill(tf.shape(picture), mean), picture, level, sign)


def brightness(picture: tf.Tensor, level: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
  """Nearer to black, or further from it."""
  return _blend(tf.zeros(tf.shape(picture)), picture, level, sign)


def sharpness(picture: tf.Tensor, level: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
  """Nearer to a smoothed picture, or further from it; the outermost pixels stay."""
  C = picture.shape[-1]
  kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32)[..., None, None] / 13
  x = tf.cast(picture, tf.float32)
  smooth = tf.nn.depthwise_conv2d(x[None], tf.tile(kernel, [1, 1, C, 1]), [1, 1, 1, 1], 'VALID')[0]
  inside = tf.pad(tf.ones(tf.shape(smooth), tf.bool), [[1, 1], [1, 1], [0, 0]])
  smooth = tf.where(inside, tf.pad(smooth, [[1, 1], [1, 1], [0, 0]]), x)
  return _blend(tf.floor(smooth + 0.5), picture, level, sign)


def rotate(picture: tf.Tensor, level: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
  """Turned about its middle by up to 30°."""
  H, W = (tf.cast(s, tf.float32) for s in tf.unstack(tf.shape(picture)[:2]))
  a = sign * level * math.pi / 6
  x, y = (W - 1) / 2, (H - 1) / 2
  return _affine(picture, [tf.cos(a), -tf.sin(a), x - x * tf.cos(a) + y * tf.sin(a),
                           tf.sin(a), tf.cos(a), y - x * tf.sin(a) - y * tf.cos(a)])


def shear_x(picture: tf.Tensor, level: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
  """Row y moves left by up to 0.3 · y."""
  return _affine(picture, [1.0, sign * level * 0.3, 0.0, 0.0, 1.0, 0.0])


def shear_y(picture: tf.Tensor, level: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
  """Column x moves up by up to 0.3 · x."""
  return _affine(picture, [1.0, 0.0, 0.0, sign * level * 0.3, 1.0, 0.0])


def translate_x(picture: tf.Tensor, level: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
  """Moved by up to 0.45 of its width."""
  return _affine(picture, [1.0, 0.0, sign * level * 0.45 * tf.cast(tf.shape(picture)[1], tf.float32), 0.0, 1.0, 0.0])


def translate_y(picture: tf.Tensor, level: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
  """Moved by up to 0.45 of its height."""
  return _affine(picture, [1.0, 0.0, 0.0, 0.0, 1.0, sign * level * 0.45 * tf.cast(tf.shape(picture)[0], tf.float32)])


# (picture uint8 [H, W, C], level in 0…1, sign ±1) → the same.
OPERATIONS: dict[str, Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]] = {
    f.__name__: f for f in (
        autocontrast, equalize, invert, rotate, posterize, solarize, solarize_add, colour, contrast, brightness, sharpness,
        shear_x, shear_y, translate_x, translate_y)}


def erase(picture: tf.Tensor, h: tf.Tensor, probability: float) -> tf.Tensor:
  """In a share of the cases, noise in the place of a rectangle of 2 to 33 % of the area: uint8 [H, W, C].

  The first of ten draws of a rectangle that fits counts; if none does, the picture stays as it is.
  """
  H, W = tf.unstack(tf.shape(picture)[:2])
  draws = hashing.mix_tensor(h, tf.range(_TRIES, dtype=tf.int64))
  area = _ERASED[0] + (_ERASED[1] - _ERASED[0]) * hashing.uniform(hashing.mix_tensor(draws, 'erased area'))
  area = tf.cast(H * W, tf.float32) * area
  log = [math.log(a) for a in _ASPECT]
  aspect = tf.exp(log[0] + (log[1] - log[0]) * hashing.uniform(hashing.mix_tensor(draws, 'erased aspect')))
  height = tf.cast(tf.round(tf.sqrt(area * aspect)), tf.int32)
  width = tf.cast(tf.round(tf.sqrt(area / aspect)), tf.int32)
  fits = (height < H) & (width < W)
  first = tf.minimum(tf.where(tf.concat([fits, [True]], 0))[0, 0], _TRIES - 1)
  height, width = height[first], width[first]
  top = hashing.randint(hashing.mix_tensor(h, 'erased down'), tf.maximum(H - height, 1))
  left = hashing.randint(hashing.mix_tensor(h, 'erased right'), tf.maximum(W - width, 1))
  rows, columns = tf.range(H)[:, None, None], tf.range(W)[None, :, None]
  inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
  seed = tf.cast(tf.bitwise.bitwise_and(hashing.mix_tensor(h[None], tf.range(2, dtype=tf.int64)), 0x7FFFFFFF), tf.int32)
  noise = _NOISE_MEAN + _NOISE_STD * tf.random.stateless_normal(tf.shape(picture), seed)
  acts = (hashing.uniform(hashing.mix_tensor(h, 'erased at all')) < probability) & tf.reduce_any(fits)
  return tf.where(acts & inside, _levels(tf.round(255 * noise)), picture)


def _levels(x: tf.Tensor) -> tf.Tensor:
  return tf.saturate_cast(x, tf.uint8)


def _grey(picture: tf.Tensor) -> tf.Tensor:
  """Float levels of brightness (ITU-R 601), the same in every colour."""
  x = tf.cast(picture, tf.float32)
  if picture.shape[-1] == 1:
    return x
  return tf.repeat(tf.floor(tf.reduce_sum(x * [0.299, 0.587, 0.114], -1, keepdims=True) + 0.5), 3, -1)


def _blend(other: tf.Tensor, picture: tf.Tensor, level: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
  """other + f · (picture - other) with f = 1 ± 0.9 · level, at least 0.1."""
  factor = tf.maximum(1 + sign * 0.9 * level, 0.1)
  return _levels(tf.floor(other + factor * (tf.cast(picture, tf.float32) - other)))


def _affine(picture: tf.Tensor, coefficients: list) -> tf.Tensor:
  """The pixel at (x, y) becomes that at (a x + b y + c, d x + e y + f), bilinearly; outside is ImageNet's mean."""
  transform = tf.stack([tf.cast(c, tf.float32) for c in coefficients] + [0.0, 0.0])[None]
  fill = tf.constant(_FILL if picture.shape[-1] == 3 else _FILL[:1], tf.float32)
  # Levels relative to the fill, so that zeros enter in its place.
  moved = tf.raw_ops.ImageProjectiveTransformV3(
      images=(tf.cast(picture, tf.float32) - fill)[None], transforms=transform, output_shape=tf.shape(picture)[:2],
      fill_value=0.0, interpolation='BILINEAR', fill_mode='CONSTANT')[0]
  return tf.ensure_shape(_levels(tf.floor(moved + fill + 0.5)), picture.shape)
