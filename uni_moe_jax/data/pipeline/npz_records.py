"""Prepared records on disk: a folder that is whole or absent, with one .npz file per split."""

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from uni_moe_jax.data.pipeline.records import Records
from uni_moe_jax.utils.errors import MissingFileError, UsageError

_CLASSES = 'classes of '


def fingerprint(
    columns: Mapping[str, np.ndarray], classes: Mapping[str, tuple[str, ...]]
) -> str:
  """Hex sha256 of names, shapes and values: the same for equal content, however it is stored."""
  digest = hashlib.sha256()

  def put(part: bytes) -> None:
    digest.update(len(part).to_bytes(8, 'little'))
    digest.update(part)

  for name in sorted(columns):
    column = np.ascontiguousarray(columns[name])
    is_text = column.dtype.kind == 'U'
    put(f'{name} {"text" if is_text else column.dtype.name} {column.shape}'.encode())
    # A unicode array is padded to its longest item, which is no part of what it says.
    put('\0'.join(column.ravel().tolist()).encode() if is_text else column.data)
  for name in sorted(classes):
    put('\0'.join((name, *classes[name])).encode())
  return digest.hexdigest()


@contextlib.contextmanager
def building(directory: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Yields an empty folder that becomes `directory` when the block ends, or vanishes if it raises.

  A half-built folder is therefore never read, and of two processes that build at once the first to
  finish wins: the other's folder has the same content and is dropped.
  """
  directory = pathlib.Path(directory)
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
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def save(
    directory: str | os.PathLike[str],
    split: str,
    columns: Mapping[str, np.ndarray],
    classes: Mapping[str, tuple[str, ...]],
) -> None:
  """Writes a split: columns of one leading axis N, and the ordered classes of its label columns.

  Raises:
    UsageError: if the columns differ in length.
  """
  sizes = {name: len(column) for name, column in columns.items()}
  if len(set(sizes.values())) > 1:
    raise UsageError(f'split {split!r}: columns must have one length, got {sizes}.')
  stored = {_CLASSES + name: np.array(labels) for name, labels in classes.items()}
  np.savez_compressed(pathlib.Path(directory) / f'{split}.npz', **columns, **stored)


def check_directory(root: str | os.PathLike[str]) -> None:
  """Raises MissingFileError unless the data directory is there."""
  if not pathlib.Path(os.path.expanduser(root)).is_dir():
    raise MissingFileError(f'Data directory {root} is not there. Run: python launch/prepare_data.py --data_dir={root}')


def load(directory: str | os.PathLike[str], split: str, root: str | os.PathLike[str]) -> Records:
  """Reads a split that `save` wrote.

  Args:
    directory: the prepared folder, inside `root`.
    split: one of the splits that were saved there.
    root: the data directory that the user named: the error speaks of it.

  Raises:
    MissingFileError: if nothing was prepared there; names the command that does.
    UsageError: if the folder is there and has no such split (lists those that it has), or the file cannot be read.
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise MissingFileError(
        f'No prepared data {directory.name!r} in {root}. '
        f'Run: python launch/prepare_data.py --data_dir={root}')
  path = directory / f'{split}.npz'
  if not path.exists():
    known = sorted(file.stem for file in directory.glob('*.npz'))
    raise UsageError(f'split {split!r} is not in {directory}; choose from {", ".join(known)}.')
  try:
    with np.load(path) as stored:
      arrays = {name: stored[name] for name in stored.files}
  except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as e:
    raise UsageError(f'{path} cannot be read ({e}). If its disk can be reached, the file is damaged: delete {directory} and run: '
                     f'python launch/prepare_data.py --data_dir={root}') from e
  classes = {
      name.removeprefix(_CLASSES): tuple(array.tolist())
      for name, array in arrays.items() if name.startswith(_CLASSES)
  }
  columns = {name: array for name, array in arrays.items() if not name.startswith(_CLASSES)}
  return Records(columns, classes, fingerprint(columns, classes))
