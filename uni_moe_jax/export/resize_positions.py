"""Interpolation of position tables: bilinear over the square of patches, linear over frames.

It uses half-pixel centers and no antialiasing, as the published code does when it loads a checkpoint.
"""

import math

import jax
import numpy as np

from uni_moe_jax.utils.errors import UsageError


def spatial(table: np.ndarray, rows: int) -> np.ndarray:
  """Spatial table [side², D] → [rows, D].

  Raises:
    UsageError: either number of rows is not a square.
  """
  old, new = math.isqrt(len(table)), math.isqrt(rows)
  if old * old != len(table) or new * new != rows:
    raise UsageError(f'cannot resize a spatial table from {len(table)} to {rows} rows: both must be squares.')
  width = table.shape[1]
  grid = jax.image.resize(table.reshape(old, old, width), (new, new, width), 'linear', antialias=False)
  return np.asarray(grid).reshape(rows, width)


def temporal(table: np.ndarray, rows: int) -> np.ndarray:
  """Temporal table [T, D] → [rows, D]."""
  return np.asarray(jax.image.resize(table, (rows, table.shape[1]), 'linear', antialias=False))
