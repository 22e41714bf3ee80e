"""The second half of preparation: one pure function per file of array records, of rows that `merge` has selected."""

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import numpy as np

from uni_moe_jax.data.examples.npz_records import atomic_folder
from uni_moe_jax.data.formats.rows import LOCATION, MEDIA_TYPES
from uni_moe_jax.data.prepare import columns
from uni_moe_jax.data.prepare.merge import without
from uni_moe_jax.data.prepare.scan import MANIFEST, ScannedShard
from uni_moe_jax.io import storage

MODULUS = 2**256  # of fingerprints, which are sums over examples, so that files are hashed independently
TEXT_TYPES, TEXTS = ('text', 'texts'), '.texts'  # of columns, and the suffix of files with their texts


@dataclasses.dataclass(frozen=True)
class Write:
  """The writing of one file.

  Attributes:
    folder, name: of the file. done: folder that gets a folder `name` with arrays and facts when the file is complete.
    split: index of the split. start: number of its examples in the files before this one.
    shards: folders of consecutive scanned shards. splits: of their rows, see `Merged`.
    signatures: of their rows; empty if no field is dropped.
    columns, classes, dropped: see `Merged`.
  """
  folder: str
  name: str
  done: str
  split: int
  start: int
  shards: tuple[str, ...]
  splits: np.ndarray
  signatures: np.ndarray
  columns: dict[str, str]
  classes: dict[str, tuple[str, ...]]
  dropped: dict[int, tuple[str, ...]]

  def __call__(self) -> int:
    """Returns the number of examples."""
    from array_record.python.array_record_module import ArrayRecordWriter
    target = storage.path(self.folder) / self.name
    indices = {column: {name: i for i, name in enumerate(names)} for column, names in self.classes.items()}
    arrays = {column: [] for column, column_type in self.columns.items() if column_type not in MEDIA_TYPES}
    number, num_bytes, fingerprint = self.start, 0, 0
    with contextlib.ExitStack() as stack:
      temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix='.', dir=self.done))
      folder = stack.enter_context(atomic_folder(storage.path(self.done) / self.name))
      texts = {column: stack.enter_context((folder / f'{column}{TEXTS}').open('w', encoding='utf-8', newline='\n'))
               for column, column_type in self.columns.items() if column_type in TEXT_TYPES}
      writer = ArrayRecordWriter(path := f'{temporary}/records', 'group_size:1')
      for header, data in self._examples():
        values = {column: data if column_type in MEDIA_TYPES else _value(header, column, column_type, indices)
                  for column, column_type in self.columns.items()}
        for column, array in arrays.items():
          array.append(_write_lines(texts[column], values[column]) if column in texts else values[column])
        fingerprint = (fingerprint + _digest(number, values.values())) % MODULUS
        writer.write(record := _example({**values, LOCATION: header['location']}))
        number, num_bytes = number + 1, num_bytes + len(record)
      writer.close()
      facts = {'size': number - self.start, 'bytes': num_bytes, 'fingerprint': f'{fingerprint:064x}'}
      storage.move_file(path, target)
      for column, array in arrays.items():
        columns.save(folder / f'{column}.npy', np.array(array, np.int32))
      (folder / MANIFEST).write_text(json.dumps(facts))
    return number - self.start

  def _examples(self) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yields (location, texts and labels; stored image or video)."""
    start = 0
    for name in self.shards:
      shard = ScannedShard(storage.path(name))
      sizes = shard.records()['bytes']
      selected = np.flatnonzero(self.splits[start:start + len(sizes)] == self.split)
      for i, (header, data) in zip(selected, shard.contents(sizes, selected)):
        if self.dropped and (names := self.dropped.get(int(self.signatures[start + i]))):
          header |= {key: without(header[key], names) for key in ('texts', 'labels')}
        yield header, data
      start += len(sizes)


def _value(header: Mapping[str, Any], column: str, column_type: str, indices: Mapping[str, Mapping[str, int]]
           ) -> int | str | list[str]:
  """The value of a class or of texts, as TFDS encodes it; -1 for no class."""
  if column_type == 'class':
    return indices[column].get(header['labels'].get(column), -1)
  text = header['texts'].get(column) or header['labels'].get(column)
  return list(text or ()) if column_type == 'texts' else text or ''


def _write_lines(file: TextIO, texts: str | list[str]) -> int:
  """Writes texts, none of which has a line break; returns their number."""
  lines = texts if isinstance(texts, list) else [texts] if texts else []
  file.writelines(f'{line}\n' for line in lines)
  return len(lines)


def _digest(number: int, values) -> int:
  digest = hashlib.sha256(number.to_bytes(8))
  for value in values:
    digest.update(hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).digest())
  return int.from_bytes(digest.digest())


def _example(values: Mapping[str, Any]) -> bytes:
  """A record as TFDS writes it: a tf.train.Example."""
  from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2
  features = {}
  for name, value in values.items():
    if isinstance(value, int):
      features[name] = tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[value]))
    else:
      strings = [v.encode() if isinstance(v, str) else v for v in (value if isinstance(value, list) else [value])]
      features[name] = tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=strings))
  return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features)).SerializeToString(
      deterministic=True)
