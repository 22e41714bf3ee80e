"""Operands and backends of the grouped product; a backend of an extra is skipped where it is not installed."""

import importlib.util

import jax
import numpy as np
import pytest

from uni_moe_jax.tasks.router_names import GMM_BACKENDS

TOKAMAX = pytest.mark.skipif(importlib.util.find_spec('tokamax') is None, reason='tokamax is not installed')
ALL = [pytest.param(backend, marks=TOKAMAX if backend == 'tokamax' else []) for backend in GMM_BACKENDS]

# Groups within a tile, over many tiles, of whole tiles, none at all, and all rows in one; and one whose last tile
# reaches beyond all rows.
SIZES = {'uneven': (3, 0, 9, 2), 'whole_tiles': (4, 8, 0, 4), 'last_only': (0, 0, 0, 14), 'first_only': (16, 0, 0, 0),
         'none': (0, 0, 0, 0), 'beyond': (3, 0, 6, 7)}


def normal(seed: int, *shape: int) -> jax.Array:
  """Random float32 numbers."""
  return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
