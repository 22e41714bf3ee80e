"""Position tables for other sizes: bilinear over the square of patches, linear over frames; half-pixel centres, no
smoothing, as the published code interpolates when it loads a checkpoint."""

import math

import jax
import numpy as np

from uni_moe_jax.utils.errors import UsageError


def spatial(table: np.ndarray, rows: int) -> np.ndarray:
  """Spatial rows [side², D] → [rows, D].

  Raises:
    UsageError: either number of rows is no square.
  """
  old, new = math.isqrt(len(table)), math.isqrt(rows)
  if old * old != len(table) or new * new != rows:
    raise UsageError(f'spatial tables of {len(table)} and {rows} rows: both must be squares to be resized.')
  width = table.shape[1]
  grid = jax.image.resize(table.reshape(old, old, width), (new, new, width), 'linear', antialias=False)
  return np.asarray(grid).reshape(rows, width)


def temporal(table: np.ndarray, rows: int) -> np.ndarray:
  """Temporal rows [T, D] → [rows, D]."""
  return np.asarray(jax.image.resize(table, (rows, table.shape[1]), 'linear', antialias=False))
