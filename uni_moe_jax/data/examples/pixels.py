"""From what records have of images and arrays to the pixels of a batch, in TensorFlow ops.

Ops that find out which image is damaged cost as much as decoding a small one. So there are two functions: one fails at
any damage, and one replaces what is damaged. The transforms are those of `image_transforms`; an array is seen whole.
Videos of files are decoded in processes, see `video_pixels`.
"""

import functools
import itertools
import math

import tensorflow as tf

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.data.examples import augmentations, image_transforms
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.utils import cores

_PNGS_AT_ONCE = 4  # in an iteration of a loop, which takes about 10 µs


class Pixels:
  """Makes the pixels of a task's examples, uint8 [n, T, S, S, C]."""

  def __init__(self, task: TaskSpec, records: FileDataset, size: int, channels: int, training: bool, resize: str):
    """size: S of images. channels: C. resize: 'fast' or 'pillow', see `image_transforms`."""
    self._task, self._size, self._channels, self._training, self._resize = task, size, channels, training, resize
    self._column, self._is_serialized = records.media_column(), records.read_examples is not None
    self._stored = records.shapes.get(self._column)  # [T, H, W, 1 or C], of arrays
    self._shape = [*self._stored[:3], channels] if self._stored else [1, size, size, channels]  # of an example
    self._flips = training and task.random_flip

  def decode(self, data: tf.Tensor, hashes: tf.Tensor) -> tf.Tensor:
    """The pixels of n examples. Fails at a damaged one.

    data: string [n], serialized examples, or images of a source that has none. hashes: uint64 [n], see
    `hashing.example_hash`.
    """
    encoded, draws, n = self._encoded(data), self._draws(hashes), tf.size(data)
    if self._stored:
      return self._augment(self._read_arrays(encoded), hashes)
    num_parts = -(-cores.available() // cores.batches_at_once())

    def decode_all(read, unroll):
      # A function that is not inlined is traced and optimized once, and costs nothing in the branch that is not taken.
      @functools.partial(tf.function, autograph=False, experimental_attributes={'_noinline': True})
      def decode_part(start, stop):
        # One after the other: handing each image to another thread would take as long as decoding a small one.
        images = tf.map_fn(
            lambda first: tf.stack([read(tf.minimum(first + i, n - 1)) for i in range(unroll)]),
            tf.range(start, stop, unroll), parallel_iterations=1,
            fn_output_signature=tf.TensorSpec([unroll, *self._shape[1:]], tf.uint8))
        images = tf.reshape(images, [-1, *self._shape])[:stop - start]
        return self._augment(images, hashes[start:stop])

      bounds = [tf.minimum(-(-n // unroll) * k // num_parts * unroll, n) for k in range(num_parts + 1)]
      return tf.concat([decode_part(*part) for part in itertools.pairwise(bounds)], 0)

    def decode_pngs():
      read = image_transforms.png_reader(encoded, self._channels, self._size, draws, self._task.crop)
      return decode_all(lambda i: self._flip(read(i), draws, i), _PNGS_AT_ONCE)

    def decode_any():
      return decode_all(lambda i: self._read_image(tf.gather(encoded, i), draws, i), 1)

    if self._resize != 'fast':
      return decode_any()
    return tf.cond(image_transforms.are_png(encoded), decode_pngs, decode_any)

  def decode_if_possible(self, data: tf.Tensor, hashes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """As `decode`, but a damaged example is black: (pixels, whether each is undamaged, bool [n])."""
    draws, n = self._draws(hashes), tf.size(data)

    @tf.autograph.experimental.do_not_convert
    def read(i):
      encoded = self._encoded(tf.gather(data, i))
      return i, self._read_arrays(encoded[None])[0] if self._stored else self._read_image(encoded, draws, i)[None]

    # Only a dataset can drop an element that fails. Examples are numbered, which shows the missing ones.
    images = tf.data.Dataset.range(tf.cast(n, tf.int64), output_type=tf.int32).map(
        read, cores.available(), deterministic=True).ignore_errors()
    sentinel = tf.data.Dataset.from_tensors((n, tf.zeros(self._shape, tf.uint8)))
    index, images = images.concatenate(sentinel).batch(tf.cast(n, tf.int64) + 1).get_single_element()
    images = tf.scatter_nd(index[:, None], images, [n + 1, *self._shape])[:n]
    ok = tf.scatter_nd(index[:, None], tf.ones_like(index), [n + 1])[:n] > 0
    return self._augment(images, hashes), ok

  def _encoded(self, data: tf.Tensor) -> tf.Tensor:
    """The bytes of one or several images or arrays. Fails at a damaged record."""
    if not self._is_serialized:
      return data
    return tf.io.parse_example(data, {self._column: tf.io.FixedLenFeature([], tf.string)})[self._column]

  def _read_arrays(self, encoded: tf.Tensor) -> tf.Tensor:
    """uint8 [n, T, H, W, C] from bytes [n]; gray becomes C equal channels."""
    flat = tf.ensure_shape(tf.io.decode_raw(encoded, tf.uint8), [None, math.prod(self._stored)])
    pixels = tf.reshape(flat, [-1, *self._stored])
    return tf.repeat(pixels, self._channels, -1) if self._stored[-1] < self._channels else pixels

  def _draws(self, hashes: tf.Tensor) -> dict[str, tf.Tensor]:
    return image_transforms.draws(hashes, self._task.crop, self._task.min_crop_area) if self._training else {}

  def _read_image(self, encoded: tf.Tensor, draws: dict[str, tf.Tensor], i: tf.Tensor) -> tf.Tensor:
    """uint8 [S, S, C] from the bytes of image i, mirrored or not."""
    draw = {k: tf.gather(x, i) for k, x in draws.items()} or None
    image = image_transforms.read(encoded, self._channels, self._size, draw, self._task.crop, self._resize)
    return self._flip(image, draws, i)

  def _flip(self, image: tf.Tensor, draws: dict[str, tf.Tensor], i: tf.Tensor) -> tf.Tensor:
    return image_transforms.random_flip(image, {'flip': tf.gather(draws['flip'], i)}) if self._flips else image

  def _augment(self, pixels: tf.Tensor, hashes: tf.Tensor) -> tf.Tensor:
    """uint8 [n, T, S, S, C] to the same shape."""
    t = self._task
    if self._training:
      pixels = move(pixels, hashes, t)
    if self._training and (t.randaugment or t.random_erasing) and not self._stored:
      def augment(x):
        image, h = tf.ensure_shape(x[0][0], self._shape[1:]), x[1]
        image = augmentations.randaugment(image, h, t.randaugment) if t.randaugment else image
        return (augmentations.random_erasing(image, h, t.random_erasing) if t.random_erasing else image)[None]
      pixels = tf.map_fn(augment, (pixels, hashes), parallel_iterations=1,
                         fn_output_signature=tf.TensorSpec(self._shape, tf.uint8))
    return tf.ensure_shape(pixels, [None, *self._shape])


def move(pixels: tf.Tensor, hashes: tf.Tensor, task: TaskSpec) -> tf.Tensor:
  """Moves training images or videos, uint8 [n, T, H, W, C], by the task's `max_affine` and `max_shift`."""
  pixels = augmentations.random_affine(pixels, hashes, task.max_affine)
  return augmentations.random_shift(pixels, hashes, task.max_shift)
