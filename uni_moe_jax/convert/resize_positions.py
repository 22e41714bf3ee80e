"""Interpolation of position tables: half-pixel centers, no antialiasing, as the published code loads a checkpoint."""

import math

import jax
import numpy as np

from uni_moe_jax.utils.errors import UsageError


def spatial(table: np.ndarray, rows: int) -> np.ndarray:
  """Spatial table [side², D] → [rows, D], bilinear; raises UsageError where a number of rows is not a square."""
  old, new = math.isqrt(len(table)), math.isqrt(rows)
  if old * old != len(table) or new * new != rows:
    raise UsageError(f'cannot resize a spatial table from {len(table)} to {rows} rows: both must be squares.')
  return linear(table.reshape(old, old, -1), new, new).reshape(rows, -1)


def linear(table: np.ndarray, *sizes: int) -> np.ndarray:
  """Table [*n, D] → [*sizes, D]."""
  return np.asarray(jax.image.resize(table, (*sizes, table.shape[-1]), 'linear', antialias=False))
