"""Handwritten digits: drawn like glyphs, in fixed splits that share no image."""

import numpy as np
import pytest

from uni_moe_jax.data.embedded import digits


@pytest.fixture(name='splits', scope='module')
def _splits():
  return {split: columns for split, columns, _ in digits.splits(lambda line: None)}


def test_a_digit_is_drawn_in_the_box_of_a_glyph():
  values = np.zeros((8, 8))
  values[0, 0], values[7, 7] = 16, 8
  image = digits.draw(values)
  rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
  assert (image.shape, image.dtype) == ((32, 32), np.uint8)
  # 8 rows below the baseline and 8 columns at each side are empty; the digit has twice its size.
  assert (rows[0], rows[-1], columns[0], columns[-1]) == (8, 23, 8, 23)
  assert image[8, 8] > 200 and 100 < image[23, 23] < 160


def test_bright_pixels_are_ink(splits):
  pixels = splits['train']['pixels'] / 255
  assert pixels[:, 0].max() == 0 and pixels[:, 10:22, 12:20].mean() > .25


def test_sizes_and_names_of_the_splits(splits):
  # 178 zeros: 53 (round(53.4)) in test, 18 in validation.
  zeros = {split: int((c['name'] == 'digit zero').sum()) for split, c in splits.items()}
  assert zeros == {'train': 107, 'validation': 18, 'test': 53}
  assert sum(len(c['name']) for c in splits.values()) == 1797
  assert all(set(columns['name']) == set(digits.NAMES) for columns in splits.values())
  assert digits.NAMES[3] == 'digit three'


def test_no_image_is_in_two_splits(splits):
  images = [{p.tobytes() for p in c['pixels']} for c in splits.values()]
  assert sum(map(len, images)) == len(set.union(*images)) == 1797


def test_splits_of_a_class_do_not_depend_on_other_classes():
  labels = np.repeat([0, 1], 40)
  splits = digits.assign_splits(labels)
  assert [list(splits[labels == k]).count('test') for k in (0, 1)] == [12, 12]
  longer = digits.assign_splits(np.concatenate([labels, [1] * 20]))
  assert (longer[:40] == splits[:40]).all() and (longer[40:80] != splits[40:]).any()
