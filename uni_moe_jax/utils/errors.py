"""What ends a run and is nobody's mistake in its command: a full disk, damaged files, a step that hangs. One sentence, exit code 1."""

import errno
import os
import pathlib
import shutil

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Words for it of libraries that pass no error number on (TensorStore, TensorFlow).
_FULL_WORDS = tuple(os.strerror(number) for number in _FULL)


class Failure(Exception):
  """Says what happened, what is safe, and what to do."""


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
