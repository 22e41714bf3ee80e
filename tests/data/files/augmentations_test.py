"""Operations of RandAugment and random erasing: levels worked out by hand, Pillow's, and how often they act."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from uni_moe_jax.data.files import augmentations
from uni_moe_jax.data.pipeline import hashing


def _h(i):
  return tf.constant(np.uint64(hashing.mix('augment', i)))


def _act(name, picture, level=1.0, sign=1.0):
  return augmentations.OPERATIONS[name](tf.constant(picture), tf.constant(float(level)), tf.constant(float(sign))).numpy()


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
    # f = 1 ± 0.9 · 0.5 of the level itself
    ('brightness', 0.5, 1, (0, 100, 200), (0, 145, 255)),
    ('brightness', 0.5, -1, (0, 100, 200), (0, 55, 110)),
    ('brightness', 1.0, -1, (0, 100, 200), (0, 10, 20)),  # at least 0.1
    # The mean is 100: 100 + 1.9 · (x - 100)
    ('contrast', 1.0, 1, (50, 100, 150), (5, 100, 195)),
])
def test_levels_by_hand(name, level, sign, before, after):
  np.testing.assert_array_equal(_act(name, _row(*before), level, sign), _row(*after))


def test_colour_goes_to_grey_and_away_from_it():
  # Grey of (200, 100, 0): 0.299 · 200 + 0.587 · 100 = 118.5, rounded up 119.
  picture = np.full((2, 2, 3), (200, 100, 0), np.uint8)
  np.testing.assert_array_equal(_act('colour', picture, 1.0, -1.0)[0, 0], [127, 117, 107])  # 119 + 0.1 · (81, -19, -119)
  np.testing.assert_array_equal(_act('colour', picture, 0.0)[0, 0], [200, 100, 0])


def test_sharpness_blends_with_pillows_smooth():
  from PIL import ImageEnhance
  picture = _noise()
  for level, sign in ((1.0, -1.0), (0.5, 1.0)):
    expected = ImageEnhance.Sharpness(Image.fromarray(picture)).enhance(max(0.1, 1 + sign * 0.9 * level))
    assert np.abs(_act('sharpness', picture, level, sign).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize('seed', range(3))
def test_equalize_and_autocontrast_are_pillows(seed):
  picture = _noise(seed, (40, 50))
  image = Image.fromarray(picture)
  np.testing.assert_array_equal(_act('equalize', picture), np.asarray(ImageOps.equalize(image)))
  assert np.abs(_act('autocontrast', picture).astype(int) - np.asarray(ImageOps.autocontrast(image))).max() <= 1


def test_shapes_move_as_they_should():
  picture = np.full((11, 11, 3), augmentations._FILL, np.uint8)
  picture[5, 5] = 255
  where = lambda p: tuple(np.unravel_index(p[..., 0].argmax(), p.shape[:2]))
  assert where(_act('translate_x', picture, 4 / 4.95)) == (5, 1)  # 4 to the left
  assert where(_act('translate_y', picture, 4 / 4.95, -1.0)) == (9, 5)
  assert where(_act('shear_x', picture, 2 / 3)) == (5, 4)  # row 5: 0.2 · 5 = 1
  assert where(_act('rotate', picture)) == (5, 5)
  picture[5, 5], picture[5, 9] = augmentations._FILL, 255
  assert where(_act('rotate', picture)) in ((3, 8), (7, 8))  # a distance of 4 turned by 30°: (2, 3.46)


def test_nothing_happens_to_a_picture_at_level_zero_but_for_what_has_no_level():
  picture = _noise()
  for name in set(augmentations.OPERATIONS) - {'autocontrast', 'equalize', 'invert', 'posterize', 'solarize', 'solarize_add'}:
    np.testing.assert_array_equal(_act(name, picture, 0.0), picture, name)


def test_randaugment_is_the_examples_own_and_two_operations_act_in_half_of_the_cases():
  picture = _noise()
  function = tf.function(lambda h: augmentations.randaugment(tf.constant(picture), h, 9.0))
  made = [function(_h(i)).numpy() for i in range(120)]
  np.testing.assert_array_equal(function(_h(3)), made[3])
  untouched = np.mean([np.array_equal(m, picture) for m in made])
  assert abs(untouched - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 120)
  assert len({m.tobytes() for m in made}) > 70


def test_a_rectangle_becomes_noise_as_often_as_asked():
  picture = np.zeros((20, 24, 3), np.uint8)
  function = tf.function(lambda h: augmentations.erase(tf.constant(picture), h, 0.25))
  made = [function(_h(i)).numpy() for i in range(160)]
  erased = [m for m in made if m.any()]
  assert abs(len(erased) / 160 - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 160)
  for m in erased:
    rows, columns = np.flatnonzero(m.any((1, 2))), np.flatnonzero(m.any((0, 2)))
    area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) / 480
    assert 0.01 < area < 0.38 and m[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].any(-1).mean() > 0.9
