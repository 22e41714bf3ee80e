"""The second half of preparation: one pure function per file of array records, of rows that `merge` has selected."""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from uni_moe_jax.data.formats.rows import MEDIA_TYPES
from uni_moe_jax.data.prepare.scan import ScannedShard
from uni_moe_jax.data.shards import writer
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import atomic_folder


@dataclasses.dataclass(frozen=True)
class Write:
  """The writing of one file.

  Attributes:
    folder, name: of the file. done: folder that gets a folder `name` with arrays and facts when the file is complete.
    split: index of the split. start: number of its examples in the files before this one.
    shards: folders of consecutive scanned shards. splits: of their rows, see `Merged`.
    columns, classes: see `Merged`.
  """
  folder: str
  name: str
  done: str
  split: int
  start: int
  shards: tuple[str, ...]
  splits: np.ndarray
  columns: dict[str, str]
  classes: dict[str, tuple[str, ...]]

  def __call__(self) -> int:
    """Returns the number of examples."""
    target = storage.path(self.folder) / self.name
    with (tempfile.TemporaryDirectory(prefix='.', dir=self.done) as temporary,
          atomic_folder(storage.path(self.done) / self.name) as folder):
      facts = writer.write_records(
          path := f'{temporary}/records', folder, writer.Layout(self.columns, self.classes), self._values(), self.start)
      storage.move_file(path, target)
    return facts['size']

  def _values(self) -> Iterator[tuple[dict[str, Any], str]]:
    indices = {column: {name: i for i, name in enumerate(names)} for column, names in self.classes.items()}
    for header, data in self._examples():
      yield {column: data if column_type in MEDIA_TYPES else _value(header, column, column_type, indices)
             for column, column_type in self.columns.items()}, header['location']

  def _examples(self) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yields (location, texts and labels; stored image or video)."""
    start = 0
    for name in self.shards:
      shard = ScannedShard(storage.path(name))
      sizes = shard.records()['bytes']
      selected = np.flatnonzero(self.splits[start:start + len(sizes)] == self.split)
      yield from shard.contents(sizes, selected)
      start += len(sizes)


def _value(header: Mapping[str, Any], column: str, column_type: str, indices: Mapping[str, Mapping[str, int]]
           ) -> int | str | list[str]:
  """The value of a class or of texts, as TFDS encodes it; -1 for no class."""
  if column_type == 'class':
    return indices[column].get(header['labels'].get(column), -1)
  text = header['texts'].get(column) or header['labels'].get(column)
  return list(text or ()) if column_type == 'texts' else text or ''
