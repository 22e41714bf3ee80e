"""Handlers of signals, installed for a while."""

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def handled(handler: Callable, *numbers: signal.Signals) -> Iterator[None]:
  """Handle these signals by `handler(number, frame)` while the body runs."""
  old = {number: signal.signal(number, handler) for number in numbers}
  try:
    yield
  finally:
    for number, previous in old.items():
      signal.signal(number, previous)
