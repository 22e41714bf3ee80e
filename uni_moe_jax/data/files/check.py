"""Reading and checking of a user's own data: every row once, every image and video decoded once."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
import warnings
from collections.abc import Iterable, Iterator

from uni_moe_jax.data.files import media
from uni_moe_jax.data.files.consistency import keep_consistent
from uni_moe_jax.data.files.formats import Row, SkippedRow, read_rows
from uni_moe_jax.utils.errors import UsageError

_CHUNK = 256  # rows whose files are read at once

Skipped = dict[str, list[str]]  # reason → locations


@dataclasses.dataclass(frozen=True)
class CheckedRow:
  """A row whose file is valid. size, note: see `media.Media`."""
  row: Row
  size: tuple[int, ...]
  note: str


def read_checked_rows(
    source: pathlib.Path, gif: str = 'image', max_corrupt_fraction: float = 0.1) -> tuple[list[CheckedRow], Skipped]:
  """Returns the valid rows of a file or folder, in order, and the skipped ones.

  Args:
    source, gif: see `formats.read_rows`.
    max_corrupt_fraction: the largest fraction of skipped rows.

  Raises:
    UsageError: nothing to read, or too many rows are skipped.
  """
  skipped: Skipped = collections.defaultdict(list)
  rows, inconsistent = keep_consistent(list(drop_duplicates(read_rows(source, gif), skipped)))
  for row in inconsistent:
    skipped[row.reason].append(row.location)
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', module='PIL')  # damaged images are counted, not printed
    checked = list(_check_files(rows, skipped))
  num_skipped = sum(map(len, skipped.values()))
  total = len(checked) + num_skipped
  if not checked or num_skipped > max_corrupt_fraction * total:
    reason = max(skipped, key=lambda r: len(skipped[r]), default='')
    detail = f'; most often: {reason!r} ({len(skipped[reason])}, first {skipped[reason][0]})' if reason else ''
    raise UsageError(f'{num_skipped} of {total} rows of {source} cannot be used{detail}. '
                     f'Fix them, or raise --max_corrupt_fraction={max_corrupt_fraction}.')
  return checked, skipped


def drop_duplicates(rows: Iterable[Row | SkippedRow], skipped: Skipped) -> Iterator[Row]:
  """Yields each row once, identified by its key, else by its content; adds the others to `skipped`."""
  seen = set()
  for row in rows:
    if isinstance(row, SkippedRow):
      skipped[row.reason].append(row.location)
      continue
    content = (row.media_type, str(row.path), row.array_index, *sorted(row.texts.items()), *sorted(row.labels.items()))
    key = row.key or content
    digest = hashlib.sha256(repr(key).encode()).digest()  # smaller than the texts
    if digest in seen:
      skipped['duplicate key' if row.key else 'duplicate'].append(row.location)
      continue
    seen.add(digest)
    yield row


def _check_files(rows: list[Row], skipped: Skipped) -> Iterator[CheckedRow]:
  """Yields the rows whose file is valid, in order."""
  arrays = media.FrameArrays()

  def check(row: Row) -> CheckedRow | str:
    try:
      content = open_media(row, arrays)
      return CheckedRow(row, content.size, content.note)
    except media.CorruptFile as e:
      return str(e)

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for start in range(0, len(rows), _CHUNK):
      chunk = rows[start:start + _CHUNK]
      # `arrays` keeps one file: two threads would read two files alternately, again and again.
      in_order = any(row.array_index is not None for row in chunk)
      for row, result in zip(chunk, (map if in_order else pool.map)(check, chunk)):
        if isinstance(result, str):
          skipped[result].append(row.location)
        else:
          yield result


def open_media(row: Row, arrays: media.FrameArrays) -> media.Media:
  """Reads the image or video of a row; a text has none. Raises media.CorruptFile."""
  if not row.media_type:
    return media.Media(b'', ())
  if row.array_index is not None:
    return arrays.read_video(row.path, row.array_index)
  return media.read_image(row.path) if row.media_type == 'image' else media.read_video(row.path)
