"""Hashes for decisions of the host: pure functions of (seed, purpose, example), without state.

`mix` is SplitMix64's finalizer (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
"""

import functools
import zlib

import numpy as np

GAMMA, STEPS = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31
MASK = (1 << 64) - 1


def mix(*values: int | str | np.ndarray) -> int | np.ndarray:
  """Returns a 64-bit hash of integers and strings, or of arrays uint64 element by element; their order matters."""
  return functools.reduce(fold, values, 0)


def fold(h: int | np.ndarray, value: int | str | np.ndarray) -> int | np.ndarray:
  """Returns `mix` of the values of a hash and one more."""
  if not isinstance(value, np.ndarray):
    value = number(value)
  h = (h ^ value) + GAMMA & MASK
  for shift, factor in STEPS:
    h = (h ^ h >> shift) * factor & MASK
  return h ^ h >> LAST_SHIFT


def number(value: int | str) -> int:
  """Returns what a value is in a hash."""
  return zlib.crc32(value.encode()) if isinstance(value, str) else int(value)


def uniform(*values: int | str) -> float:
  """Returns a number in [0, 1] from `mix` of the values; 1 only by rounding."""
  return int(mix(*values)) / 2**64
