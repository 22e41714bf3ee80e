"""Handwritten digits: drawn like glyphs, split once and for all, no picture in two splits."""

import numpy as np
import pytest

from uni_moe_jax.data import sources
from uni_moe_jax.data.embedded import digits


@pytest.fixture(name='splits', scope='module')
def _splits():
  return {split: sources.load('digits', '/nowhere', split) for split in digits.SPLITS}


def test_a_digit_stands_where_a_glyph_does():
  values = np.zeros((8, 8))
  values[0, 0], values[7, 7] = 16, 8
  picture = digits.draw(values)
  rows, columns = np.flatnonzero(picture.any(1)), np.flatnonzero(picture.any(0))
  assert (picture.shape, picture.dtype) == ((32, 32), np.uint8)
  # 8 rows below the baseline and 8 columns at each side are free; twice as large as it was.
  assert (rows[0], rows[-1], columns[0], columns[-1]) == (8, 23, 8, 23)
  assert picture[8, 8] > 200 and 100 < picture[23, 23] < 160


def test_bright_is_ink(splits):
  pixels = splits['train'].columns['pixels'] / 255
  assert pixels[:, 0].max() == 0 and pixels[:, 10:22, 12:20].mean() > .25


def test_sizes_and_names_of_the_splits(splits):
  # 178 zeros: 53 (round(53.4)) are tests, 18 validation.
  zeros = {split: int((r.columns['name'] == 'digit zero').sum()) for split, r in splits.items()}
  assert zeros == {'train': 107, 'validation': 18, 'test': 53}
  assert sum(len(r.columns['name']) for r in splits.values()) == 1797
  assert all(r.classes['name'] == digits.NAMES and set(r.columns['name']) == set(digits.NAMES) for r in splits.values())
  assert digits.NAMES[3] == 'digit three'


def test_no_picture_is_in_two_splits(splits):
  seen = [{p.tobytes() for p in r.columns['pixels']} for r in splits.values()]
  assert sum(map(len, seen)) == len(set.union(*seen)) == 1797


def test_a_split_is_fixed_and_a_class_moves_no_other():
  labels = np.repeat([0, 1], 40)
  splits = digits.assign_splits(labels)
  assert [list(splits[labels == k]).count('test') for k in (0, 1)] == [12, 12]
  longer = digits.assign_splits(np.concatenate([labels, [1] * 20]))
  assert (longer[:40] == splits[:40]).all() and (longer[40:80] != splits[40:]).any()


def test_an_unknown_split_lists_those_there_are():
  with pytest.raises(ValueError, match="'test_fonts' is not in digits; choose from train, validation, test"):
    sources.load('digits', '/nowhere', 'test_fonts')
