"""One table of the scores of several runs, from `evaluation.json`, `metrics.jsonl` and `run.json`. Imports no JAX.

A column is a list of runs that differ in their seed alone, and a row a metric of an evaluator, or a cost of training.
"""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from uni_moe_jax.analysis import metric_curves
from uni_moe_jax.eval import headline, metrics
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import read_json

TRAINING = 'training'  # the evaluator of rows that are no scores
_UPPER = 0.975  # quantile at the upper end of a 95 % interval
_LAST = 8  # the last eighth of a run gives its final loss


def tabulate(columns: Mapping[str, Sequence[storage.Path]]) -> list[dict[str, Any]]:
  """Rows of the table, in the order of the evaluations.

  Args:
    columns: name → work directories, one per seed. One that has not been evaluated has no values.

  Returns:
    [{'evaluator', 'metric', 'higher_is_better', 'chance', 'baselines' (of the first run that has them), 'columns':
    {name: {'values' (of the runs), 'mean', 'spread' (standard deviation over runs; None for one), 'error' (of the test
    examples, the mean of the runs; None if unknown), 'interval' (half the width of the 95 % interval; None if both are
    unknown)}}}]. Values that are not finite are left out.

  The interval adds the squares of two halves: that of the error of the examples, which all runs share, and Student's t
  of the spread over runs.
  """
  rows: dict[tuple[str, str], dict[str, Any]] = {}
  measured = collections.defaultdict(lambda: collections.defaultdict(list))
  for column, folders in columns.items():
    for folder in folders:
      for row in (*read_json(folder / 'evaluation.json', []), *_training_rows(folder)):
        if math.isfinite(row['value']):
          key = row['evaluator'], row['metric']
          rows.setdefault(key, row)
          measured[key][column].append(row)
  ordered = sorted(rows, key=lambda key: key[0] == TRAINING)  # stable: costs come last
  return [{**{k: rows[key].get(k) for k in ('evaluator', 'metric', 'higher_is_better', 'chance')},
           'baselines': rows[key].get('baselines', {}),
           'columns': {column: summarize(of_column) for column, of_column in measured[key].items()}}
          for key in ordered]


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """A metric over runs: see `tabulate`."""
  values = [row['value'] for row in rows]
  errors = [row['standard_error'] for row in rows if row.get('standard_error') is not None]
  spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
  error = float(np.mean(errors)) if errors else None
  halves = [] if error is None else [stats.norm.ppf(_UPPER) * error]
  halves += [] if spread is None else [stats.t.ppf(_UPPER, len(values) - 1) * spread / math.sqrt(len(values))]
  return {'values': values, 'mean': float(np.mean(values)), 'spread': spread, 'error': error,
          'interval': math.hypot(*halves) if halves else None}


def _training_rows(folder: storage.Path) -> list[dict[str, Any]]:
  """What a run cost and how far it was trained."""
  file = folder / 'metrics.jsonl'
  curves, _ = metric_curves.read(file.read_text() if file.exists() else '')
  costs = {}
  if 'loss/total' in curves:
    steps, losses = curves['loss/total']
    costs |= {'steps': steps[-1], 'final loss': float(np.mean(losses[-max(1, len(losses) // _LAST):]))}
  if 'steps_per_second' in curves:
    costs['seconds per step'] = 1 / float(np.median(curves['steps_per_second'][1]))
  parameters = read_json(folder / 'run.json', {}).get('parameters') or {}
  costs |= {f'{name} parameters': parameters[name] for name in ('total', 'active') if name in parameters}
  return [{'evaluator': TRAINING, 'metric': name, 'value': value, 'higher_is_better': False}
          for name, value in costs.items()]


def markdown(table: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
  """The table with a row per metric, and what ± is; a blank where nothing was measured."""
  def line(cells: Sequence[str]) -> str:
    return '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'

  def score(row: Mapping[str, Any], column: str) -> str:
    if not (s := row['columns'].get(column)):
      return ''
    if row['metric'] == 'steps' or row['metric'].endswith('parameters'):
      return f'{s["mean"]:,.0f}'
    half = '' if s['interval'] is None else f' ± {metrics.format_error(s["interval"])}'
    return metrics.format_number(s['mean']) + half

  lines = [line(['evaluator', 'metric', 'strongest baseline', *columns]), line(['---'] * (3 + len(columns)))]
  for row in table:
    baseline = headline.strongest_baseline(row) if row['baselines'] else None
    better = '' if row['higher_is_better'] or row['evaluator'] == TRAINING else ' (lower is better)'
    lines.append(line([
        row['evaluator'], row['metric'] + better,
        f'{metrics.format_number(baseline[1])} {baseline[0]}' if baseline else '', *(score(row, c) for c in columns)]))
  runs = {c: max((len(row['columns'][c]['values']) for row in table if c in row['columns']), default=0)
          for c in columns}
  return '\n'.join([
      *lines, '', f'Runs: {", ".join(f"{c} {n}" for c, n in runs.items())}. ± 95 %: the error of the test examples '
      "and, with several runs, their spread (Student's t); one run does not show how runs differ."])
