"""Parity is that of float32: on a GPU or TPU, no product is rounded to fewer bits."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _full_float32():
  with jax.default_matmul_precision('highest'):
    yield
