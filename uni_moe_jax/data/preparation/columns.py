"""Arrays with an element per row, in files: memory does not grow with the number of rows."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

_PIECE = 2**18  # rows in memory at once
_MAX_PARTS = 500  # open files
_ENTRY = np.dtype([('id', 'i8'), ('key', 'u8'), ('value', 'i8')])


class Column:
  """A one-dimensional array in a file, of which pieces are in memory."""

  def __init__(self, path: pathlib.Path, dtype: np.dtype | str, size: int = 0):
    """Creates an array of zeros."""
    self._path, self._dtype, self.size = path, np.dtype(dtype), size
    with open(path, 'wb') as file:
      file.truncate(size * self._dtype.itemsize)

  def append(self, values: np.ndarray) -> None:
    with open(self._path, 'ab') as file:
      file.write(values.astype(self._dtype, copy=False).tobytes())
    self.size += len(values)

  def read(self, start: int, stop: int) -> np.ndarray:
    return np.fromfile(self._path, self._dtype, int(stop - start), offset=int(start) * self._dtype.itemsize)

  def read_field(self, name: str, start: int, stop: int) -> np.ndarray:
    """One field of records, of which no other is in memory."""
    return np.array(np.memmap(self._path, self._dtype, 'r')[start:stop][name])

  def write(self, start: int, values: np.ndarray) -> None:
    with open(self._path, 'r+b') as file:
      file.seek(start * self._dtype.itemsize)
      file.write(values.astype(self._dtype, copy=False).tobytes())

  def take(self, ids: np.ndarray) -> np.ndarray:
    """The elements at any places."""
    return np.memmap(self._path, self._dtype, 'r')[ids] if len(ids) else np.empty(0, self._dtype)

  def put(self, ids: np.ndarray, values: np.ndarray) -> None:
    """Writes elements at any places."""
    if len(ids):
      np.memmap(self._path, self._dtype, 'r+')[ids] = values

  def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (index of its first element, piece)."""
    for start in range(0, self.size, _PIECE):
      yield start, self.read(start, min(start + _PIECE, self.size))


def smallest_by_key(
    entries: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], num_rows: int, out: Column) -> None:
  """Writes to out[id], for each entry, the smallest value of the entries with its key.

  Entries are divided by their keys into files, of each of which only the distinct keys are in memory.

  Args:
    entries: pieces of ids, keys (uint64) and values (int64).
    num_rows: about how many there are.
    out: others of its elements stay.
  """
  num_parts = min(_MAX_PARTS, 1 + num_rows // _PIECE)
  with contextlib.ExitStack() as stack:
    parts = [stack.enter_context(tempfile.TemporaryFile(dir=out._path.parent)) for _ in range(num_parts)]
    for ids, keys, values in entries:
      piece = np.empty(len(ids), _ENTRY)
      piece['id'], piece['key'], piece['value'] = ids, keys, values
      part = (keys % np.uint64(num_parts)).astype(np.int64)
      order = np.argsort(part, kind='stable')
      bounds = np.searchsorted(part[order], np.arange(num_parts + 1))
      for i, file in enumerate(parts):
        file.write(piece[order[bounds[i]:bounds[i + 1]]].tobytes())
    for file in parts:
      table = np.empty(0, _ENTRY)
      for piece in _pieces_of(file):
        table = np.concatenate([table, piece])
        table = table[np.lexsort([table['value'], table['key']])]
        table = table[np.concatenate([[True], table['key'][1:] != table['key'][:-1]])]
      for piece in _pieces_of(file):
        out.put(piece['id'], table['value'][np.searchsorted(table['key'], piece['key'])])


def _pieces_of(file) -> Iterator[np.ndarray]:
  file.seek(0)
  while data := file.read(_PIECE * _ENTRY.itemsize):
    yield np.frombuffer(data, _ENTRY)
