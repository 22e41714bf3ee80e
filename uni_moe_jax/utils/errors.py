"""Errors that a command reports as one sentence. Any other exception is a defect and keeps its traceback."""

import errno
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Messages of libraries that pass no error number on (TensorStore, TensorFlow).
_DISK_FULL_MESSAGES = tuple(os.strerror(number) for number in _DISK_FULL)


class UsageError(ValueError):
  """A mistake of the user in a flag, config or data; exit code 2. The message names field, value and fix."""


class MissingFileError(UsageError, FileNotFoundError):
  """A file or folder of the user that does not exist; exit code 2."""


class RunError(Exception):
  """A failure that no change of the command would avoid, such as a full disk or a damaged checkpoint; exit code 1.

  The message states what happened, which results are safe, and what to do.
  """


def first_few(items: Sequence[str], number: int = 3, separator: str = ', ') -> str:
  """Return 'a, b, c and 2 more': the first `number` items of a message, and how many others there are."""
  more = len(items) - number
  return separator.join(items[:number]) + (f' and {more} more' if more > 0 else '')


def chain(e: BaseException | None) -> Iterator[BaseException]:
  """Yield an exception and those that led to it."""
  while e is not None:
    yield e
    e = e.__cause__ or e.__context__


def disk_is_full(e: BaseException | None) -> bool:
  """Return whether an exception, or one that caused it, reports a full disk or an exhausted quota."""
  return any(isinstance(c, OSError) and c.errno in _DISK_FULL or any(m in str(c) for m in _DISK_FULL_MESSAGES)
             for c in chain(e))


def free_space(folder: str | os.PathLike[str]) -> str:
  """Return '3.2 MB free on the disk of FOLDER', for the folder or its nearest existing parent."""
  path = pathlib.Path(folder).absolute()
  while not path.exists():
    path = path.parent
  return f'{shutil.disk_usage(path).free / 1e6:,.1f} MB free on the disk of {folder}'
