"""Hypothesis with examples that depend on the seed alone."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from hypothesis.internal.conjecture import providers


@contextlib.contextmanager
def same_examples() -> Iterator[None]:
  """Equal seeds give equal examples: hypothesis would mix in constants of the modules that happen to be imported."""
  with mock.patch.object(providers, '_get_local_constants', providers.Constants):
    yield
