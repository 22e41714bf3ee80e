"""The work of `input_rate` on images of files as one would write it by hand in plain tf.data, for comparison.

Its order cannot be resumed, its batches depend on the machine, and a damaged file ends it.
"""

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from uni_moe_jax.data.examples import image_transforms
from uni_moe_jax.data.examples.video_pixels import MAX_DRAWS
from uni_moe_jax.utils import cores


def jpegs(
    paths: Sequence[pathlib.Path], labels: Sequence[int], size: int, batch_size: int, resize: str) -> Iterator[Any]:
  """Batches of a random area of each image, mirrored or not, with its label; resize: 'area' or 'bicubic'."""
  def decode(path, label):
    encoded = tf.io.read_file(path)
    # tf.image.sample_distorted_bounding_box would draw parts that are smaller, 0.37 instead of 0.43 of these images.
    area, ratio = tf.unstack(tf.random.uniform([2, MAX_DRAWS]))
    corner = tf.cast(tf.random.uniform([2], maxval=tf.int64.max, dtype=tf.int64), tf.uint64)
    corner, sides = image_transforms.part(
        tf.io.extract_jpeg_shape(encoded)[:2], size, {'area': area, 'ratio': ratio, 'corner': corner},
        'random_resized_crop')
    image = tf.io.decode_and_crop_jpeg(encoded, tf.concat([corner, sides], 0), 3)
    image = tf.saturate_cast(tf.image.resize(image, [size, size], resize, antialias=True) + 0.5, tf.uint8)
    return tf.image.random_flip_left_right(image), label
  return _batches(decode, (list(map(str, paths)), labels), batch_size)


def pngs(paths: Sequence[pathlib.Path], captions: np.ndarray, size: int, batch_size: int) -> Iterator[Any]:
  """Batches of images, mirrored or not, each with one of its captions, int32 [N, K, S]."""
  def decode(path, tokens):
    image = tf.image.random_crop(tf.io.decode_png(tf.io.read_file(path), 3), [size, size, 3])
    caption = tokens[tf.random.uniform([], 0, captions.shape[1], tf.int32)]
    return tf.image.random_flip_left_right(image), caption
  return _batches(decode, (list(map(str, paths)), captions), batch_size)


def _batches(decode: Callable[..., Any], examples: Any, batch_size: int) -> Iterator[Any]:
  data = tf.data.Dataset.from_tensor_slices(examples).repeat().shuffle(1024).map(decode, cores.available())
  # With AUTOTUNE, hundreds of batches would be ready before they are timed.
  return data.batch(batch_size, drop_remainder=True).prefetch(1).as_numpy_iterator()
