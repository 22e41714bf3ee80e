"""Statistics of prepared data, for prepared.json and for the terminal."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from uni_moe_jax.data.files.check import Skipped
from uni_moe_jax.data.files.formats import Row

_MAX_LOCATIONS = 5  # per reason
_MAX_DROPPED_FIELDS = 20  # by name


def summarize(
    splits: Mapping[str, list[Row]], columns: dict[str, str], classes: Mapping[str, tuple[str, ...]],
    arrays: Mapping[str, np.ndarray], skipped: Skipped, test_fraction: float) -> dict[str, Any]:
  """Statistics of splits, classes and skipped rows. arrays: '{split}/{column}' → class indices."""
  rows = [row for members in splits.values() for row in members]
  most_common = lambda values, n=None: dict(collections.Counter(values).most_common(n))
  count = lambda indices, num_classes: np.bincount(indices + 1, minlength=num_classes + 1)[1:].tolist()
  warnings = []
  if 'train' not in splits:
    warnings.append('there is no split train; this data can only be evaluated')
  elif test_fraction and 'test' not in splits and not any(row.split for row in rows):
    warnings.append(f'the split test is empty with --test_fraction={test_fraction}: too few groups; raise it, or name '
                    'the split of each row')
  return {
      'columns': columns, 'splits': {s: len(members) for s, members in splits.items()},
      'classes': {column: {'names': list(names), 'counts': {s: count(arrays[f'{s}/{column}'], len(names))
                                                            for s in splits}} for column, names in classes.items()},
      'sizes': _spread([row.size for row in rows if row.size]),
      'captions_per_example': _spread([(len(row.texts['captions']),) for row in rows if 'captions' in row.texts]),
      'rewritten': most_common(row.note for row in rows if row.note),
      'dropped_fields': most_common((name for row in rows for name in row.dropped_fields), _MAX_DROPPED_FIELDS),
      'warnings': warnings,
      'skipped': {reason: {'count': len(locations), 'first': locations[:_MAX_LOCATIONS]}
                  for reason, locations in sorted(skipped.items(), key=lambda item: -len(item[1]))}}


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
    lines.append(f'warning: {n} groups are in several splits; evaluation may see training examples')
  for reason, rows in summary['skipped'].items():
    more = ', …' if rows['count'] > len(rows['first']) else ''
    lines.append(f'skipped, {reason}: {rows["count"]} ({", ".join(rows["first"])}{more})')
  return '\n'.join(lines)
