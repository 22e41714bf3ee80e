"""Rows against each other: a data set has one medium and one type per field, those that most rows have.

A row is checked alone where it is read. That it is another sort than the rest shows only beside them, and could otherwise stop a
preparation that has run for hours, or a training that has. Of an extra field that alone is left out.
"""

import collections
import dataclasses
from collections.abc import Sequence

from uni_moe_jax.data.files.formats import MEDIA, Row, Skipped, is_known, is_text, short

_NOUNS = {'image': 'picture', 'video': 'clip'}
_LIST, _ONE = 'a list', 'a single value'


def keep_consistent(rows: Sequence[Row]) -> tuple[list[Row], list[Skipped]]:
  """The rows that are of the sort that most are, in order; the others with what sets them apart."""
  media = collections.Counter(row.media for row in rows)
  medium = max((*MEDIA, ''), key=lambda m: media[m])  # of equally many, pictures before clips before neither
  types: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  alike = [row for row in rows if row.media == medium]
  for row in alike:
    for name, kind in _types(row).items():
      types[name][kind] += 1
  usual = {name: max((_LIST, _ONE), key=lambda kind: counts[kind]) for name, counts in types.items()}
  required = [name for name, counts in sorted(types.items())
              if is_text(name) and counts.total() > len(alike) / 2]
  kept, skipped = [], []
  for row in rows:
    row = _fitting(row, usual)
    if reason := _apart(row, medium, usual, required):
      skipped.append(Skipped(row.where, reason))
    else:
      kept.append(row)
  return kept, skipped


def _types(row: Row) -> dict[str, str]:
  return {**{name: _LIST if isinstance(v, tuple) else _ONE for name, v in row.texts.items()},
          **{name: _ONE for name in row.labels}}


def _fitting(row: Row, usual: dict[str, str]) -> Row:
  """A row without those of its extra fields that are of another type than in most rows."""
  odd = [name for name, kind in _types(row).items() if not is_known(name) and kind != usual.get(name, kind)]
  if not odd:
    return row
  texts, labels = ({name: v for name, v in of.items() if name not in odd} for of in (row.texts, row.labels))
  return dataclasses.replace(row, texts=texts, labels=labels, left_out=(*row.left_out, *map(short, odd)))


def _apart(row: Row, medium: str, usual: dict[str, str], required: list[str]) -> str:
  """Why a row is none of this data set, or ''."""
  if row.media != medium:
    return f'no {_NOUNS[medium]}' if not row.media else f'a {_NOUNS[row.media]}, and most rows have {_having(medium)}'
  if not medium and not row.texts:
    return 'neither a picture, a clip nor a text'
  found = _types(row)
  for name, kind in found.items():
    if kind != usual[name]:
      return f'{name!r} is {kind}, and in most rows {usual[name]}'
  return next((f'no {name!r}' for name in required if name not in found), '')


def _having(medium: str) -> str:
  return f'a {_NOUNS[medium]}' if medium else 'none'
