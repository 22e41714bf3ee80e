"""What came of a study: scores over seeds in one table, what each regime trained, and whether it kept its promises."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from uni_moe_jax.analysis.study_cells import EVALUATION, UNTUNED, Cell
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data import sources
from uni_moe_jax.data.files import file_dataset_examples
from uni_moe_jax.data.files.file_dataset import FileDataset
from uni_moe_jax.data.pipeline import examples
from uni_moe_jax.eval import metrics
from uni_moe_jax.train import optimizer, warm_start, workdir
from uni_moe_jax.train.checkpoint import Checkpoints

RESULTS, TABLE = 'study.json', 'study.md'
PROMPT, PROMPT_SHARE = 'prompt', 0.02  # prompt tuning trains less than this share of the parameters
# Of captions: whole names are seldom right after few examples, whatever the regime.
_JUDGED = 'word F1'
_TAIL = 0.975  # of a distribution below the upper end of an interval of 95 %


def facts(cell: Cell, run: str, folder: str) -> dict[str, Any]:
  """What a cell's training was.

  Returns:
    {'steps', 'examples' (distinct ones it may read), 'drawn' (steps · batch), 'parameters', 'trained' (of them), 'share',
    'identical': whether everything frozen is bit for bit that of the run, 'moved': whether something trained is not}.
  """
  if not cell.trains:
    return {'steps': 0, 'examples': 0, 'drawn': 0, 'trained': 0, 'share': 0.0}
  where = pathlib.Path(folder) / cell.folder
  config = workdir.load_config(where)
  with Checkpoints(where, max_to_keep=None) as checkpoints:
    steps, after = checkpoints.latest(), checkpoints.restore_params()
  kept = warm_start.compare_params(_start(run), after, optimizer.frozen_paths(optimizer.match_param_groups(after, config.optim.param_groups)))
  task = make_plan(config).tasks[0]
  records = sources.load(task.source, config.data.dir, task.split)
  example_ids = file_dataset_examples.example_ids if isinstance(records, FileDataset) else examples.example_ids
  return {'steps': steps, 'examples': len(example_ids(records, task, config.seed)), 'drawn': steps * task.batch_size, **kept,
          'share': kept['trained'] / kept['parameters']}


@functools.lru_cache(maxsize=1)
def _start(run: str) -> Any:
  with Checkpoints(run, max_to_keep=None) as checkpoints:
    return checkpoints.restore_params()


def collect(every: Sequence[Cell], run: str, folder: str) -> dict[str, Any]:
  """The study's results: {'run', 'cells': [{task, regime, seed, facts…}], 'scores': see `summary`}."""
  rows = []
  for cell in every:
    for row in json.loads((pathlib.Path(folder) / cell.folder / EVALUATION).read_text()):
      rows.append({**dataclasses.asdict(cell), **row})
  return {'run': run, 'cells': [{**dataclasses.asdict(c), **facts(c, run, folder)} for c in every], 'scores': summary(rows)}


def summary(rows: Sequence[dict[str, Any]], by: str = 'regime') -> list[dict[str, Any]]:
  """Scores over seeds.

  The same test examples are asked with every seed, so that their error does not shrink with the number n of seeds. The interval
  is ± sqrt((t · spread)² / n + (1.96 · error)²), t being Student's of n - 1 degrees of freedom (4.30 of three seeds).

  Args:
    rows: rows of evaluation.json, with the task, `by` and seed of their cell.
    by: what is compared.

  Returns:
    One row per task, evaluator, metric and `by`: its mean, 'spread' (standard deviation over seeds, None of one), 'error'
    (of the test examples, None where the metric has none), 'interval' (None where nothing is known), 'seeds', 'chance', 'floors',
    'higher_is_better'.
  """
  groups: dict[tuple, list[dict]] = {}
  for row in rows:
    groups.setdefault((row['task'], row['evaluator'], row['metric'], row[by]), []).append(row)
  found = []
  for (task, evaluator, metric, which), members in groups.items():
    values = [m['value'] for m in members]
    errors = [m['standard_error'] for m in members if m['standard_error'] is not None]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    error = float(np.mean(errors)) if errors else None
    known = [] if error is None else [stats.norm.ppf(_TAIL) * error]
    if spread is not None:
      known.append(stats.t.ppf(_TAIL, len(values) - 1) * spread / math.sqrt(len(values)))
    found.append({
        'task': task, 'evaluator': evaluator, 'metric': metric, by: which, 'mean': float(np.mean(values)),
        'spread': spread, 'error': error, 'interval': math.hypot(*known) if known else None, 'seeds': len(values),
        'chance': members[0]['chance'], 'floors': members[0]['floors'], 'higher_is_better': metrics.higher_is_better(members[0])})
  return found


def breaches(results: dict[str, Any]) -> list[str]:
  """Sentences for what a regime promises and a cell does not keep."""
  found = []
  for cell in results['cells']:
    name = Cell(cell['task'], cell['regime'], cell['seed']).folder
    if cell['steps'] and not cell['identical']:
      found.append(f'{name}: a frozen parameter differs from that of {results["run"]}.')
    if cell['steps'] and not cell['moved']:
      found.append(f'{name}: nothing was trained.')
    if cell['regime'] == PROMPT and cell['share'] >= PROMPT_SHARE:
      found.append(f'{name}: {cell["share"]:.2%} of the parameters train; prompt tuning trains less than {PROMPT_SHARE:.0%}.')
  return found + _without_gain(results['scores'])


def _without_gain(scores: Sequence[dict[str, Any]]) -> list[str]:
  """Prompt tuning must gain over the untuned run: sentences for evaluators where it does not, by `_JUDGED` or their first metric."""
  asked: dict[tuple[str, str], dict[str, dict[str, dict]]] = {}
  for s in scores:
    asked.setdefault((s['task'], s['evaluator']), {}).setdefault(s['metric'], {})[s['regime']] = s
  found = []
  for (task, evaluator), metrics_of in asked.items():
    metric, by = (_JUDGED, metrics_of[_JUDGED]) if _JUDGED in metrics_of else next(iter(metrics_of.items()))
    if {PROMPT, UNTUNED} <= by.keys():
      tuned, before = by[PROMPT]['mean'], by[UNTUNED]['mean']
      if not (tuned > before if by[PROMPT]['higher_is_better'] else tuned < before):
        found.append(f'{task}, {evaluator}: prompt tuning has {metric} {tuned:.3f}, no gain over {before:.3f} untuned.')
  return found


def scores_table(scores: Sequence[dict[str, Any]], names: Sequence[str], by: str = 'regime') -> list[str]:
  """Lines of Markdown: a row per evaluator and metric, beside chance and floors, a column per name of what is compared."""
  lines = ['| evaluator | metric | chance | floors | ' + ' | '.join(names) + ' |', '| --- ' * (4 + len(names)) + '|']
  by_name: dict[tuple[str, str], dict[str, dict]] = {}
  for s in scores:
    by_name.setdefault((s['evaluator'], s['metric']), {})[s[by]] = s
  for (evaluator, metric), row in by_name.items():
    first = next(iter(row.values()))
    floors = ', '.join(f'{name} {value:.3f}' for name, value in first['floors'].items())
    chance = '' if first['chance'] is None else f'{first["chance"]:.4g}'
    lines.append(f'| {evaluator} | {metric} | {chance} | {floors} | ' + ' | '.join(_score(row.get(n)) for n in names) + ' |')
  return lines


def table(results: dict[str, Any]) -> str:
  """Markdown: the scores, a regime a column, and what each regime trained."""
  lines = scores_table(results['scores'], list(dict.fromkeys(c['regime'] for c in results['cells'])))
  lines += ['', 'Mean over seeds ± 95 %: spread of the seeds, by Student’s t, and error of the test examples, unknown of BLEU-4. Floors '
            'are fitted on all training examples.', '',
            '| task | regime | seeds | steps | examples | drawn | trained | share | frozen rest |', '| --- ' * 9 + '|']
  groups: dict[tuple[str, str], list[dict]] = {}
  for c in results['cells']:
    groups.setdefault((c['task'], c['regime']), []).append(c)
  for (task, regime), members in groups.items():
    c = members[0]
    rest = 'all of it' if not c['steps'] else '—' if c['trained'] == c['parameters'] else (
        'identical' if all(m['identical'] for m in members) else 'CHANGED')
    lines.append(f'| {task} | {regime} | {len(members)} | {c["steps"]} | {c["examples"]} | {c["drawn"]} | {c["trained"]:,} | '
                 f'{c["share"]:.2%} | {rest} |')
  return '\n'.join(lines)


def _score(s: dict[str, Any] | None) -> str:
  if s is None:
    return ''
  return f'{s["mean"]:.3f}' + ('' if s['interval'] is None else f' ± {s["interval"]:.3f}')
