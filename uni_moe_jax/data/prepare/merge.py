"""What is decided about rows by comparing them: which are examples, in which split, of which columns and classes.

Rows are skipped for the first reason of: it occurred before; its media type or the types of its fields differ from
those of most rows; its file is damaged; its content is in a later split, or occurred before under another name.

Rows of equal content (the bytes of an image or video, a labeled text) belong together whatever their files are called:
a copy of a training image in the split test would measure memory. Images that were resized or encoded again are not
recognized.

Decisions depend on the order of the rows alone, not on who read them. Nothing here grows in memory with their number,
but distinct classes, words and sizes.
"""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.data.formats import rows as formats
from uni_moe_jax.data.prepare import scan
from uni_moe_jax.data.prepare.columns import Column, smallest_by_key
from uni_moe_jax.data.prepare.scan import RECORD, SPLITS, WORDS, ScannedShard
from uni_moe_jax.utils.errors import UsageError

_NOUNS = {'image': 'an image', 'video': 'a video'}

Skipped = dict[str, tuple[int, list[str]]]  # reason → number, first locations


class TooManySkippedError(UsageError):
  """A larger `max_corrupt_fraction` would have allowed the skipped rows."""


@dataclasses.dataclass
class Merged:
  """Decisions about all rows.

  Attributes:
    rows: `RECORD` of each row.
    splits: index of the split of each row in `SPLITS`, int8; -1: it is skipped.
    bounds: index of the first row of each shard, and the number of rows.
    columns: name → 'image', 'video', 'texts', 'text' or 'class'. classes: class column → names in order.
    class_counts: class column → {(name, split index): rows}.
    captioned: split → number of its examples with captions.
    rows_of_one_image: number of rows with captions of an image or a video that an earlier row has captions of, too.
    sizes, num_captions, text_bytes, rewritten, dropped_fields: how often each occurs in examples.
  """
  rows: Column
  splits: Column
  bounds: np.ndarray
  names_splits: bool = False
  columns: dict[str, str] = dataclasses.field(default_factory=dict)
  classes: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  class_counts: dict[str, collections.Counter] = dataclasses.field(default_factory=dict)
  split_sizes: dict[str, int] = dataclasses.field(default_factory=dict)
  captioned: dict[str, int] = dataclasses.field(default_factory=dict)
  sizes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  num_captions: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  text_bytes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  rewritten: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  dropped_fields: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  skipped: Skipped = dataclasses.field(default_factory=dict)
  groups_in_several_splits: int = 0
  rows_of_one_image: int = 0


class Merge:
  """The decisions, step by step."""

  def __init__(self, shards: Sequence[ScannedShard], folder: pathlib.Path):
    """folder: for files with an element per row."""
    self._shards, self._folder = shards, folder
    self._words = scan.new_words()
    self._rows, bounds = Column(folder / 'rows', RECORD), [0]
    for shard in shards:
      records, manifest = shard.records(), shard.manifest()
      for name in WORDS:
        codes = [self._words[name][word] for word in manifest[name]]
        records[name] = np.array(codes, np.int32)[records[name]]
      self._rows.append(records)
      bounds.append(self._rows.size)
    self._reasons = self._column('reasons', 'i4')  # codes of words; 0 for none
    self._result = Merged(self._rows, self._column('splits', 'i1'), np.array(bounds))

  def __call__(self, test_fraction: float, max_corrupt_fraction: float, source: object) -> Merged:
    """Raises UsageError: more than `max_corrupt_fraction` of the rows are skipped, or all."""
    self._skip_duplicates()
    self._skip_inconsistent()
    self._skip_repeated()
    self._count_skipped(max_corrupt_fraction, source)
    self._assign_splits(test_fraction)
    self._count_rows_of_one_image()
    self._count_values()
    return self._result

  def _column(self, name: str, dtype: str) -> Column:
    return Column(self._folder / name, dtype, self._rows.size)

  def _pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (ids, records, reasons) of all rows."""
    for start, rows in self._rows.pieces():
      yield (ids := np.arange(start, start + len(rows))), rows, self._reasons[ids]

  def _valid(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (ids, records) of the rows that have not been skipped."""
    for ids, rows, reasons in self._pieces():
      yield ids[reasons == 0], rows[reasons == 0]

  def _skip(self, ids: np.ndarray, reasons: np.ndarray, words: np.ndarray) -> None:
    """Sets a reason, where there is none; `words`: codes."""
    self._reasons[ids] = np.where(reasons == 0, words, reasons)

  def _code(self, reason: str) -> int:
    return self._words['reason'][reason]

  def _smallest(self, name: str, entries) -> Column:
    smallest_by_key(entries, self._rows.size, column := self._column(name, 'i8'))
    return column

  def _skip_duplicates(self) -> None:
    first = self._smallest('first', ((ids, rows['key'], ids) for ids, rows, _ in self._pieces()))
    of_key, of_content = self._code('duplicate key'), self._code('duplicate')
    for ids, rows, reasons in self._pieces():
      is_repeated = first[ids] != ids
      self._skip(ids, reasons, np.where(is_repeated, np.where(rows['has_key'], of_key, of_content), 0))

  def _skip_inconsistent(self) -> None:
    """Skips rows whose media type or types of fields differ from those of most rows, and those of damaged files.

    Each row is valid by itself, but one of another type would stop a preparation or a training run hours later.
    """
    signatures = [json.loads(word) for word in self._words['signature']]
    counts = np.zeros(len(signatures), np.int64)
    for _, rows in self._valid():
      counts += np.bincount(rows['signature'], minlength=len(counts))
    verdicts = _consistent(signatures, counts.tolist())
    codes = np.array([self._code(reason) for reason in verdicts], np.int32)
    self._media_type = next((s[0] for s, reason in zip(signatures, verdicts) if not reason), '')
    for ids, rows, reasons in self._pieces():
      verdict = codes[rows['signature']]
      self._skip(ids, reasons, np.where(verdict == 0, rows['reason'], verdict))

  def _skip_repeated(self) -> None:
    """Skips rows whose content is in a later split, too, and rows that repeat another one but for the file's name."""
    def entries(key, value):
      for ids, rows in self._valid():
        compared = rows['content'] != 0
        yield ids[compared], rows[key][compared], value(ids, rows)[compared]

    later = self._smallest('later', entries('content', lambda _, rows: -_named(rows)))
    leaks = np.array([self._code(f'same {self._media_type or "text"} as in split {s!r}') for s in SPLITS])
    for ids, rows, reasons in self._pieces():
      last = -later[ids]
      self._skip(ids, reasons, np.where((rows['content'] != 0) & (last != _named(rows)), leaks[last], 0))
    # Of the rows that are left: the first one of all may have been skipped for the one that repeats it.
    first = self._smallest('first', entries('identity', lambda ids, _: ids))
    for ids, rows, reasons in self._pieces():
      is_repeated = (rows['content'] != 0) & (first[ids] != ids) & ~rows['has_key']
      self._skip(ids, reasons, np.where(is_repeated, self._code('duplicate'), 0))

  def _count_skipped(self, max_corrupt_fraction: float, source: object) -> None:
    skipped: dict[str, list[Any]] = {}
    words, num_rows = list(self._words['reason']), self._rows.size
    for i, shard in enumerate(self._shards):
      for reason, (number, locations) in shard.manifest()['skipped'].items():
        scan.count_skipped(skipped, reason, number, locations)
        num_rows += number
      rows = slice(*self._result.bounds[i:i + 2])
      reasons = self._reasons[rows]
      for code in np.unique(reasons[reasons != 0]).tolist():
        ids = np.flatnonzero(reasons == code)
        missing = scan.MAX_LOCATIONS - len(skipped.get(words[code], (0, []))[1])
        first = shard.contents(self._rows[rows]['bytes'], ids[:missing])
        scan.count_skipped(skipped, words[code], len(ids), [header['location'] for header, _ in first])
    self._result.skipped = {reason: (number, first) for reason, (number, first) in
                            sorted(skipped.items(), key=lambda item: -item[1][0])}
    num_skipped = sum(number for number, _ in skipped.values())
    if not num_rows:
      raise UsageError(f'{source} has no rows; give a file or folder that has some.')
    if num_skipped == num_rows or num_skipped > max_corrupt_fraction * num_rows:
      detail = ''.join(f'; most often: {reason!r} ({number}, first {first[0]})'
                       for reason, (number, first) in list(self._result.skipped.items())[:1])
      message = f'{num_skipped} of {num_rows} rows of {source} cannot be used{detail}. Fix them'
      if num_skipped == num_rows:
        raise UsageError(f'{message}.')
      raise TooManySkippedError(f'{message}, or raise --max_corrupt_fraction={max_corrupt_fraction}; files are then '
                                'not read again.')

  def _assign_splits(self, test_fraction: float) -> None:
    """Gives rows the split that they name; if none does, a hash selects one for all rows that belong together.

    Rows belong together if they share their group (or file), or content, also through others. The hash is of the
    group of the first of them.
    """
    result = self._result
    result.names_splits = any((rows['split'] >= 0).any() for _, rows in self._valid())
    first = None if result.names_splits else self._first_of_component()
    sizes = np.zeros(len(SPLITS), np.int64)
    for ids, rows, reasons in self._pieces():
      if first is None:
        splits = _named(rows)
      else:
        digests = self._rows[first[ids]]['group']
        splits = np.where(digests / 2**64 < test_fraction, SPLITS.index('test'), 0)
      splits = np.where(reasons == 0, splits, -1)
      sizes += np.bincount(splits[splits >= 0], minlength=len(SPLITS))
      result.splits[ids] = splits
    if first is not None and not sizes[0] and test_fraction < 1:  # too few groups: keep them for training
      for start, splits in result.splits.pieces():
        result.splits[start:start + len(splits)] = np.where(splits >= 0, 0, splits)
      sizes = np.array([sizes.sum(), 0, 0])
    result.split_sizes = {s: n for s, n in zip(SPLITS, sizes.tolist()) if n}
    if result.names_splits:
      self._count_divided_groups()

  def _first_of_component(self) -> Column:
    """The first of the rows that belong together, for each row."""
    first = self._column('component', 'i8')
    for ids, _, _ in self._pieces():
      first[ids] = ids
    changed = True
    while changed:
      changed = False
      for key in ('group', 'content'):
        smallest = self._smallest('smallest', (
            (ids[joined], rows[key][joined], first[ids[joined]])
            for ids, rows in self._valid() for joined in [(rows[key] != 0) | (key == 'group')]))
        for ids, rows in self._valid():
          joined = ids[(rows[key] != 0) | (key == 'group')]
          before, after = first[joined], smallest[joined]
          if (before != after).any():
            changed = True
            first[joined] = after
      for start, rows in first.pieces():  # a row that the first one is joined to is joined to all
        first[start:start + len(rows)] = first[rows]
    return first

  def _count_divided_groups(self) -> None:
    low, high, first = (self._smallest(name, ((ids, rows['group'], value(ids, rows)) for ids, rows in self._valid()))
                        for name, value in (('low', lambda _, rows: _named(rows)),
                                            ('high', lambda _, rows: -_named(rows)), ('first', lambda ids, _: ids)))
    self._result.groups_in_several_splits = sum(
        int(((low[ids] != -high[ids]) & (first[ids] == ids)).sum()) for ids, _ in self._valid())

  def _count_rows_of_one_image(self) -> None:
    if self._media_type:
      first = self._smallest('first', ((ids[captioned], rows['content'][captioned], ids[captioned])
                                       for ids, rows in self._valid() for captioned in [rows['captions'] > 0]))
      self._result.rows_of_one_image = sum(
          int((first[ids] != ids)[rows['captions'] > 0].sum()) for ids, rows in self._valid())

  def _count_values(self) -> None:
    """Finds columns and classes: the values of 'label' and of fields whose values occur at least twice on average."""
    result, signatures = self._result, [json.loads(word) for word in self._words['signature']]
    counts, notes = np.zeros(len(signatures), np.int64), list(self._words['note'])
    captioned = np.zeros(len(SPLITS), np.int64)
    for ids, rows in self._valid():
      captioned += np.bincount(result.splits[ids[rows['captions'] > 0]], minlength=len(SPLITS))
      counts += np.bincount(rows['signature'], minlength=len(counts))
      _count(result.sizes, rows['size'], lambda size: tuple(size[:2 if not size[2] else 3]))
      for counter, name in ((result.num_captions, 'captions'), (result.text_bytes, 'text_bytes')):
        _count(counter, rows[name][rows[name] >= 0], lambda n: (n,))
      _count(result.rewritten, rows['note'][rows['note'] != 0], notes.__getitem__)
    result.captioned = {s: n for s, n in zip(SPLITS, captioned.tolist()) if s in result.split_sizes}
    result.sizes.pop((0, 0), None)
    types = {}
    for i in np.flatnonzero(counts).tolist():
      media_type, fields, dropped_fields = signatures[i]
      for name in dropped_fields:
        result.dropped_fields[name] += int(counts[i])
      types |= {media_type: media_type} if media_type else {}
      types |= {name: 'texts' if is_list else 'text' for name, is_list in fields}
    for name, counter in self._label_counts().items():
      if counter and name in types:
        names = {value for value, _ in counter}
        if name == 'label' or len(names) <= min(scan.MAX_CLASSES, counter.total() / 2):
          is_numeric = all(re.fullmatch(r'-?\d+', v) for v in names)
          types[name], result.class_counts[name] = 'class', counter
          result.classes[name] = tuple(sorted(names, key=(lambda v: (int(v), v)) if is_numeric else None))
    result.columns = dict(sorted(types.items()))

  def _label_counts(self) -> dict[str, collections.Counter | None]:
    """Field → {(value, split index): rows}, or None for a field of too many values."""
    result, counts = self._result, {}
    num_splits = len(SPLITS)
    for i, shard in enumerate(self._shards):
      rows = slice(*result.bounds[i:i + 2])
      splits = result.splits[rows]
      for name, (values, codes) in shard.labels().items():
        counter = counts.setdefault(name, collections.Counter())
        used = (splits >= 0) & (codes >= 0)
        if values is None and used.any():
          counts[name] = None
        if counts[name] is None or not used.any():
          continue
        counted = np.bincount(codes[used] * num_splits + splits[used])
        counter.update({(values[k // num_splits], k % num_splits): int(counted[k]) for k in np.flatnonzero(counted)})
        if name != 'label' and len(counter) > num_splits * scan.MAX_CLASSES:
          counts[name] = None
    return counts


def _named(rows: np.ndarray) -> np.ndarray:
  """Index of the split that a row names, int64; 0, the split train, if it names none."""
  return np.maximum(rows['split'], 0).astype(np.int64)


def _count(counter: collections.Counter, values: np.ndarray, word) -> None:
  """Counts rows of an array by the word for each."""
  if len(values):
    distinct, counts = np.unique(values, return_counts=True, axis=0)
    for value, count in zip(distinct.tolist(), counts.tolist()):
      counter[word(value)] += count


def _consistent(signatures: Sequence[Any], counts: Sequence[int]) -> list[str]:
  """The reason to skip the rows of each signature, '' for none, by what most rows have."""
  media_counts, field_counts = collections.Counter(), collections.Counter()
  for (media_type, _, _), count in zip(signatures, counts):
    media_counts[media_type] += count
  # Ties: images before videos before neither, lists before single values.
  usual_media = max((*formats.MEDIA_TYPES, ''), key=lambda m: media_counts[m])
  for (media_type, fields, _), count in zip(signatures, counts):
    if media_type == usual_media:
      for name, is_list in fields:
        field_counts[name, is_list] += count
  usual = {name: max((True, False), key=lambda is_list: field_counts[name, is_list]) for name, _ in field_counts}
  required = [name for name in formats.TEXT_FIELDS if field_counts[name, False] > media_counts[usual_media] / 2]
  verdicts = []
  for media_type, fields, _ in signatures:
    types = dict(fields)
    if media_type != usual_media:
      reason = f'has {_NOUNS[media_type]}, unlike most rows' if media_type else f'no {usual_media}'
    elif not media_type and not any(is_list or name in formats.TEXT_FIELDS for name, is_list in types.items()):
      reason = formats.NO_CONTENT
    else:
      wrong = [f'{name!r} is {"a list" if is_list else "a single value"}, unlike in most rows'
               for name, is_list in types.items() if is_list != usual[name]]
      reason = next(iter([*wrong, *(f'no {name!r}' for name in required if name not in types)]), '')
    verdicts.append(reason)
  return verdicts
