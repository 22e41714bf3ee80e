"""Statistics of prepared data, for prepared.json and for the terminal."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from uni_moe_jax.data.files.check import CheckedRow, Skipped

_MAX_LOCATIONS = 5  # per reason
_MAX_DROPPED_FIELDS = 20  # by name


def summarize(
    splits: Mapping[str, list[CheckedRow]], columns: dict[str, str], classes: Mapping[str, tuple[str, ...]],
    arrays: Mapping[str, np.ndarray], skipped: Skipped, test_fraction: float) -> dict[str, Any]:
  """Statistics of splits, classes and skipped rows. arrays: '{split}/{column}' → class indices."""
  rows = [c for members in splits.values() for c in members]
  counts = {column: {s: np.bincount(arrays[f'{s}/{column}'] + 1, minlength=len(names) + 1)[1:].tolist() for s in splits}
            for column, names in classes.items()}
  return {
      'columns': columns, 'splits': {s: len(members) for s, members in splits.items()},
      'classes': {column: {'names': list(names), 'counts': counts[column]} for column, names in classes.items()},
      'sizes': _spread([c.size for c in rows if c.size]),
      'captions_per_example': _spread([(len(c.row.texts['captions']),) for c in rows if 'captions' in c.row.texts]),
      'rewritten': _most_common(c.note for c in rows if c.note),
      'dropped_fields': _most_common((name for c in rows for name in c.row.dropped_fields), _MAX_DROPPED_FIELDS),
      'warnings': _warnings(splits, test_fraction),
      'skipped': {reason: {'count': len(locations), 'first': locations[:_MAX_LOCATIONS]}
                  for reason, locations in sorted(skipped.items(), key=lambda item: -len(item[1]))}}


def _most_common(values, n: int | None = None) -> dict[str, int]:
  return dict(collections.Counter(values).most_common(n))


def _warnings(splits: Mapping[str, list[CheckedRow]], test_fraction: float) -> list[str]:
  if 'train' not in splits:
    return ['there is no split train; this data can only be evaluated']
  names_splits = any(c.row.split for members in splits.values() for c in members)
  if test_fraction and 'test' not in splits and not names_splits:
    return [f'the split test is empty with --test_fraction={test_fraction}: too few groups; raise it, or name '
            'the split of each row']
  return []


def _spread(values: list[tuple[int, ...]]) -> dict[str, list[int]]:
  """{'min', 'median', 'max'} of each element of tuples of equal length; {} for none."""
  if not values:
    return {}
  table = np.sort([v for v in values if len(v) == len(values[0])], axis=0)
  return {'min': table[0].tolist(), 'median': table[len(table) // 2].tolist(), 'max': table[-1].tolist()}


def describe(summary: dict[str, Any]) -> str:
  """A few lines on prepared.json for the terminal."""
  lines = [f'{summary["name"]} {summary["version"]}: ' + ', '.join(f'{s} {n}' for s, n in summary['splits'].items()),
           'columns: ' + ', '.join(f'{column} ({t})' for column, t in summary['columns'].items())]
  for column, classes in summary['classes'].items():
    names = ', '.join(classes['names'][:8]) + (', …' if len(classes['names']) > 8 else '')
    lines.append(f'{column}: {len(classes["names"])} classes: {names}')
  for title, spread in (('size', summary['sizes']), ('captions', summary['captions_per_example'])):
    if spread:
      lines.append(f'{title}: ' + ', '.join(f'{k} {" × ".join(map(str, v))}' for k, v in spread.items()))
  lines += [f'warning: {warning}' for warning in summary['warnings']]
  lines += [f'rewritten, {note}: {count}' for note, count in summary['rewritten'].items()]
  lines += [f'dropped field {name}, whose type or name cannot be used: {count}'
            for name, count in summary['dropped_fields'].items()]
  if n := summary['groups_in_several_splits']:
    lines.append(f'warning: {n} groups or files are in several splits; evaluation may see training examples')
  for reason, rows in summary['skipped'].items():
    more = ', …' if rows['count'] > len(rows['first']) else ''
    lines.append(f'skipped, {reason}: {rows["count"]} ({", ".join(rows["first"])}{more})')
  return '\n'.join(lines)
