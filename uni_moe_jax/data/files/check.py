"""Checks of a user's own data: every row once, every image and video decoded once, one type per field.

Each check yields all rows that it is given, in order; it sets `skipped` of those that are not examples.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
import warnings
from collections.abc import Iterable, Iterator

from uni_moe_jax.data.files import formats, media
from uni_moe_jax.data.files.formats import Row
from uni_moe_jax.data.files.npz_videos import NpzReader
from uni_moe_jax.data.files.splits import mark_repeated
from uni_moe_jax.utils.errors import UsageError

_CHUNK = 256  # rows whose files are read at once
_NOUNS = {'image': 'an image', 'video': 'a video'}
_LIST, _SINGLE = 'a list', 'a single value'

Skipped = dict[str, list[str]]  # reason → locations


def read_checked_rows(
    source: pathlib.Path, gif: str = 'image', max_corrupt_fraction: float = 0.1,
    allow_outside: bool = False) -> tuple[list[Row], Skipped]:
  """Returns the examples of `formats.read_rows`, in order, and the locations of skipped rows by reason.

  Raises:
    UsageError: nothing to read, or more than `max_corrupt_fraction` of the rows are skipped.
  """
  skipped: Skipped = collections.defaultdict(list)
  rows: Iterable[Row] = formats.read_rows(source, gif, allow_outside)
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', module='PIL')  # damaged images are counted, not printed
    for check in (mark_duplicates, mark_inconsistent, _open_files, mark_repeated):
      checked, rows = check(rows), []
      for row in checked:
        if row.skipped:
          skipped[row.skipped].append(row.location)
        else:
          rows.append(row)
  num_skipped = sum(map(len, skipped.values()))
  total = len(rows) + num_skipped
  if not rows or num_skipped > max_corrupt_fraction * total:
    reason = max(skipped, key=lambda r: len(skipped[r]), default='')
    detail = f'; most often: {reason!r} ({len(skipped[reason])}, first {skipped[reason][0]})' if reason else ''
    raise UsageError(f'{num_skipped} of {total} rows of {source} cannot be used{detail}. '
                     f'Fix them, or raise --max_corrupt_fraction={max_corrupt_fraction}.')
  return rows, skipped


def mark_duplicates(rows: Iterable[Row]) -> Iterator[Row]:
  """Skips rows that occurred before, identified by their key, else by their content."""
  seen = set()
  for row in rows:
    content = (row.media_type, str(row.path), row.array_index, *sorted(row.texts.items()), *sorted(row.labels.items()))
    digest = hashlib.sha256(repr(row.key or content).encode()).digest()  # smaller than the texts
    if digest in seen and not row.skipped:
      row = dataclasses.replace(row, skipped='duplicate key' if row.key else 'duplicate')
    seen.add(digest)
    yield row


def mark_inconsistent(rows: list[Row]) -> Iterator[Row]:
  """Skips rows whose media type or types of fields differ from those of most rows.

  Each row is valid by itself, but one of another type would stop a preparation or a training run hours later. An extra
  field of another type is dropped from its row.
  """
  media_counts = collections.Counter(row.media_type for row in rows)
  # Ties: images before videos before neither, lists before single values.
  media_type = max((*formats.MEDIA_TYPES, ''), key=lambda m: media_counts[m])
  counts = collections.Counter(
      item for row in rows if row.media_type == media_type for item in _field_types(row).items())
  usual = {name: max((_LIST, _SINGLE), key=lambda t: counts[name, t]) for name, _ in counts}
  required = [name for name in formats.TEXT_FIELDS if counts[name, _SINGLE] > media_counts[media_type] / 2]
  for row in rows:
    field_types = _field_types(row)
    unusual = [name for name, t in field_types.items() if t != usual.get(name, t)]
    dropped = [name for name in unusual if name not in formats.RESERVED_FIELDS]
    texts, labels = ({k: v for k, v in fields.items() if k not in dropped} for fields in (row.texts, row.labels))
    if row.media_type != media_type:
      skipped = f'has {_NOUNS[row.media_type]}, unlike most rows' if row.media_type else f'no {media_type}'
    elif not media_type and not texts:
      skipped = formats.NO_CONTENT
    else:
      wrong = [f'{name!r} is {field_types[name]}, unlike in most rows' for name in unusual if name not in dropped]
      skipped = next(iter([*wrong, *(f'no {name!r}' for name in required if name not in field_types)]), '')
    yield dataclasses.replace(row, texts=texts, labels=labels, skipped=skipped,
                              dropped_fields=(*row.dropped_fields, *map(formats.shorten, dropped)))


def _field_types(row: Row) -> dict[str, str]:
  return {name: _LIST if isinstance(v, tuple) else _SINGLE for name, v in {**row.texts, **row.labels}.items()}


def _open_files(rows: list[Row]) -> Iterator[Row]:
  """Skips rows whose image or video is damaged; of the others, finds sizes and what identifies their content."""
  arrays = NpzReader()  # one file at a time: two threads would read two files alternately, again and again

  def check(row: Row) -> Row:
    if not row.media_type:
      # Running text may repeat itself.
      texts = [row.texts.get(name) for name in formats.TEXT_FIELDS] if row.labels else None
      return dataclasses.replace(row, content=media.content_digest(repr(texts).encode()) if texts else b'')
    try:
      content = open_media(row, arrays)
      return dataclasses.replace(row, size=content.size, note=content.note, content=content.digest)
    except media.CorruptFile as e:
      return dataclasses.replace(row, skipped=str(e))

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for start in range(0, len(rows), _CHUNK):
      chunk = rows[start:start + _CHUNK]
      in_order = any(row.array_index is not None for row in chunk)
      yield from (map if in_order else pool.map)(check, chunk)


def open_media(row: Row, arrays: NpzReader) -> media.Media:
  """Reads the image or video of a row. Raises media.CorruptFile."""
  if row.array_index is not None:
    return arrays.read(row.path, row.array_index)
  return media.read_image(row.path) if row.media_type == 'image' else media.read_video(row.path)
