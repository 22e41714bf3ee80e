"""Handwritten digits: the pictures that scikit-learn carries (UCI optical recognition, 8 × 8), drawn where glyphs are.

Who wrote a digit is not known there, so that a writer may be in several splits. Nothing is prepared: the package holds them.
"""

import collections
import hashlib

import numpy as np
from PIL import Image

from uni_moe_jax.data.embedded.glyphs import SIZE
from uni_moe_jax.data.pipeline import npz_records
from uni_moe_jax.data.pipeline.records import Records
from uni_moe_jax.utils.errors import UsageError

SPLITS = ('train', 'validation', 'test')
# As the Unicode Standard names the glyphs of these digits.
NAMES = tuple(f'digit {word}' for word in 'zero one two three four five six seven eight nine'.split())

_TEST_SHARE, _VALIDATION_SHARE = 0.3, 0.1  # of every class
_MOST = 16  # the brightest value there
# The box of a glyph's digit: 16 rows that stand on the glyphs' baseline, in the middle from left to right.
_BOX, _TOP = 16, 8


def draw(values: np.ndarray) -> np.ndarray:
  """A digit as a glyph is drawn, white on black.

  Args:
    values: [8, 8] in 0…16.

  Returns:
    uint8 [SIZE, SIZE].
  """
  small = Image.fromarray(np.rint(values * (255 / _MOST)).astype(np.uint8))
  picture, left = np.zeros((SIZE, SIZE), np.uint8), (SIZE - _BOX) // 2
  picture[_TOP:_TOP + _BOX, left:left + _BOX] = small.resize((_BOX, _BOX), Image.Resampling.BICUBIC)
  return picture


def assign_splits(labels: np.ndarray) -> np.ndarray:
  """A split for each picture, unicode [N]: within a class, pictures are ordered by a hash of their place and cut by share."""
  splits, members = np.full(len(labels), SPLITS[0], dtype='U10'), collections.defaultdict(list)
  for place, label in enumerate(labels):
    members[label].append(place)
  for places in members.values():
    places.sort(key=lambda place: hashlib.sha256(f'digit {place}'.encode()).digest())
    tested = round(_TEST_SHARE * len(places))
    splits[places[:tested]] = 'test'
    splits[places[tested:tested + round(_VALIDATION_SHARE * len(places))]] = 'validation'
  return splits


def load(split: str) -> Records:
  """One of SPLITS: pixels uint8 [N, 32, 32], and name as text [N], with its classes.

  Raises:
    UsageError: there is no such split.
  """
  from sklearn import datasets  # a second that only runs on digits should wait
  if split not in SPLITS:
    raise UsageError(f'split {split!r} is not in digits; choose from {", ".join(SPLITS)}.')
  digits = datasets.load_digits()
  chosen = np.flatnonzero(assign_splits(digits.target) == split)
  columns = {'pixels': np.stack([draw(digits.images[i]) for i in chosen]), 'name': np.array(NAMES)[digits.target[chosen]]}
  return Records(columns, {'name': NAMES}, npz_records.fingerprint(columns, {'name': NAMES}))
