"""Records of array-record files by index, in the order of TFDS, with a bounded number of open files."""

import contextlib
import errno
import itertools
import os
import pathlib
import resource
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from uni_moe_jax.data.shards.mirror import Mirror
from uni_moe_jax.utils.errors import RunError

# Open readers of a process that no thread uses. To open a file parses its index, and keeps it: 30 ms and 0.5 MB for
# 100,000 records.
_MAX_IDLE = min(1024, max(128, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
# Beside the files, what identifies the records of all of them: digests of own data, the version of TFDS.
_DESCRIPTIONS = 'prepared.json', 'dataset_info.json'


class Shards:
  """Records of the files of one split.

  TFDS has such a reader. Its threads cost several times as much as the reading of small records: 51 instead of 7 µs
  for 3 kB.
  """

  _lock = threading.Lock()
  # (split, file, inode) → open readers, those used last at the end. Of all splits: so is the limit of open files.
  _idle: ClassVar[dict[tuple['Shards', int, int], list[Any]]] = {}
  _num_idle: ClassVar[int] = 0  # readers in `_idle`; counting them would take as long as reading a small record

  def __init__(self, directory: str | os.PathLike[str] | Mirror, instructions: Sequence[Any]):
    """directory: with the files. instructions: of TFDS, with `filename`, `skip` and `take`."""
    self._mirror = directory if isinstance(directory, Mirror) else None
    self._paths = [pathlib.Path(i.filename) for i in instructions]
    self.names = [str(path.relative_to(self._mirror.root)) for path in self._paths] if self._mirror else []  # in it
    self._skips = np.array([i.skip for i in instructions], np.int64)
    self._bounds = np.cumsum([0, *(i.take for i in instructions)])
    self._inodes: dict[int, int] = {}  # of the files of a mirror that were opened
    self._statuses: dict[int, tuple[int, int]] = {}  # size and time of others, when they were opened last
    self._descriptions = self._read_descriptions()

  def __len__(self) -> int:
    return int(self._bounds[-1])

  def __getitems__(self, ids: Sequence[int]) -> list[bytes]:
    """Records in the order of the ids. Raises RunError if too many files are open, or one was replaced."""
    ids = np.asarray(ids)
    shards = self._shards_of(ids)
    positions, order = (ids - self._bounds[shards] + self._skips[shards]).tolist(), np.argsort(shards, kind='stable')
    shards, records = shards.tolist(), [b''] * len(ids)
    if self._mirror:
      self._mirror.fetch_all(self.names[shard] for shard in set(shards))
    # One reader at a time: a batch of random records needs most of the files.
    for shard, group in itertools.groupby(order.tolist(), shards.__getitem__):
      try:
        reader, inode = self._take(shard)
        for i in group:
          reader.seek(positions[i])
          records[i] = reader.read()
      except (OSError, RuntimeError) as e:  # the latter from array_record, which opens a file when it reads
        if os.strerror(errno.EMFILE) not in str(e):  # the message of ENFILE begins with it
          raise
        # Any other error than this one would count as a corrupt example.
        raise RunError(f'{self._paths[shard]} cannot be opened ({e}). The limit of this process is '
                       f'{resource.getrlimit(resource.RLIMIT_NOFILE)[0]} open files; raise it (ulimit -n 4096), and '
                       'run the same command to continue.') from e
      self._give_back(shard, inode, reader)  # after an error it is not used again
    return records

  def prefetch(self, ids: np.ndarray) -> None:
    """Fetches all files in the background, in the order in which these records need them first."""
    shards = self._shards_of(ids).tolist()
    self._mirror.prefetch(self.names[i] for i in dict.fromkeys([*shards, *range(len(self.names))]))

  def _shards_of(self, ids: np.ndarray) -> np.ndarray:
    return np.searchsorted(self._bounds[1:], ids, 'right')

  def _take(self, shard: int) -> tuple[Any, int]:
    """(a reader that no other thread uses, the inode of its file in a mirror)."""
    while self._mirror:
      path = self._mirror.fetch(self.names[shard])
      # Opened once: whoever removes the file from here on, its bytes stay readable through the descriptor.
      with contextlib.suppress(FileNotFoundError), open(path, 'rb') as file:
        inode = os.fstat(file.fileno()).st_ino
        if reader := self._take_idle(shard, inode):
          return reader, inode
        self._check(shard, self._mirror.is_current(self.names[shard]))
        return _open_reader(f'/dev/fd/{file.fileno()}'), inode
    if reader := self._take_idle(shard, 0):
      return reader, 0
    status = os.stat(self._paths[shard])
    status = status.st_size, status.st_mtime_ns
    if (known := self._statuses.get(shard, status)) != status:  # by `touch`, for example, or a copy in its place
      self._check(shard, known[0] == status[0] and bool(self._descriptions) and
                  self._descriptions == self._read_descriptions())
    self._statuses[shard] = status
    return _open_reader(str(self._paths[shard])), 0

  def _check(self, shard: int, is_same: bool) -> None:
    """Raises RunError for another file: its records would be taken for those that labels were read of."""
    if not is_same:
      raise RunError(f'{self._paths[shard]} is another file than this process has read: the data was prepared again or '
                     'copied in the meantime. Put the former files back, and run the same command to continue.')

  def _read_descriptions(self) -> list[bytes]:
    paths = [path.with_name(name) for path in self._paths[:1] for name in _DESCRIPTIONS]
    return [path.read_bytes() for path in paths if not self._mirror and path.exists()]

  def _take_idle(self, shard: int, inode: int) -> Any | None:
    with self._lock:
      if self._inodes.get(shard, 0) != inode:
        self._inodes[shard] = inode
        self._close_removed()
      readers = self._idle.pop((self, shard, inode), [])
      reader = readers.pop() if readers else None
      Shards._num_idle -= reader is not None
      if readers:
        self._idle[self, shard, inode] = readers
      return reader

  def _close_removed(self) -> None:
    """Closes readers of files that were removed or replaced: an open file keeps its place on the disk."""
    for split, shard, inode in list(self._idle):
      if split is self and (self._inodes.get(shard, 0) != inode or not self._paths[shard].exists()):
        Shards._num_idle -= len(self._idle.pop((split, shard, inode)))

  def _give_back(self, shard: int, inode: int, reader: Any) -> None:
    """Keeps a reader open, and closes those that were used longest ago if there are too many."""
    with self._lock:
      if self._inodes.get(shard, 0) != inode:  # replaced in the meantime
        return
      self._idle[self, shard, inode] = [*self._idle.pop((self, shard, inode), []), reader]
      Shards._num_idle += 1
      while self._num_idle > _MAX_IDLE:
        oldest = next(iter(self._idle))
        self._idle[oldest].pop(0).close()
        Shards._num_idle -= 1
        if not self._idle[oldest]:
          del self._idle[oldest]


def _open_reader(path: str) -> Any:
  from array_record.python.array_record_module import ArrayRecordReader
  return ArrayRecordReader(path, options='readahead_buffer_size:0,max_parallelism:0', file_reader_buffer_size=2**14)
