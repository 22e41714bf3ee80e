"""The files of a folder of a host with data of buckets: which can be fetched again, and locks between processes."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from uni_moe_jax.utils.errors import UsageError

MANIFEST = 'files.json'  # of a dataset: {file: [bytes, hex sha256]}
# In names of files that are fetched one by one; others come with their manifest.
LAZY = ('.array_record', '.npz', '.npy', '.texts')
PART, _LOCK = '.part', '.lock'  # ends of names beside a file that is being fetched


def entries(cache: pathlib.Path) -> list[tuple[float, int, pathlib.Path]]:
  """(time of the last use, size, path) of every file in the cache that can be fetched again, or is being fetched.

  Only files of a dataset with a manifest can: others are made on this host, such as those of a preparation.
  """
  matches, datasets = [], set()
  for folder, folders, names in os.walk(cache):
    if folder == str(cache):  # copies of inputs, in which a file may have the name of a manifest, are hidden
      folders[:] = (name for name in folders if not name.startswith('.'))
    if MANIFEST in names or os.path.dirname(folder) in datasets:  # of which this is a subfolder
      datasets.add(folder)
    for name in names if folder in datasets else ():
      if any(part in name for part in LAZY) and not name.endswith(_LOCK):
        with contextlib.suppress(FileNotFoundError):
          status = os.stat(path := os.path.join(folder, name))
          matches.append((status.st_mtime, status.st_size, pathlib.Path(path)))
  return sorted(matches)


def remove_dataset(folder: pathlib.Path) -> None:
  """Removes a folder if it exists; its manifest last, by which `Mirror.sync` finds what an interrupted removal left."""
  for path in folder.iterdir() if folder.is_dir() else ():
    if path.is_dir():
      shutil.rmtree(path)
    elif path.name != MANIFEST:
      path.unlink(missing_ok=True)
  shutil.rmtree(folder, ignore_errors=True)


def is_fetched(path: pathlib.Path) -> bool:
  """Whether this is a part of a file that a process is fetching."""
  if not path.name.endswith(PART):
    return False
  with contextlib.suppress(FileNotFoundError):  # the folder of a dataset that was removed meanwhile
    with open(path.with_name(path.name.removesuffix(PART) + _LOCK), 'w') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        return True
  return False


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Excludes other threads and processes of this host. Raises UsageError where files cannot be locked."""
  with open(path.with_name(path.name + _LOCK), 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as e:
      raise UsageError(
          f'files cannot be locked in {path.parent} ({e.strerror}), but processes of a host need locks to share data '
          'of a bucket; set config.data.cache_dir (prepare-data: --cache_dir) to a folder of a local disk.') from e
    yield
