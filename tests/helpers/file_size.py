"""A limit of the size of files, which writing exceeds as it exceeds a disk, without the rights that a disk needs."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
  """In this context, what this process writes past so many bytes of a file is an error (EFBIG), as on a full disk."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
