"""Random affine transforms of images."""

import numpy as np
import tensorflow as tf

from tests.helpers.example_hashes import example_hashes
from uni_moe_jax.data.examples import augmentations

SIDE, CENTER = 33, 16


def _matrices(n, max_affine):
  """The transforms of n examples, f64 [n, 2, 3]: a video whose frames are ramps shows where its pixels come from."""
  y, x = np.mgrid[:SIDE, :SIDE] * 7
  ramps = np.broadcast_to(np.stack([x, y]).astype(np.uint8)[None, ..., None], (n, 2, SIDE, SIDE, 1))
  moved = augmentations.random_affine(tf.constant(ramps), example_hashes(n), max_affine).numpy()[..., 0] / 7
  inner = slice(10, 23)  # what comes from outside is 0 and no ramp
  rows, columns = np.mgrid[:SIDE, :SIDE][:, inner, inner].reshape(2, -1) - CENTER
  points = np.stack([columns, rows, np.ones_like(rows)], 1)
  sources = moved[:, :, inner, inner].reshape(n * 2, -1).T - CENTER
  return np.linalg.lstsq(points, sources, rcond=None)[0].T.reshape(n, 2, 3)


def _factors(matrices):
  """(shear, angle, scale x, scale y), each [n], of S R K = [[a, b], [c, d]]: det S R K = x y, a c = x y cos sin."""
  (a, b), (c, d) = matrices.transpose(1, 2, 0)
  area = a * d - b * c
  angle = np.arcsin(2 * a * c / area) / 2
  x = a / np.cos(angle)
  return (b + x * np.sin(angle)) / a, angle, x, area / x


def test_a_transform_is_a_shear_a_rotation_and_scales_about_the_center_within_their_bounds():
  matrices = _matrices(400, .1)
  assert abs(matrices[:, :, 2]).max() < .1  # pixels; the center stays, up to the rounding of brightness
  shear, angle, x, y = _factors(matrices[abs(matrices[:, :, :2] - np.eye(2)).max((1, 2)) > .002, :, :2])
  draws = np.stack([shear / 2, angle, np.log(x), np.log(y)])
  assert abs(np.corrcoef(draws)[np.triu_indices(4, 1)]).max() < 4 / np.sqrt(draws.shape[1])
  for values in draws:
    assert .09 < values.max() < .11 and -.11 < values.min() < -.09
    assert abs(values.mean()) < 4 * .1 / np.sqrt(3 * len(values))


def test_half_of_the_images_stay_as_they_are():
  n = 1000
  images = np.random.default_rng(0).integers(0, 256, (n, 1, 8, 8, 1), dtype=np.uint8)
  moved = augmentations.random_affine(tf.constant(images), example_hashes(n), .1).numpy()
  assert abs((moved == images).all((1, 2, 3, 4)).mean() - .5) < 4 * np.sqrt(.25 / n)


def test_all_frames_and_channels_of_a_video_are_transformed_equally():
  image = np.random.default_rng(0).integers(1, 256, (6, 1, 8, 8, 1), dtype=np.uint8)
  moved = augmentations.random_affine(tf.constant(np.tile(image, (1, 3, 1, 1, 2))), example_hashes(6), .2).numpy()
  np.testing.assert_array_equal(moved, np.tile(moved[:, :1, :, :, :1], (1, 3, 1, 1, 2)))
  assert (moved[:, :1, :, :, :1] != image).any()


def test_zeros_enter_where_the_image_ends():
  image = tf.fill([40, 1, 16, 16, 1], tf.constant(200, tf.uint8))
  moved = augmentations.random_affine(image, example_hashes(40), .2).numpy()
  assert moved.min() == 0 and set(moved[:, 0, 6:10, 6:10].ravel().tolist()) <= {199, 200}


def test_a_transform_does_not_depend_on_the_other_images_of_a_batch():
  n = 600  # a resumed run, and one of more processes, makes other images together
  images = tf.constant(np.random.default_rng(0).integers(0, 256, (n, 1, 32, 32, 3), dtype=np.uint8))
  affine = lambda start, stop: augmentations.random_affine(images[start:stop], example_hashes(n)[start:stop], .2)
  made = np.concatenate([affine(i, i + 37) for i in range(0, n, 37)])
  np.testing.assert_array_equal(made, affine(0, n))


def test_a_bound_of_zero_returns_the_same_tensor():
  videos = tf.zeros([2, 1, 4, 4, 1], tf.uint8)
  assert augmentations.random_affine(videos, example_hashes(2), 0.0) is videos
