"""Environments of other packages, which a machine without a network cannot make."""

import os
from collections.abc import Callable
from typing import Any

import pytest

from uni_moe_jax.utils.errors import RunError


def made_or_skipped(make: Callable[[], Any]) -> Any:
  """Return what `make` returns; skip the test if it cannot, but in CI, where it is an error."""
  try:
    return make()
  except RunError as e:
    if os.environ.get('CI'):
      raise
    pytest.skip(str(e))
