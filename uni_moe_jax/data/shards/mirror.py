"""Prepared data in a bucket, read through a folder of this host.

A dataset in a bucket has `files.json`, {file: [bytes, hex sha256]}. It is written last: what has none is incomplete. A
`Mirror` is given in place of a data directory: its folder has the same layout, and a file appears there when it is
needed, after its bytes were compared with their digest. The processes of a host share the folder. Past its bound, the
files that were used longest ago are removed.
"""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import random
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from uni_moe_jax.config.schema import DataConfig
from uni_moe_jax.data.shards import cache_files
from uni_moe_jax.data.shards.cache_files import MANIFEST
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import check_local, read_json, write_json
from uni_moe_jax.utils.errors import MissingFileError, RunError, UsageError, disk_is_full, first_few, free_space

_NUM_FETCHES = 8  # at once, and again as many in the background
_ATTEMPTS, _PAUSE = 4, 1.0  # of a request beyond those of the library, and seconds before the second one
_WAIT = 0.05  # seconds between looks for free space


class Mirror(os.PathLike):
  """A data directory in a bucket, and its folder on this host; as a path it is that folder."""

  def __init__(self, address: str, cache_dir: str | os.PathLike[str], max_bytes: int = 0):
    """max_bytes: bound of what `cache_dir` has of all buckets; 0: none."""
    self.address = str(storage.path(address, 'data.dir'))
    self._cache, self._max_bytes = pathlib.Path(os.path.expanduser(cache_dir)), max_bytes
    self.root = self._cache / self.address.replace('://', '/', 1)
    self.root.mkdir(parents=True, exist_ok=True)
    self._files: dict[str, tuple[int, str]] = {}  # name → size in bytes, hex sha256
    self._mutex = threading.Lock()
    self._pending: dict[str, concurrent.futures.Future] = {}  # name → its file
    self._queue: collections.deque[str] = collections.deque()  # what may wait
    self._num_lanes = 0  # that work on the queue
    self._now, self._later = (concurrent.futures.ThreadPoolExecutor(_NUM_FETCHES, f'fetch data {when}')
                              for when in ('now', 'later'))
    self._start, self.num_fetched, self.bytes_fetched = time.monotonic(), 0, 0

  def __fspath__(self) -> str:
    return str(self.root)

  def __str__(self) -> str:
    return self.address

  def describe(self) -> str:
    """'3 files, 1.2 MB of gs://b/data in 0.4 s': what was fetched since the start."""
    return (f'{self.num_fetched} files, {self.bytes_fetched / 1e6:,.1f} MB of {self.address} in '
            f'{time.monotonic() - self._start:.1f} s')

  def sync(self, prefix: str) -> None:
    """Fetches the small files of every dataset below a folder, and forgets what the bucket no longer has.

    Raises MissingFileError if there is no complete dataset.
    """
    remote, local = storage.path(self.address) / prefix, self.root / prefix
    names = repeat(lambda: storage.files_in(remote), str(remote))
    matches = [n for n in names if n.rpartition('/')[2] == MANIFEST]
    if not matches:
      raise MissingFileError(
          f'{remote} has no {MANIFEST}: nothing was prepared there. Prepare it: uni-moe prepare-data '
          f'--data_dir={self.address}')
    folders = {(local / name).parent for name in matches}
    with cache_files.locked(self.root / '.sync'):
      for old in list(local.rglob(MANIFEST)):
        if old.parent not in folders:
          cache_files.remove_dataset(old.parent)
      for name in matches:
        files = json.loads(repeat((remote / name).read_bytes, f'{remote}/{name}'))
        path = local / name
        old = read_json(path, {})
        # A file that the old manifest does not list may be of another dataset, whose removal was interrupted.
        for changed in (n for n in {**old, **files} if old.get(n) != files.get(n)):
          (path.parent / changed).unlink(missing_ok=True)
        for parent in {(path.parent / n).parent for n in (MANIFEST, *files)}:
          parent.mkdir(parents=True, exist_ok=True)
        write_json(path, files)
        folder = path.parent.relative_to(self.root)
        self._files |= {str(folder / n): (size, digest) for n, (size, digest) in files.items()}
        self._check_bound(folder, max(size for size, _ in files.values()))
    small = [n for n in self._files if n.startswith(f'{prefix}/') and not any(part in n for part in cache_files.LAZY)]
    self.fetch_all(small)

  def _check_bound(self, folder: pathlib.Path, size: int) -> None:
    if self._max_bytes and size > self._max_bytes:
      raise UsageError(f'config.data.cache_gb={self._max_bytes / 1e9:g} is less than the largest file of {self.address}'
                       f'/{folder}, {size / 1e9:.3g} GB; raise it, or set 0 for no bound.')

  def check_space(self, trained: Collection[str], evaluated: Collection[str] = ()) -> None:
    """Raises UsageError if files that training reads again and again do not fit into the cache together.

    evaluated: files of evaluations in between, to which those of training give way only if the cache has a bound.
    """
    names = {*trained, *(() if self._max_bytes else evaluated)}
    free = shutil.disk_usage(self.root).free  # first: other processes of the host fetch them meanwhile
    sizes = {name: self._files[name][0] for name in names}
    total, missing = sum(sizes.values()), sum(n for name, n in sizes.items() if not (self.root / name).exists())
    if self._max_bytes:  # others are removed for them
      free += self._total() - (total - missing)
    if (is_bounded := 0 < self._max_bytes < total) or missing > free:
      bound = (f'config.data.cache_gb={self._max_bytes / 1e9:g} is less; raise it, or set 0 for no bound' if is_bounded
               else f'the disk of {self._cache} has {free / 1e9:.3g} GB for the missing {missing / 1e9:.3g}; attach a '
               'larger one and set config.data.cache_dir to a folder of it')
      raise UsageError(
          f"{self.address}: every host reads all {total / 1e9:.3g} GB of this run's files in random order, but {bound}."
          ' Or mount the bucket (with gcsfuse, say) and set config.data.dir to the mount, or train on fewer datasets.')

  def has(self, name: str) -> bool:
    """Whether a dataset that was synced has a file."""
    return name in self._files

  def is_current(self, name: str) -> bool:
    """Whether a file in the folder is of the dataset that was synced: another process may have synced another since."""
    path = self.root / name
    for folder in path.parents[:name.count('/')]:
      with contextlib.suppress(FileNotFoundError):
        status = os.stat(folder / MANIFEST)
        files = _manifest(folder / MANIFEST, status.st_ino, status.st_mtime_ns)
        return files.get(str(path.relative_to(folder))) == [*self._files[name]]
    return True

  def fetch(self, name: str) -> pathlib.Path:
    """The local path of a file of a dataset that was synced. Raises RunError if it cannot be fetched."""
    return self._request(name).result()

  def fetch_all(self, names: Iterable[str]) -> None:
    """As `fetch`, several at once."""
    for future in [self._request(name) for name in names]:
      future.result()

  def fetch_unlisted(self, name: str) -> None:
    """Fetches a file that is in no dataset, whose digest is unknown, if the bucket has it."""
    with contextlib.suppress(FileNotFoundError):
      content = repeat((storage.path(self.address) / name).read_bytes, f'{self.address}/{name}')
      path = self.root / name
      path.parent.mkdir(parents=True, exist_ok=True)
      with cache_files.locked(path.with_name(f'.{path.name}')):
        storage.write_bytes(path, content)

  def is_complete(self, folder: pathlib.Path) -> bool:
    """Whether the bucket has the dataset of a folder."""
    mark = storage.path(self.address) / str(folder.relative_to(self.root)) / MANIFEST
    return repeat(mark.exists, str(mark))

  def upload(self, folder: pathlib.Path, source: pathlib.Path, required: Iterable[str]) -> None:
    """Copies a complete dataset to the bucket, as that of a folder of the mirror.

    source: where its files are; it is renamed to `folder` when the bucket has all of them.
    required: files that it must have. Raises RunError if one is gone: without it the dataset would count as complete.
    """
    files, target = storage.filesystem(self.address), storage.path(self.address) / str(folder.relative_to(self.root))
    paths = sorted(p for p in source.rglob('*') if p.is_file() and p.name != MANIFEST and not storage.is_leftover(p))
    names = {str(p.relative_to(source)): size_and_digest(p) for p in paths}
    if missing := sorted({*required} - names.keys()):
      raise RunError(f'{source} has no {first_few(missing)}: another process removed files that this one wrote. '
                     'Nothing was published; run the same command again.')
    for name in names:
      repeat(lambda: files.put_file(str(source / name), str(target / name)), f'{target}/{name}')
    repeat(lambda: write_json(target / MANIFEST, names), f'{target}/{MANIFEST}')
    with cache_files.locked(self.root / '.sync'):
      # The folder is there if another process has synced meanwhile, and now fetches files into it.
      if source != folder and read_json(folder / MANIFEST) != names:
        cache_files.remove_dataset(folder)  # another one of this name
        source.rename(folder)
      # Not before the bucket has it: `sync` removes a folder with a manifest whose dataset the bucket lacks.
      write_json(folder / MANIFEST, names)

  def prefetch(self, names: Iterable[str]) -> None:
    """Fetches files in the background, in order, until the bound is reached."""
    total, missing = self._total(), []
    for name in dict.fromkeys(names):
      if not (self.root / name).exists():
        total += self._files[name][0]
        if self._max_bytes and total > self._max_bytes:
          break
        missing.append(name)
    with self._mutex:
      self._queue.extend(missing)
      num_new = min(_NUM_FETCHES - self._num_lanes, len(self._queue))
      self._num_lanes += num_new
    for _ in range(num_new):
      self._later.submit(self._fetch_next)

  def _fetch_next(self) -> None:
    """Fetches one file of the queue and has the next one fetched, unless the process ends, which waits for this one."""
    with self._mutex:
      name = self._queue.popleft() if self._queue else None
      self._num_lanes -= name is None
      is_done = name is None and not self._num_lanes
    if is_done:
      print(f'data: fetched {self.describe()}', flush=True)
    if name is not None:
      with contextlib.suppress(OSError):  # of the local file: who needs it reports that
        file, is_new = self._begin(name)
        if is_new:
          self._fetch(name, file)
      with contextlib.suppress(RuntimeError):  # the process ends
        self._later.submit(self._fetch_next)

  def _request(self, name: str) -> concurrent.futures.Future:
    """Begins to fetch a file unless it is there."""
    file, is_new = self._begin(name)
    if is_new:
      try:
        self._now.submit(self._fetch, name, file)
      except RuntimeError as e:  # the process ends; others may wait for the file
        self._complete(name, file.set_exception, e)
    return file

  def _begin(self, name: str) -> tuple[concurrent.futures.Future, bool]:
    """The path of a file as a future, and whether the caller has to fetch it."""
    with self._mutex:
      if name in self._pending:
        return self._pending[name], False
      file, path = concurrent.futures.Future(), self.root / name
      with contextlib.suppress(FileNotFoundError):
        os.utime(path)  # the time of the last use
        file.set_result(path)
        return file, False
      self._pending[name] = file
      return file, True

  def _complete(self, name: str, finish: Callable[[Any], None], outcome: Any) -> None:
    with self._mutex:
      del self._pending[name]  # who needs a file whose fetch has failed tries again
    finish(outcome)

  def _fetch(self, name: str, file: concurrent.futures.Future) -> None:
    try:
      path = self._fetch_explained(name)
    except BaseException as e:  # whatever it is, others wait for the file
      self._complete(name, file.set_exception, e)
    else:
      self._complete(name, file.set_result, path)

  def _fetch_explained(self, name: str) -> pathlib.Path:
    try:
      return self._fetch_verified(name)
    except OSError as e:  # any other error than this one would count as a corrupt example
      raise RunError(f'{self.address}/{name} cannot be fetched into {self.root} ({e}; {free_space(self.root)}).') from e

  def _fetch_verified(self, name: str) -> pathlib.Path:
    size, digest = self._files[name]
    path = self.root / name
    temporary = path.with_name(f'.{path.name}{cache_files.PART}')
    path.parent.mkdir(parents=True, exist_ok=True)
    with cache_files.locked(path.with_name(f'.{path.name}')), contextlib.ExitStack() as stack:
      if path.exists():  # another process has fetched it
        return path
      stack.callback(temporary.unlink, missing_ok=True)
      temporary.unlink(missing_ok=True)  # of a process that has died
      self._free_space(temporary, size)
      for attempt in (1, 2):
        repeat(lambda: storage.filesystem(self.address).get_file(f'{self.address}/{name}', str(temporary)),
                f'{self.address}/{name}')
        with self._mutex:
          self.num_fetched, self.bytes_fetched = self.num_fetched + 1, self.bytes_fetched + size
        if _sha256(temporary) == digest:
          with cache_files.locked(self._cache / '.space'):  # who counts meanwhile could find neither name
            temporary.rename(path)
          return path
        print(f'data: {self.address}/{name} differs from what was prepared (fetch {attempt} of 2)',
              flush=True)
      raise RunError(f'{self.address}/{name} is damaged: two fetches differ from what was prepared (sha256 '
                     f'{digest[:12]}…); write the dataset to the bucket again.')

  def _total(self) -> int:
    return sum(size for _, size, _ in cache_files.entries(self._cache))

  def _free_space(self, temporary: pathlib.Path, size: int) -> None:
    """Removes what was used longest ago until a file fits, and reserves its place."""
    while True:
      with cache_files.locked(self._cache / '.space'):
        entries = cache_files.entries(self._cache) if self._max_bytes else []
        excess = sum(bytes_ for _, bytes_, _ in entries) + size - self._max_bytes if self._max_bytes else 0
        for _, bytes_, path in entries:
          if excess > 0 and not cache_files.is_fetched(path):
            path.unlink(missing_ok=True)
            excess -= bytes_
        if excess <= 0:
          temporary.touch()
          os.truncate(temporary, size)
          return
      time.sleep(_WAIT)  # the rest is being fetched, and can be removed after that


def open_folder(c: DataConfig) -> str | Mirror:
  """The folder of prepared data of a config's section `data`; a mirror of it if it is in a bucket."""
  if not storage.is_remote(c.dir):
    return c.dir
  check_local(c.cache_dir, 'config.data.cache_dir')
  storage.check_access(storage.path(c.dir), 'data.dir')  # at once: others are repeated
  return Mirror(c.dir, c.cache_dir, int(c.cache_gb * 1e9))


def local(directory: str | os.PathLike[str], path: pathlib.Path) -> pathlib.Path:
  """A path below a data directory; if that is a mirror and has the file, it is fetched first."""
  if isinstance(directory, Mirror) and directory.has(name := str(path.relative_to(directory.root))):
    return directory.fetch(name)
  return path


def has_dataset(directory: str | os.PathLike[str], folder: pathlib.Path) -> bool:
  """Whether a data directory has the complete dataset of a folder below it."""
  return directory.is_complete(folder) if isinstance(directory, Mirror) else folder.is_dir()


@contextlib.contextmanager
def preparing(directory: str | os.PathLike[str], folder: pathlib.Path) -> Iterator[bool]:
  """Yields whether a data directory has the dataset of a folder; if not, the block prepares and publishes it.

  If that is a mirror, other processes of the host wait, and what an interrupted upload has left is removed before.
  """
  if not isinstance(directory, Mirror):
    yield folder.is_dir()
    return
  folder.parent.mkdir(parents=True, exist_ok=True)
  with cache_files.locked(folder.with_name(f'.{folder.name}')):
    if not (is_complete := directory.is_complete(folder)):
      with cache_files.locked(directory.root / '.sync'):
        cache_files.remove_dataset(folder)
    yield is_complete


def publish(directory: str | os.PathLike[str], folder: pathlib.Path, source: pathlib.Path,
            required: Iterable[str]) -> None:
  """Renames `source`, a complete dataset, to `folder`; if the data directory is a mirror, by `Mirror.upload`."""
  if isinstance(directory, Mirror):
    directory.upload(folder, source, required)
  elif source != folder:
    source.rename(folder)


@functools.lru_cache(8)  # parsing one of 47,000 files takes 75 ms, and a file may be opened for every record
def _manifest(path: pathlib.Path, inode: int, modified: int) -> dict[str, list[Any]]:
  """The content of a manifest on this host; another one has another inode and time, in nanoseconds."""
  del inode, modified
  return read_json(path, {})


def sync(directory: str | os.PathLike[str], prefix: str) -> None:
  """`Mirror.sync` of a data directory that is a mirror."""
  if isinstance(directory, Mirror):
    directory.sync(prefix)


def repeat(function, address: str) -> Any:
  """The result of a request, tried again after an error that may pass. Raises FileNotFoundError, RunError."""
  for attempt in range(_ATTEMPTS):
    try:
      return function()
    except FileNotFoundError:
      raise
    except Exception as e:  # of several libraries
      if disk_is_full(e):
        raise
      if attempt == _ATTEMPTS - 1:
        raise RunError(storage.explain(e, address) or f'{address} cannot be read or written ({e}).') from e
      time.sleep(_PAUSE * 2**attempt * (0.5 + random.random()))


def size_and_digest(path: str | os.PathLike[str]) -> list[Any]:
  """What the manifest has of a file: bytes, sha256."""
  return [os.path.getsize(path), _sha256(path)]


def _sha256(path: str | os.PathLike[str]) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
