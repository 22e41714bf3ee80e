"""Input of a preparation that is in a bucket: a copy on this host, for as long as it is read."""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from uni_moe_jax.data.formats import input_shards
from uni_moe_jax.data.shards.mirror import repeat
from uni_moe_jax.io import locks, storage

_NUM_FETCHES = 32


@contextlib.contextmanager
def opened(address: str, cache_dir: str) -> Iterator[storage.Path]:
  """Yields the input; from a bucket it is copied for that time, unless its rows are in tar or Parquet files."""
  source = storage.path(address, '--input')
  if storage.is_remote(source):
    storage.check_access(input_shards.folder_of(source), '--input')
    if input_shards.archives_of(source):
      yield source
      return
  with local_input(address, '--input', cache_dir) as copy:
    yield copy


@contextlib.contextmanager
def local_input(address: str | os.PathLike[str], name: str, cache_dir: str) -> Iterator[pathlib.Path]:
  """Yields a file or folder; if it is in a bucket, a copy that is removed afterwards.

  Of .jsonl and tables the whole folder is copied, since their lines name files beside them. name: of the flag, for
  errors.
  """
  source = storage.path(address, name)
  if isinstance(source, pathlib.Path):
    yield source
    return
  storage.check_access(source, name)
  files, is_file = storage.filesystem(address), bool(source.suffix) and source.is_file()
  folder = source.parent if source.suffix.lower() in ('.jsonl', '.csv', '.tsv') and is_file else source
  objects = {'': (None, None)} if folder == source and is_file else storage.files_in(folder)
  os.makedirs(cache := os.path.expanduser(cache_dir), exist_ok=True)
  with _own_folder(pathlib.Path(cache), str(folder)) as copy:
    target = copy / folder.name
    for path in target.rglob('*'):  # of a command that was killed
      if path.is_file() and str(path.relative_to(target)) not in objects:
        path.unlink()

    def fetch(name: str) -> None:
      path, remote, (size, digest) = target / name, f'{folder}/{name}'.rstrip('/'), objects[name]
      # The time of change, by which a part that was read is known again, is that of the content, not of the copy. It is
      # in the 31 bits of every file system.
      content = digest or repeat(lambda: (folder / name).stat().mtime, remote)
      seconds = int(hashlib.sha256(f'{content}'.encode()).hexdigest()[:8], 16) >> 1
      if path.is_file() and (path.stat().st_mtime, path.stat().st_size) == (seconds, size):
        return
      path.parent.mkdir(parents=True, exist_ok=True)
      repeat(lambda: files.get_file(remote, str(path)), remote)
      os.utime(path, (seconds, seconds))

    with concurrent.futures.ThreadPoolExecutor(_NUM_FETCHES) as pool:
      list(pool.map(fetch, objects))
    yield target / source.name if folder != source else target


@contextlib.contextmanager
def _own_folder(cache: pathlib.Path, address: str) -> Iterator[pathlib.Path]:
  """Yields a folder that is removed afterwards: that of the address, or a temporary one if another process has it."""
  with contextlib.ExitStack() as stack:
    folder = cache / f'.input-{hashlib.sha256(address.encode()).hexdigest()[:20]}'
    folder.mkdir(exist_ok=True)
    if locks.lock(folder, stack) or not (folder / locks.FILE).exists():  # the other one has just removed it
      folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='.input-', dir=cache)))
    else:
      stack.callback(shutil.rmtree, folder, ignore_errors=True)
    yield folder
