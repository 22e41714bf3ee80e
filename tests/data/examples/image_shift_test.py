"""Random shifts of images."""

import numpy as np
import tensorflow as tf

from tests.helpers.example_hashes import example_hashes
from uni_moe_jax.data.examples import augmentations

IMAGE = np.arange(1, 17, dtype=np.uint8).reshape(4, 4)
# The image under every shift by at most one pixel, by (down, right); zeros enter.
SHIFTED = {
    (0, 0): [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]],
    (1, 0): [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]],
    (-1, 0): [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [0, 0, 0, 0]],
    (0, 1): [[0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11], [0, 13, 14, 15]],
    (0, -1): [[2, 3, 4, 0], [6, 7, 8, 0], [10, 11, 12, 0], [14, 15, 16, 0]],
    (1, 1): [[0, 0, 0, 0], [0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11]],
    (1, -1): [[0, 0, 0, 0], [2, 3, 4, 0], [6, 7, 8, 0], [10, 11, 12, 0]],
    (-1, 1): [[0, 5, 6, 7], [0, 9, 10, 11], [0, 13, 14, 15], [0, 0, 0, 0]],
    (-1, -1): [[6, 7, 8, 0], [10, 11, 12, 0], [14, 15, 16, 0], [0, 0, 0, 0]],
}


def _shift_copies(n, max_shift):
  """n copies of IMAGE, shifted: uint8 [n, 1, 4, 4, 1]."""
  images = tf.constant(np.tile(IMAGE[None, None, :, :, None], (n, 1, 1, 1, 1)))
  return augmentations.random_shift(images, example_hashes(n), max_shift).numpy()


def test_an_image_shifts_by_whole_pixels_and_zeros_enter():
  shifted = _shift_copies(90, 1)
  assert shifted.shape == (90, 1, 4, 4, 1)
  expected = {np.array(image, np.uint8).tobytes() for image in SHIFTED.values()}
  assert {image.tobytes() for image in shifted[:, 0, :, :, 0]} == expected


def test_half_of_the_images_stay_in_place():
  # Of those that may shift by two pixels, one in 25 draws no shift.
  n = 2000
  in_place = np.mean([np.array_equal(image[0, :, :, 0], IMAGE) for image in _shift_copies(n, 2)])
  assert abs(in_place - (.5 + .5 / 25)) < 4 * np.sqrt(.25 / n)


def test_all_frames_and_channels_of_a_video_shift_equally():
  def shift(video, down, right):
    padded = np.pad(video, ((0, 0), (3, 3), (3, 3), (0, 0)))
    return padded[:, 3 - down:11 - down, 3 - right:11 - right]

  videos = np.random.default_rng(0).integers(1, 255, (6, 3, 8, 8, 3), dtype=np.uint8)
  shifted = augmentations.random_shift(tf.constant(videos), example_hashes(6), 3).numpy()
  for i in range(6):
    matches = [(d, r) for d in range(-3, 4) for r in range(-3, 4) if np.array_equal(shifted[i], shift(videos[i], d, r))]
    assert len(matches) == 1


def test_a_shift_of_zero_returns_the_same_tensor():
  videos = tf.zeros([2, 1, 4, 4, 1], tf.uint8)
  assert augmentations.random_shift(videos, example_hashes(2), 0) is videos
