"""Output that nobody reads any more: of a terminal that is closed, or of a pipe whose reader Ctrl-C has ended, too."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any


def outlive_readers() -> None:
  """Drop, from now on, what this process prints when nobody reads it any more; an error would end it unsaved."""
  sys.stdout, sys.stderr = (stream and _Stream(stream) for stream in (sys.stdout, sys.stderr))


def write_error(text: str) -> None:
  """Write to standard error in a handler of a signal, which may have interrupted a print to this stream."""
  with contextlib.suppress(OSError):
    os.write(2, text.encode())


class _Stream:
  """A text stream that may lose its reader."""

  def __init__(self, stream: Any):
    self._stream = stream

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    with _outliving():
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with _outliving():
      self._stream.flush()


@contextlib.contextmanager
def _outliving() -> Iterator[None]:
  try:
    yield
  except OSError as e:
    if e.errno not in (errno.EPIPE, errno.EIO):  # of a pipe, of a terminal
      raise
