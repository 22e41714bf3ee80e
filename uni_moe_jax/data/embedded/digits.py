"""Handwritten digits from scikit-learn (UCI optical recognition, 8 × 8 pixels), drawn like glyphs.

The writers are unknown, so one writer may be in several splits.
"""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from uni_moe_jax.data.embedded.glyphs import SIZE
from uni_moe_jax.data.shards.writer import Split

SPLITS = ('train', 'validation', 'test')
# The names of the glyphs of these digits in the Unicode Standard.
NAMES = tuple(f'digit {word}' for word in 'zero one two three four five six seven eight nine'.split())

_TEST_FRACTION, _VALIDATION_FRACTION = 0.3, 0.1  # of every class
_MAX_VALUE = 16  # brightest value of the source
_BOX, _TOP = 16, 8  # the box of a glyph's digit: 16 rows that end at the glyphs' baseline, centered horizontally


def draw(values: np.ndarray) -> np.ndarray:
  """Draws a digit, [8, 8] in 0…16, like a glyph: uint8 [SIZE, SIZE], white on black."""
  small = Image.fromarray(np.rint(values * (255 / _MAX_VALUE)).astype(np.uint8))
  image, left = np.zeros((SIZE, SIZE), np.uint8), (SIZE - _BOX) // 2
  image[_TOP:_TOP + _BOX, left:left + _BOX] = small.resize((_BOX, _BOX), Image.Resampling.BICUBIC)
  return image


def assign_splits(labels: np.ndarray) -> np.ndarray:
  """Assigns a split to each image, unicode [N]: orders a class by hashes of its indices and cuts it."""
  splits = np.full(len(labels), SPLITS[0], dtype='U10')
  for label in np.unique(labels):
    indices = sorted(np.flatnonzero(labels == label), key=lambda i: hashlib.sha256(f'digit {i}'.encode()).digest())
    num_test = round(_TEST_FRACTION * len(indices))
    splits[indices[:num_test]] = 'test'
    splits[indices[num_test:num_test + round(_VALIDATION_FRACTION * len(indices))]] = 'validation'
  return splits


def splits(report: Callable[[str], None] = print) -> Iterator[Split]:
  """Yields SPLITS: pixels uint8 [N, 32, 32], and name as text [N]."""
  from sklearn import datasets  # imported late: it takes a second
  digits = datasets.load_digits()
  split_of = assign_splits(digits.target)
  for split in SPLITS:
    chosen = np.flatnonzero(split_of == split)
    report(f'digits: {split} has {len(chosen)} images')
    yield split, {'pixels': np.stack([draw(digits.images[i]) for i in chosen]),
                  'name': np.array(NAMES)[digits.target[chosen]]}, {'name': NAMES}
