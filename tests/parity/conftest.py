"""Parity is that of float32, also on a GPU or TPU, and of target sets in buckets."""

import jax
import pytest

from uni_moe_jax.data.batches import target_sets


@pytest.fixture(autouse=True)
def _full_float32():
  with jax.default_matmul_precision('highest'):
    yield


@pytest.fixture(autouse=True)
def _a_bucket_per_length(monkeypatch):
  """Sets this small have one bucket, as the published system has for all of them."""
  monkeypatch.setattr(target_sets, 'MIN_SAVED_TOKENS', 0)
  monkeypatch.setattr(target_sets, 'MIN_SAVED_SHARE', 0)
