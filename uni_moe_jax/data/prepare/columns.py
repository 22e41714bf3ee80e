"""Arrays with an element per row, in files: memory does not grow with the number of rows."""

import contextlib
import io
import pathlib
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

_PIECE = 2**18  # rows in memory at once
_MAX_PARTS = 500  # open files
_ENTRY = np.dtype([('id', 'i8'), ('key', 'u8'), ('value', 'i8')])


def save(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes an .npy file. By itself NumPy may lose the end of an array on a full disk, without an error."""
  np.save(content := io.BytesIO(), array)
  path.write_bytes(content.getbuffer())


class Column:
  """A one-dimensional array in a file, of which pieces are in memory."""

  def __init__(self, path: pathlib.Path, dtype: np.dtype | str, size: int = 0):
    """Creates an array of zeros."""
    self._path, self._dtype, self.size = path, np.dtype(dtype), 0
    path.write_bytes(b'')
    for start in range(0, size, _PIECE):  # written, since on a full disk an assignment to a hole would end the process
      self.append(np.zeros(min(_PIECE, size - start), self._dtype))

  def append(self, values: np.ndarray) -> None:
    with open(self._path, 'ab') as file:
      file.write(values.astype(self._dtype, copy=False).tobytes())
    self.size += len(values)

  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    """A copy of some elements; they are written by an assignment."""
    elements = self._map('r').view(f'V{self._dtype.itemsize}')  # of records, fields would be copied one by one
    return np.array(elements[rows]).view(self._dtype)

  def __setitem__(self, rows: slice | np.ndarray, values: np.ndarray) -> None:
    self._map('r+')[rows] = values

  def _map(self, mode: str) -> np.ndarray:
    return np.memmap(self._path, self._dtype, mode) if self.size else np.empty(0, self._dtype)

  def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (index of its first element, piece)."""
    for start in range(0, self.size, _PIECE):
      yield start, self[start:start + _PIECE]


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
        out[piece['id']] = table['value'][np.searchsorted(table['key'], piece['key'])]


def _pieces_of(file) -> Iterator[np.ndarray]:
  file.seek(0)
  while data := file.read(_PIECE * _ENTRY.itemsize):
    yield np.frombuffer(data, _ENTRY)
