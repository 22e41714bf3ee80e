"""Comparison of rows: a dataset has one media type, and one type per field, those of most rows.

Each row is valid by itself when it is read. A row of another type would stop a preparation or a training run hours
later. An extra field of another type is dropped from its row.
"""

import collections
import dataclasses
from collections.abc import Sequence

from uni_moe_jax.data.files.formats import MEDIA_TYPES, NO_CONTENT, Row, SkippedRow, is_reserved, is_text_field, shorten

_NOUNS = {'image': 'an image', 'video': 'a video'}
_LIST, _SINGLE = 'a list', 'a single value'


def keep_consistent(rows: Sequence[Row]) -> tuple[list[Row], list[SkippedRow]]:
  """Splits rows into those of the most frequent types, in order, and the others with their difference."""
  media_counts = collections.Counter(row.media_type for row in rows)
  media_type = max((*MEDIA_TYPES, ''), key=lambda m: media_counts[m])  # ties: images before videos before neither
  type_counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for row in rows:
    if row.media_type == media_type:
      for name, field_type in _field_types(row).items():
        type_counts[name][field_type] += 1
  usual = {name: max((_LIST, _SINGLE), key=lambda t: counts[t]) for name, counts in type_counts.items()}
  required = [name for name, counts in sorted(type_counts.items())
              if is_text_field(name) and counts.total() > media_counts[media_type] / 2]
  kept, skipped = [], []
  for row in rows:
    row = _drop_unusual_fields(row, usual)
    if reason := _difference(row, media_type, usual, required):
      skipped.append(SkippedRow(row.location, reason))
    else:
      kept.append(row)
  return kept, skipped


def _field_types(row: Row) -> dict[str, str]:
  return {**{name: _LIST if isinstance(v, tuple) else _SINGLE for name, v in row.texts.items()},
          **{name: _SINGLE for name in row.labels}}


def _drop_unusual_fields(row: Row, usual: dict[str, str]) -> Row:
  """Drops extra fields whose type differs from that of most rows."""
  unusual = [name for name, t in _field_types(row).items() if not is_reserved(name) and t != usual.get(name, t)]
  texts, labels = ({k: v for k, v in fields.items() if k not in unusual} for fields in (row.texts, row.labels))
  dropped_fields = (*row.dropped_fields, *map(shorten, unusual))
  return dataclasses.replace(row, texts=texts, labels=labels, dropped_fields=dropped_fields)


def _difference(row: Row, media_type: str, usual: dict[str, str], required: list[str]) -> str:
  """The difference of a row from most rows, or ''."""
  if row.media_type != media_type:
    return f'has {_NOUNS[row.media_type]}, unlike most rows' if row.media_type else f'no {media_type}'
  if not media_type and not row.texts:
    return NO_CONTENT
  field_types = _field_types(row)
  for name, field_type in field_types.items():
    if field_type != usual[name]:
      return f'{name!r} is {field_type}, unlike in most rows'
  return next((f'no {name!r}' for name in required if name not in field_types), '')
