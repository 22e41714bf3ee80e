"""Prepared records on disk: an atomically written folder with one .npz file per split."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from uni_moe_jax.data.examples.records import Records
from uni_moe_jax.data.shards import mirror
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import check_renames_folders
from uni_moe_jax.utils.errors import MissingFileError, UsageError

_CLASSES = 'classes of '  # prefix of the arrays that hold class names
_COMMAND = 'uni-moe prepare-data --data_dir='
Split = tuple[str, Mapping[str, np.ndarray], Mapping[str, tuple[str, ...]]]  # its name, columns and classes


@contextlib.contextmanager
def atomic_folder(directory: str | os.PathLike[str], is_reproducible: bool = True) -> Iterator[pathlib.Path]:
  """Yields an empty folder that is renamed to `directory` when the block ends, or deleted if it raises.

  An incomplete folder is therefore never read. Of two processes that build at the same time, the first to finish wins:
  the other's folder has the same content and is dropped; if it is not reproducible, UsageError is raised.
  """
  directory = storage.path(directory)
  if storage.is_remote(directory):
    with storage.uploaded(directory) as temporary:
      yield temporary
    return
  directory.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(tempfile.mkdtemp(prefix=f'.{directory.name}.', dir=directory.parent))
  try:
    yield temporary
    temporary.chmod(0o755)
    try:
      temporary.rename(directory)
    except OSError:
      if not directory.is_dir():
        raise
      if not is_reproducible:
        raise UsageError(f'{directory} was made by another process in the meantime; choose another folder.') from None
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def save(
    directory: str | os.PathLike[str], split: str, columns: Mapping[str, np.ndarray],
    classes: Mapping[str, tuple[str, ...]]) -> None:
  """Writes a split: columns with the same leading axis N, and the class names of its label columns.

  Raises UsageError if the columns differ in length.
  """
  sizes = {name: len(column) for name, column in columns.items()}
  if len(set(sizes.values())) > 1:
    raise UsageError(f'split {split!r}: columns must have the same length, got {sizes}.')
  path = pathlib.Path(directory) / f'{split}.npz'
  path.parent.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(path, **columns, **{_CLASSES + name: np.array(labels) for name, labels in classes.items()})


def build(root: str | os.PathLike[str], name: str, splits: Iterable[Split]) -> None:
  """Saves splits in the folder `name` of a data directory; if that folder exists, they are not even generated."""
  folder = pathlib.Path(root) / name
  with mirror.preparing(root, folder) as is_complete:
    if not is_complete:
      check_renames_folders(pathlib.Path(root), '--data_dir')
      with atomic_folder(folder) as temporary:
        names = []
        for split, columns, classes in splits:
          save(temporary, split, columns, classes)
          names.append(f'{split}.npz')
      mirror.publish(root, folder, folder, names)


def check_directory(root: str | os.PathLike[str]) -> None:
  """Raises MissingFileError unless the data directory exists, or is in a bucket."""
  if not storage.is_remote(root) and not storage.path(root).is_dir():
    raise MissingFileError(f'Data directory {root} does not exist. Run: {_COMMAND}{root}')


def load(root: str | os.PathLike[str], name: str, split: str) -> Records:
  """Reads a split of the folder `name` of a data directory.

  Raises:
    MissingFileError: The folder does not exist; the message names the command that prepares it.
    UsageError: The folder has no such split (the message lists its splits), or the file cannot be read.
  """
  mirror.sync(root, name.partition('/')[0])
  directory = storage.path(root) / name
  if not directory.is_dir():
    raise MissingFileError(f'No prepared data {directory.name!r} in {root}. Run: {_COMMAND}{root}')
  path = mirror.local(root, directory / f'{split}.npz')
  if not path.exists():
    splits = sorted(file.stem for file in directory.glob('*.npz'))
    raise UsageError(f'split {split!r} is not in {directory}; choose from {", ".join(splits)}.')
  try:
    with np.load(path) as file:
      columns = dict(file)
  except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as e:
    raise UsageError(f'{path} cannot be read ({e}). If its disk is accessible, the file is damaged: delete {directory} '
                     f'and run: {_COMMAND}{root}') from e
  labels = [key for key in columns if key.startswith(_CLASSES)]
  classes = {key.removeprefix(_CLASSES): tuple(columns.pop(key).tolist()) for key in labels}
  return Records(columns, classes)
