"""Errors that a command reports as one sentence. Any other exception is a defect and keeps its traceback."""

import errno
import os
import pathlib
import shutil

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Words for it of libraries that pass no error number on (TensorStore, TensorFlow).
_FULL_WORDS = tuple(os.strerror(number) for number in _FULL)


class UsageError(ValueError):
  """A mistake of the user in a flag, a config or data. The message names the field, the value and the fix; exit code 2."""


class MissingFileError(UsageError, FileNotFoundError):
  """A file or folder of the user that does not exist; exit code 2."""


class RunError(Exception):
  """A failure that no change of the command would avoid, such as a full disk or a damaged checkpoint; exit code 1.

  The message states what happened, which results are safe, and what to do.
  """


def disk_is_full(e: BaseException | None) -> bool:
  """Whether an exception, or one that it came from, says that there is no space left or a quota is used up."""
  while e is not None:
    if isinstance(e, OSError) and e.errno in _FULL or any(words in str(e) for words in _FULL_WORDS):
      return True
    e = e.__cause__ or e.__context__
  return False


def free_space(folder: str | os.PathLike[str]) -> str:
  """'3.2 MB free on the disk of FOLDER': of the folder, or of the nearest one above it that is there."""
  there = pathlib.Path(folder).absolute()
  while not there.exists():
    there = there.parent
  return f'{shutil.disk_usage(there).free / 1e6:,.1f} MB free on the disk of {folder}'
