"""Operations of RandAugment and random erasing: by hand, against Pillow, and their frequency."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from uni_moe_jax.data import hashing
from uni_moe_jax.data.examples import augmentations


def _h(i):
  return hashing.mix_constant('augment', i)


def _apply(name, image, level=1.0, sign=1.0):
  return augmentations.OPERATIONS[name](tf.constant(image), tf.constant(float(level)), tf.constant(float(sign))).numpy()


def _row(*levels):
  return np.array(levels, np.uint8)[None, :, None]


def _noise(seed=0, size=(12, 10)):
  return np.random.default_rng(seed).integers(20, 200, (*size, 3), np.uint8)


@pytest.mark.parametrize('name, level, sign, before, after', [
    # (x - 50) · 255 / 100
    ('autocontrast', 0, 1, (50, 100, 150), (0, 127, 255)),
    ('autocontrast', 0, 1, (7, 7, 7), (7, 7, 7)),
    ('invert', 0, 1, (0, 100, 255), (255, 155, 0)),
    # 4 - ⌊4 · 0.5⌋ = 2 bits: multiples of 64. At level 1 none is kept.
    ('posterize', 0.5, 1, (63, 64, 255), (0, 64, 192)),
    ('posterize', 1.0, 1, (63, 64, 255), (0, 0, 0)),
    # From 256 - 128 on.
    ('solarize', 0.5, 1, (127, 128, 200), (127, 127, 55)),
    # ⌊110 · 0.5⌋ = 55 more, below 128.
    ('solarize_add', 0.5, 1, (0, 100, 128), (55, 155, 128)),
    # f = 1 ± 0.9 · 0.5 of the level
    ('brightness', 0.5, 1, (0, 100, 200), (0, 145, 255)),
    ('brightness', 0.5, -1, (0, 100, 200), (0, 55, 110)),
    ('brightness', 1.0, -1, (0, 100, 200), (0, 10, 20)),  # at least 0.1
    # The mean is 100: 100 + 1.9 · (x - 100)
    ('contrast', 1.0, 1, (50, 100, 150), (5, 100, 195)),
])
def test_levels_equal_those_computed_by_hand(name, level, sign, before, after):
  np.testing.assert_array_equal(_apply(name, _row(*before), level, sign), _row(*after))


def test_color_blends_with_gray_and_away_from_it():
  # Gray of (200, 100, 0): 0.299 · 200 + 0.587 · 100 = 118.5, rounded up 119.
  image = np.full((2, 2, 3), (200, 100, 0), np.uint8)
  np.testing.assert_array_equal(_apply('color', image, 1.0, -1.0)[0, 0], [127, 117, 107])  # 119 + 0.1 · (81, -19, -119)
  np.testing.assert_array_equal(_apply('color', image, 0.0)[0, 0], [200, 100, 0])


def test_sharpness_blends_with_pillows_smoothing():
  image = _noise()
  for level, sign in ((1.0, -1.0), (0.5, 1.0)):
    expected = ImageEnhance.Sharpness(Image.fromarray(image)).enhance(max(0.1, 1 + sign * 0.9 * level))
    assert np.abs(_apply('sharpness', image, level, sign).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize('seed', range(3))
def test_equalize_and_autocontrast_equal_pillows(seed):
  pixels = _noise(seed, (40, 50))
  image = Image.fromarray(pixels)
  np.testing.assert_array_equal(_apply('equalize', pixels), np.asarray(ImageOps.equalize(image)))
  assert np.abs(_apply('autocontrast', pixels).astype(int) - np.asarray(ImageOps.autocontrast(image))).max() <= 1


def test_geometric_operations_move_a_pixel():
  image = np.full((11, 11, 3), augmentations._FILL, np.uint8)
  image[5, 5] = 255
  position = lambda p: tuple(np.unravel_index(p[..., 0].argmax(), p.shape[:2]))
  assert position(_apply('translate_x', image, 4 / 4.95)) == (5, 1)  # 4 to the left
  assert position(_apply('translate_y', image, 4 / 4.95, -1.0)) == (9, 5)
  assert position(_apply('shear_x', image, 2 / 3)) == (5, 4)  # row 5: 0.2 · 5 = 1
  assert position(_apply('rotate', image)) == (5, 5)
  image[5, 5], image[5, 9] = augmentations._FILL, 255
  assert position(_apply('rotate', image)) in ((3, 8), (7, 8))  # a distance of 4 turned by 30°: (2, 3.46)


def test_operations_with_a_neutral_level_zero_change_nothing_there():
  image = _noise()
  without_neutral_level = {'autocontrast', 'equalize', 'invert', 'posterize', 'solarize', 'solarize_add'}
  for name in set(augmentations.OPERATIONS) - without_neutral_level:
    np.testing.assert_array_equal(_apply(name, image, 0.0), image, name)


def test_randaugment_depends_on_the_hash_and_applies_each_operation_half_of_the_time():
  image = _noise()
  function = tf.function(lambda h: augmentations.randaugment(tf.constant(image), h, 9.0))
  made = [function(_h(i)).numpy() for i in range(120)]
  np.testing.assert_array_equal(function(_h(3)), made[3])
  unchanged = np.mean([np.array_equal(m, image) for m in made])
  assert abs(unchanged - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 120)
  assert len({m.tobytes() for m in made}) > 70


def test_a_rectangle_becomes_noise_with_the_given_probability():
  image = np.zeros((20, 24, 3), np.uint8)
  function = tf.function(lambda h: augmentations.random_erasing(tf.constant(image), h, 0.25))
  made = [function(_h(i)).numpy() for i in range(160)]
  erased = [m for m in made if m.any()]
  assert abs(len(erased) / 160 - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 160)
  for m in erased:
    rows, columns = np.flatnonzero(m.any((1, 2))), np.flatnonzero(m.any((0, 2)))
    area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) / 480
    assert 0.01 < area < 0.38 and m[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].any(-1).mean() > 0.9


def test_the_sides_of_a_rectangle_do_not_depend_on_how_many_others_are_drawn():
  # A rectangle whose height is between 226 and 227 pixels, to the last bit.
  sides = lambda n: augmentations.random_sides(
      tf.constant([500, 500]), tf.fill([n], 0.2126074582338333), tf.fill([n], 0.5615585446357727), (3 / 4, 4 / 3))
  assert len({tuple(side) for n in range(1, 18) for side in sides(n).numpy().T.tolist()}) == 1
