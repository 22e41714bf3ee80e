"""Statistics of prepared data, for prepared.json and for the terminal."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from uni_moe_jax.data.prepare.merge import Merged
from uni_moe_jax.data.prepare.scan import SPLITS

_MAX_DROPPED_FIELDS = 20  # by name
_QUANTILES = {'min': 0, 'median': 0.5, '97 %': 0.97, 'max': 1}


def summarize(merged: Merged, test_fraction: float) -> dict[str, Any]:
  """Statistics of splits, classes and skipped rows."""
  splits, warnings = merged.split_sizes, []
  if 'train' not in splits:
    warnings.append('there is no split train; this data can only be evaluated')
  elif test_fraction and 'test' not in splits and not merged.names_splits:
    warnings.append(f'the split test is empty with --test_fraction={test_fraction}: too few groups; raise it, or name '
                    'the split of each row')
  elif test_fraction and merged.names_splits and len(splits) == 1:
    warnings.append('every row is in the split train, by a field or a file or folder name, so nothing is held out; to '
                    'evaluate, rename that file or folder (train.jsonl to data.jsonl), or name other splits')
  if n := merged.rows_of_one_image:
    warnings.append(f'{n} rows with captions repeat the image or video of an earlier row: retrieval counts the '
                    "captions of the other rows as wrong, also in training. Give one row per file, with a list "
                    "'captions'")
  count = lambda column, split: [merged.class_counts[column][name, SPLITS.index(split)]
                                 for name in merged.classes[column]]
  return {
      'groups_in_several_splits': merged.groups_in_several_splits, 'columns': merged.columns, 'splits': splits,
      'classes': {column: {'names': list(names), 'counts': {s: count(column, s) for s in splits}}
                  for column, names in merged.classes.items()},
      'captioned': merged.captioned, 'sizes': _spread(merged.sizes),
      'captions_per_example': _spread(merged.num_captions), 'text_bytes': _spread(merged.text_bytes),
      'rewritten': dict(merged.rewritten.most_common()),
      'dropped_fields': dict(merged.dropped_fields.most_common(_MAX_DROPPED_FIELDS)), 'warnings': warnings,
      'skipped': {reason: {'count': n, 'first': locations} for reason, (n, locations) in merged.skipped.items()}}


def _spread(counts: Mapping[tuple[int, ...], int]) -> dict[str, list[int]]:
  """{name of a quantile: each element's} of tuples of equal length, from how often each occurs; {} for none."""
  spreads = []
  for values in zip(*counts):
    order = np.argsort(values)
    ends = np.cumsum(np.array(list(counts.values()))[order])
    ranks = [min(int(share * ends[-1]), ends[-1] - 1) for share in _QUANTILES.values()]
    indices = np.searchsorted(ends, ranks, 'right')
    spreads.append([values[order[i]] for i in indices])
  return dict(zip(_QUANTILES, map(list, zip(*spreads))))


def describe(summary: dict[str, Any]) -> str:
  """A few lines on prepared.json for the terminal."""
  lines = [f'{summary["name"]} {summary["version"]}: ' + ', '.join(f'{s} {n}' for s, n in summary['splits'].items()),
           'columns: ' + ', '.join(f'{column} ({t})' for column, t in summary['columns'].items())]
  for column, classes in summary['classes'].items():
    names = ', '.join(classes['names'][:8]) + (', …' if len(classes['names']) > 8 else '')
    lines.append(f'{column}: {len(classes["names"])} classes: {names}')
  for title, spread in (('size', summary['sizes']), ('captions', summary['captions_per_example']),
                        ('bytes of texts', summary['text_bytes'])):
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
