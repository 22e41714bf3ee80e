"""Rows of archives: tar files of WebDataset, and Parquet files. Damage costs the rows that it hits.

Sample KEY of a tar file is its consecutive members KEY.jpg (or another image or video), KEY.txt (a caption), KEY.json
(fields as in .jsonl) and KEY.cls (a class). A row of a Parquet file has fields as in .jsonl; an image or video may be
bytes, in a column of that name or of a file suffix ('jpg'), or of the type {bytes, path}; without bytes, it is the file
at the path.
"""

import dataclasses
import itertools
import os
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from uni_moe_jax.data.formats import media
from uni_moe_jax.data.formats import rows as formats
from uni_moe_jax.data.formats.rows import Row, Skip, printable, shorten
from uni_moe_jax.io import storage

_BATCH = 64  # rows of Parquet in memory at once, with their images
_CORRUPT_TAR, _CORRUPT_PARQUET = 'corrupt or truncated tar file', 'corrupt Parquet file'
_PATH_IN_BUCKET = 'a path in a Parquet file of a bucket, where only bytes are read; copy the folder to a disk first'


def open_binary(address: str) -> BinaryIO:
  """Opens a file of a disk or a bucket for reading."""
  return storage.filesystem(address).open(address, 'rb') if storage.is_remote(address) else open(address, 'rb')


def read_tar(address: str, split: str) -> Iterator[Row]:
  """Yields the samples of a tar file; where it is damaged it ends, with a row that says so."""
  name, key, members = os.path.basename(address), None, {}
  with open_binary(address) as file:
    try:
      tar = tarfile.open(fileobj=file, mode='r:')
      while (member := tar.next()) is not None:
        tar.members.clear()  # it would keep all of them
        folder, _, base = member.name.rpartition('/')
        if not member.isfile() or base.startswith('.'):
          continue
        stem, _, extension = base.partition('.')
        if (folder, stem) != key:
          if key is not None:
            yield _sample(name, key, members, split)
          key, members = (folder, stem), {}
        members[extension.lower()] = tar.extractfile(member).read(media.MAX_BYTES + 1)  # which is refused
      file.seek(tar.offset)
      is_complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError):
      is_complete, key = False, None  # a sample that may lack members
    if key is not None:
      yield _sample(name, key, members, split)
    if not is_complete:
      yield Row(printable(name), skipped=_CORRUPT_TAR)


def _sample(file: str, key: tuple[str, str], members: dict[str, bytes], split: str) -> Row:
  location = printable('/'.join(filter(None, (file, *key))))
  try:
    value = formats.decode_json(members.pop('json')) if 'json' in members else {}
    if isinstance(value, dict):
      value = {k: v for k, v in value.items() if k not in formats.MEDIA_TYPES}  # names of files elsewhere
      for extension, field in (('txt', 'caption'), ('cls', 'label')):
        if extension in members:
          value[field] = formats.decode_text(members.pop(extension))
    known = {e: formats.media_type_of(f'.{e.rpartition(".")[2]}') for e in members}
    content = [(media_type, members[e]) for e, media_type in known.items() if media_type]
    if len(content) > 1:
      raise Skip('several images or videos')
    row = formats.parse(value, location, pathlib.Path(), split, False, data=content[0] if content else None)
    others = map(shorten, (e for e, media_type in known.items() if not media_type))
    return dataclasses.replace(row, dropped_fields=(*row.dropped_fields, *others))
  except Skip as e:
    return Row(location, skipped=str(e))


def row_groups(address: str) -> list[int]:
  """The number of the first row of each row group of a Parquet file; [1] if it is damaged."""
  import pyarrow as pa
  try:
    with open_binary(address) as file:
      metadata = _parquet(file).metadata
  except (pa.ArrowException, ValueError):
    return [1]
  except OSError as e:  # also pyarrow's errors of decoding
    if e.errno is not None or storage.is_remote(address) and storage.explain(e, address):
      raise
    return [1]
  sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
  return list(itertools.accumulate(sizes, initial=1))[:-1]


def read_parquet(
    address: str, group: int, first: int, root: pathlib.Path, split: str, allow_outside: bool) -> Iterator[Row]:
  """Yields the rows of a row group; where it is damaged, the others of the group are rows that say so."""
  import pyarrow as pa
  name, number, stop = os.path.basename(address), first, first + 1
  location = lambda: printable(f'{name}:{number}')
  with open_binary(address) as file:
    try:
      parquet = _parquet(file)
      stop = first + parquet.metadata.row_group(group).num_rows
      columns = [field.name for field in parquet.schema_arrow if _is_read(field)]
      dropped = tuple(shorten(field.name) for field in parquet.schema_arrow if not _is_read(field))
      for batch in parquet.iter_batches(_BATCH, row_groups=[group], columns=columns):
        for value in _values(batch):
          row = (Row(location(), skipped=value) if isinstance(value, str) else
                 _parquet_row(value, location(), root, split, allow_outside, dropped))
          yield Row(location(), skipped=_PATH_IN_BUCKET) if row.path and storage.is_remote(address) else row
          number += 1
    except (pa.ArrowException, ValueError, OSError) as e:
      if storage.is_remote(address) and storage.explain(e, address):
        raise
      while number < stop:
        yield Row(location(), skipped=_CORRUPT_PARQUET)
        number += 1


def _is_read(field: Any) -> bool:
  """Whether a column may be an image, a video or a field; what others have could not be used, and may be large."""
  import pyarrow.types as types
  if field.name in formats.RESERVED_FIELDS or formats.media_type_of(f'.{field.name}'):
    return True  # if it cannot be used, that is a reason to skip the row
  value = _unwrapped(field.type)
  if is_list := types.is_list(value) or types.is_large_list(value) or types.is_fixed_size_list(value):
    value = _unwrapped(value.value_type)
  return _is_text(value) or types.is_null(value) or not is_list and (
      types.is_integer(value) or types.is_floating(value) or types.is_boolean(value))


def _unwrapped(type_: Any) -> Any:
  """The type of the values of a dictionary or of an extension type."""
  import pyarrow.types as types
  return type_.value_type if types.is_dictionary(type_) else getattr(type_, 'storage_type', type_)


def _is_text(type_: Any) -> bool:
  import pyarrow.types as types
  return types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_)


def _values(batch: Any) -> Iterator[dict[str, Any] | str]:
  """Yields the values of each row, or why it has none."""
  try:
    yield from batch.to_pylist()  # of all rows, before the first one
  except Exception:  # of Python, too, as for times after the year 9999
    for i in range(len(batch)):
      try:
        yield from batch.slice(i, 1).to_pylist()
      except Exception as e:
        yield formats.NOT_UTF8 if isinstance(e, UnicodeError) else 'a value that Python cannot represent'


def _parquet(file: BinaryIO) -> Any:
  import pyarrow.parquet as pq
  return pq.ParquetFile(file)


def _parquet_row(
    value: dict[str, Any], location: str, root: pathlib.Path, split: str, allow_outside: bool,
    dropped: tuple[str, ...]) -> Row:
  """dropped: names of columns that were not read."""
  content = []
  for name, field in list(value.items()):
    is_file = isinstance(field, dict) and isinstance(field.get('bytes'), bytes)
    if media_type := name if name in formats.MEDIA_TYPES else formats.media_type_of(f'.{name}'):
      if is_file or isinstance(field, bytes):
        content.append((media_type, field['bytes'] if is_file else field))
      path = field.get('path') if isinstance(field, dict) and not is_file else None
      if name in formats.MEDIA_TYPES and isinstance(path, str):
        value[name] = path
      elif not isinstance(field, str):
        del value[name]
  try:
    if len(content) > 1:
      raise Skip('several images or videos')
    row = formats.parse(value, location, root, split, allow_outside, data=content[0] if content else None)
    return dataclasses.replace(row, dropped_fields=(*row.dropped_fields, *dropped))
  except Skip as e:
    return Row(location, skipped=str(e))
