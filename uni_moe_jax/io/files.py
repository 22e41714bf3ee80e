"""Files and JSON, written atomically, and checks of paths that are given on the command line."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from uni_moe_jax.io import storage
from uni_moe_jax.io.storage import Path
from uni_moe_jax.utils.errors import UsageError


def write_json(path: Path, content: Any, allow_nan: bool = True) -> None:
  """Write content as JSON, atomically. With allow_nan=False, numbers that are not finite raise ValueError."""
  storage.write_bytes(path, json.dumps(content, indent=1, allow_nan=allow_nan).encode())


def write_output(path: str, content: Any) -> None:
  """Write content as JSON to the file that a flag names, in place: it may be a link, or a device as /dev/stdout is."""
  storage.path(path).write_text(json.dumps(content, indent=1) + '\n')


def save_figure(figure: Any, path: Path, **options: Any) -> None:
  """Write a Matplotlib figure in the format of the path's suffix. No text in it is mathematics.

  Matplotlib reads what is between two dollar signs as a formula; regular expressions and names may have some.
  """
  for text in figure.findobj(lambda artist: hasattr(artist, 'set_parse_math')):
    text.set_parse_math(False)
  content = io.BytesIO()
  figure.savefig(content, format=path.suffix.removeprefix('.'), **options)
  storage.write_bytes(path, content.getvalue())


def read_json(path: Path, default: Any = None) -> Any:
  """Return the content of a JSON file; `default` if it does not exist."""
  return json.loads(storage.read_bytes(path)) if path.exists() else default


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


def renames_folders(parent: pathlib.Path) -> bool:
  """Return whether a folder in `parent` can be renamed at once. Mounted buckets refuse that, or copy its files."""
  source = pathlib.Path(tempfile.mkdtemp(prefix='.probe-', dir=parent))
  target = source.with_name(f'{source.name}-renamed')
  try:
    (source / 'folder').mkdir()
    (source / 'folder/file').touch()
    number = source.stat().st_ino
    try:
      source.rename(target)
    except OSError:
      return False
    return target.stat().st_ino == number
  finally:
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)


def check_renames_folders(folder: pathlib.Path, name: str) -> None:
  """Raise UsageError if no folder can be renamed where `folder` is, the value of flag `name`, or will be created."""
  existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
  if not renames_folders(existing):
    raise UsageError(f'{name}={folder}: folders cannot be renamed there, as on a bucket mounted with gcsfuse; give a '
                     'folder of a local disk, and copy it when it is complete.')


def _exists(path: storage.Path) -> bool:
  """Whether something is there. Raises OSError where nobody knows, as on a mount that is broken for now."""
  try:
    os.lstat(path)
  except (FileNotFoundError, NotADirectoryError):
    return False
  return True


def check_writable(path: str, name: str) -> None:
  """Raise UsageError if `path`, a folder of flag `name` that may be missing, cannot be written. Nothing is written."""
  if storage.is_remote(path):
    return
  folder = storage.path(path).absolute()
  existing = next(parent for parent in (folder, *folder.parents) if _exists(parent))
  if not existing.is_dir():
    raise UsageError(f'{name}={path}: {existing} is not a folder; give another.')
  if not os.access(existing, os.W_OK | os.X_OK):  # which no user has on a read-only file system
    raise UsageError(f'{name}={path}: {existing} cannot be written (no permission, or a read-only file system); give a '
                     'folder where you may write.')


def check_local(path: str, name: str) -> None:
  """Raise UsageError if `path`, the value of flag or field `name`, is a URL: 'gs://b/x' would create a folder 'gs:'."""
  if '://' in path:
    raise UsageError(f'{name}={path!r} is a URL, but must be a path of a disk; copy its files, and give their path.')


def check_folder_of(path: str, name: str) -> None:
  """Raise UsageError if the folder of a file to write does not exist, before the work whose result it would get."""
  if not storage.is_remote(path) and not storage.path(path).absolute().parent.is_dir():
    raise UsageError(f'{name}={path}: its folder does not exist; create it first.')


def files_below(folder: str, prefix: str, real_paths: tuple[str, ...]) -> Iterator[str]:
  """Yield the names of files below a folder, in the order of sorted paths; hidden ones are ignored.

  real_paths: of the folder, the last one, and of those that it was reached through; a link to one of them would be
  followed without end. A link to nothing is a file, which is missing.
  """
  with os.scandir(folder) as entries:
    scanned = sorted((e for e in entries if not e.name.startswith('.')), key=lambda entry: entry.name)
  for entry in scanned:
    is_link = entry.is_symlink()
    if os.path.isdir(entry.path) if is_link else entry.is_dir():
      real_path = os.path.realpath(entry.path) if is_link else os.path.join(real_paths[-1], entry.name)
      if real_path not in real_paths:
        yield from files_below(entry.path, f'{prefix}{entry.name}/', (*real_paths, real_path))
    elif os.path.isfile(entry.path) or not os.path.exists(entry.path) if is_link else entry.is_file():
      yield prefix + entry.name
