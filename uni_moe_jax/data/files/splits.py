"""Splits of a user's own data: which rows must stay in one, and which must not be in two.

Rows of equal content (the bytes of an image or video, a labeled text) belong together whatever their files are called:
a copy of a training image in the split test would measure memory. Images that were resized or encoded again are not
recognized.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator

from uni_moe_jax.data.files.formats import Row

SPLITS = ('train', 'validation', 'test')

Splits = dict[str, list[Row]]


def mark_repeated(rows: list[Row]) -> Iterator[Row]:
  """Skips rows whose content is in a later split, too, and rows that repeat another one but for the name of the file.

  Yields all rows, in order. Where rows name no splits, equal content is left to `split_rows`.
  """
  last: dict[bytes, int] = collections.defaultdict(int)  # content → index of the last split that has it
  for row in rows:
    last[row.content] = max(last[row.content], SPLITS.index(_named_split(row)))
  seen = set()
  for row in rows:
    if row.content:
      identity = (row.content, *sorted(row.texts.items()), *sorted(row.labels.items()))
      digest = hashlib.sha256(repr(identity).encode(errors='backslashreplace')).digest()
      if (split := SPLITS[last[row.content]]) != _named_split(row):
        row = dataclasses.replace(row, skipped=f'same {row.media_type or "text"} as in split {split!r}')
      elif digest in seen and not row.key:
        row = dataclasses.replace(row, skipped='duplicate')
      seen.add(digest)
    yield row


def split_rows(rows: list[Row], test_fraction: float, root: pathlib.Path) -> Splits:
  """Sorts rows by the split that they name; if none does, a hash selects one for all rows that belong together.

  Rows belong together if they share their group (or file), or content, also through others. The hash is of the
  smallest name of their groups.
  """
  splits: Splits = {s: [] for s in SPLITS}
  names_splits = any(row.split for row in rows)
  for row, group in zip(rows, _joined_groups(rows, root), strict=True):
    split = _named_split(row)
    if not names_splits:
      digest = hashlib.sha256(group.encode(errors='backslashreplace')).digest()
      split = 'test' if int.from_bytes(digest[:8]) / 2**64 < test_fraction else 'train'
    splits[split].append(row)
  if not names_splits and not splits['train'] and test_fraction < 1:
    splits = {'train': splits['test']}  # too few groups: keep them for training
  return {s: members for s, members in splits.items() if members}


def group_of(row: Row, root: pathlib.Path) -> str:
  """Name of what must stay in one split: the row's group, else its file, which rows may share, else the row."""
  # The whole path below the input: many folders may contain an 'image.png'.
  file = row.path and f'{os.path.relpath(row.path, root)}#{row.array_index}'
  return row.group or file or row.key or row.location


def _named_split(row: Row) -> str:
  return row.split or SPLITS[0]


def _joined_groups(rows: list[Row], root: pathlib.Path) -> list[str]:
  """The group of each row after groups of equal content are joined: the smallest name of those joined."""
  parent: dict[str, str] = {}

  def find(group: str) -> str:
    while (above := parent.setdefault(group, group)) != group:
      parent[group] = group = parent[above]  # halves the path
    return group

  groups = [group_of(row, root) for row in rows]
  first: dict[bytes, str] = {}  # content → a group that has it
  for row, group in zip(rows, groups, strict=True):
    if row.content:
      low, high = sorted((find(group), find(first.setdefault(row.content, group))))
      parent[high] = low
  return list(map(find, groups))
