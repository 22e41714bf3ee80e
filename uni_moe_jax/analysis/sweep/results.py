"""Results of a sweep: results.json, results.md and figures in `results` in its work directory.

Failed cells are reported with what they left. Nothing in the folder names a machine, so that it can be published.
"""

import collections
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from uni_moe_jax.analysis.sweep import (
  account,
  adaptation,
  grid,
  markdown,
  router_figures,
  router_report,
  routers,
  runner,
)
from uni_moe_jax.analysis.sweep.grid import Cell
from uni_moe_jax.analysis.sweep.variants import VARIANTS
from uni_moe_jax.eval import example_scores, suite
from uni_moe_jax.io import files, storage
from uni_moe_jax.train import workdir
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.exit_codes import FINISHED

FOLDER, RESULTS, TABLE = 'results', 'results.json', 'results.md'
_TITLES = {grid.ROUTERS: 'Router ablation', grid.ADAPTATION: 'Adaptation study'}
_FORMAT = 3  # of results.json; others cannot be drawn again
_UPPER = 0.975  # quantile at the upper end of a 95 % interval


def collect(sweep: str, cells: Sequence[Cell], source: str | Sequence[str], command: str) -> dict[str, Any]:
  """Reads the work directories of all cells. source: the config of a router sweep, or the runs that are adapted.

  Returns:
    {'format', 'sweep', 'command', 'sources', 'python', 'cores', 'config' (of the first cell that has one), 'cells':
    [{'name', 'variant', 'run', 'task', 'seed', 'status', 'exit_codes' and 'seconds' (by stage, over all attempts),
    'commands' (by stage), 'commit', 'earlier_commits', 'data' (its fingerprint), 'changed' (fields that differ from
    'config'), 'evaluation' (rows of evaluation.json), and those of `routers.measure` or `adaptation.measure`}],
    'scores': see `summarize`, 'account' of a router sweep: see `account.compare`, 'accounts' of an adaptation study:
    see `adaptation.compare`, 'errors': sentences}. Unknown values are None.
  """
  sources = [source] if isinstance(source, str) else list(source)
  if sweep == grid.ROUTERS:
    cells = sorted(cells, key=lambda c: (list(VARIANTS).index(c.variant), c.seed))
  configs = [files.read_json(c.folder / workdir.CONFIG_FILE, {}) for c in cells]
  configured, first = next(((c.folder, x) for c, x in zip(cells, configs, strict=True) if x), (None, {}))
  records, lost, typed = [], [], {str(storage.absolute(s)): s for s in sources}
  for cell, config in zip(cells, configs, strict=True):
    log, run = runner.read_log(cell.folder), files.read_json(cell.folder / workdir.RUN_FILE, {})
    paths = {f'{cell.folder.parent}/': '', **typed}
    changed = [_named(d, paths) for d in workdir.differences(first['config'], config['config'])] if config else None
    rows = files.read_json(cell.folder / suite.EVALUATION_FILE, [])
    lost += [f'{cell.folder.name}: {r["evaluator"]} has {r["metric"]} {r["value"]}, which is left out.' for r in rows
             if not math.isfinite(r['value'])]
    records.append({
        'name': cell.folder.name, 'variant': cell.variant, 'run': cell.run, 'task': cell.task, 'seed': cell.seed,
        **_history(cell, log, paths),
        'commit': run.get('commit'), 'earlier_commits': run.get('earlier_commits', []), 'data': config.get('data'),
        'changed': changed,
        'evaluation': [r for r in rows if math.isfinite(r['value'])],
        **(routers.measure(cell.folder, log) if sweep == grid.ROUTERS else adaptation.measure(cell.folder, log))})
  results = {
      'format': _FORMAT, 'sweep': sweep, 'command': command, 'sources': sources, 'python': platform.python_version(),
      'cores': os.cpu_count(), 'config': workdir.provenance(configured, 0)['config'] if configured else None,
      'cells': records,
      'scores': summarize([{**record, **row} for record in records for row in record['evaluation']]),
      'errors': [f'{r["name"]}: {r["status"]}.' for r in records if r['status'] != 'finished'] + lost}
  if sweep == grid.ROUTERS:
    compared = account.compare(records, [example_scores.read(c.folder) for c in cells])
    results['errors'] += routers.find_errors(cells, records, configs) + compared.pop('errors')
    return {**results, 'account': compared}
  results['errors'] += adaptation.find_errors(records, configs)
  for task in dict.fromkeys(c.task for c in cells):
    results['errors'] += routers.evaluation_errors([c for c in cells if c.task == task])
  compared = adaptation.compare(records, [example_scores.read(c.folder) for c in cells])
  results['errors'] += [sentence for of_recipe in compared.values() for sentence in of_recipe.pop('errors')]
  return {**results, 'accounts': compared}


def _history(cell: Cell, log: Sequence[Mapping[str, Any]], paths: Mapping[str, str]) -> dict[str, Any]:
  """{'status', 'exit_codes', 'seconds', 'commands'} of a cell. paths: see `_named`."""
  attempts = {stage: [a for a in log if a['stage'] == stage] for stage in dict.fromkeys(a['stage'] for a in log)}
  codes = {stage: [a['exit_code'] for a in of_stage] for stage, of_stage in attempts.items()}
  seconds = {stage: round(sum(a['seconds'] for a in of_stage), 1) for stage, of_stage in attempts.items()}
  failed = [f'{stage} failed with exit code {c[-1]}' for stage, c in codes.items() if FINISHED not in c]
  # Of a cell that another sweep trains right now, what comes before training may have finished.
  is_trained = grid.TRAIN in codes or cell.variant == grid.ZERO_SHOT
  status = '; '.join(failed) or ('not started' if not log else 'finished' if is_trained else 'not trained yet')
  commands = {stage: _named(of_stage[-1]['command'], paths) for stage, of_stage in attempts.items()}
  return {'status': status, 'exit_codes': codes, 'seconds': seconds, 'commands': commands}


def _named(text: str, paths: Mapping[str, str]) -> str:
  """A text without the paths of this machine. paths: these, and what replaces them."""
  for path, replacement in paths.items():
    text = text.replace(path, replacement)
  return text


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Scores over seeds, from rows of evaluation.json with the task and variant of their cell.

  All seeds are evaluated on the same test examples, so that the error of the examples does not shrink with the number
  n of seeds. The interval is ± sqrt((t · spread)² / n + (1.96 · error)²) with Student's t of n - 1 degrees of freedom.

  Returns:
    One row per task, evaluator, metric, variant and group of runs: 'mean', 'spread' (standard deviation over seeds,
    None for one seed), 'error' (of the test examples, None if the metric has none), 'interval' (None if nothing is
    known), 'seeds' (how many), 'chance', 'baselines', 'baseline_counts', 'higher_is_better'.
  """
  keys, groups = ('task', 'evaluator', 'metric', 'variant', 'run'), collections.defaultdict(list)
  for row in rows:
    groups[tuple(row[k] for k in keys)].append(row)
  scores = []
  for members in groups.values():
    values, first = [m['value'] for m in members], members[0]
    errors = [m['standard_error'] for m in members if m['standard_error'] is not None]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    error = float(np.mean(errors)) if errors else None
    known = [] if error is None else [stats.norm.ppf(_UPPER) * error]
    known += [] if spread is None else [stats.t.ppf(_UPPER, len(values) - 1) * spread / math.sqrt(len(values))]
    scores.append({
        **{k: first[k] for k in keys}, 'mean': float(np.mean(values)), 'spread': spread, 'error': error,
        'interval': math.hypot(*known) if known else None, 'seeds': len(values), 'chance': first['chance'],
        'baselines': first['baselines'], 'baseline_counts': first.get('baseline_counts', {}),  # not in older rows
        'higher_is_better': first['higher_is_better']})
  return scores


def write(results: Mapping[str, Any], out: storage.Path) -> str:
  """Writes results.json, results.md and figures into a folder; returns the Markdown.

  Numbers have six digits, and the file has no indentation, which would be most of it.

  Raises:
    ValueError: a number is not finite.
  """
  storage.make_folder(out)
  short = json.loads(json.dumps(results, allow_nan=False), parse_float=lambda x: float(f'{float(x):.6g}'))
  storage.write_bytes(out / RESULTS, json.dumps(short).encode())
  return redraw(out / RESULTS)


def redraw(path: storage.Path) -> str:
  """Writes results.md and figures beside a results.json, without any work directory; returns the Markdown.

  Raises:
    UsageError: there is no such file, it is another one, or an older version wrote it.
  """
  try:
    results, out = files.read_json(path), path.parent
  except ValueError:  # not JSON, not UTF-8
    results = ()
  if results is None:
    raise UsageError(f'--redraw={path}: the file does not exist; give the results.json of a sweep.')
  if not isinstance(results, dict) or 'sweep' not in results:
    raise UsageError(f'--redraw={path}: it is not the results.json of a sweep; give that file.')
  if results.get('format') != _FORMAT:
    raise UsageError(f'--redraw={path}: an older version wrote it; draw it with that version, or rerun its command.')
  captions = router_figures.draw(results, out) if results['sweep'] == grid.ROUTERS else {}
  report = '\n'.join(_report(results, captions)).rstrip()
  (out / TABLE).write_text(report + '\n')
  return report


def _report(results: Mapping[str, Any], captions: Mapping[str, str]) -> list[str]:
  cells, is_routers = results['cells'], results['sweep'] == grid.ROUTERS
  first = (router_report.sections(results, captions) if is_routers else
           adaptation.sections(results))
  seeds = sorted({c['seed'] for c in cells})
  trained_by = (x for c in cells for x in (*c.get('earlier_commits', ()), c['commit']) if x)
  commits = list(dict.fromkeys(x[:12] for x in trained_by)) or ['unknown']
  without = f' (without: {x}) ' if (x := router_report.without_error(results['scores'])) else ' '
  source = f'{"config" if is_routers else "run"} {", ".join(f"`{s}`" for s in results["sources"])}'
  return [
      f'# {_TITLES[results["sweep"]]}', '',
      f'`{results["command"]}`; {source}, seed{"s"[:len(seeds) - 1]} {", ".join(map(str, seeds))}, commit '
      f'{", ".join(commits)}, Python {results["python"]}, {results["cores"]} cores.', '',
      *(f'* {e}' for e in results['errors']), *([''] if results['errors'] else []),
      *first, '## All metrics' if is_routers else '## Evaluation', '',
      *score_table(results['scores'], list(dict.fromkeys(map(adaptation.label, cells)))), '',
      f'± 95 %: the error of the test examples{without}' + (
          "and the spread of the seeds (Student's t)." if len(seeds) > 1 else
          'alone: one seed does not show how runs differ.') + f' {router_report.BASELINES}']


def score_table(scores: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
  """Lines of Markdown: a row per evaluator and metric with chance and baselines, a column per `adaptation.label`."""
  by_metric = collections.defaultdict(dict)
  for s in scores:
    by_metric[s['evaluator'], s['metric']][adaptation.label(s)] = s
  rows = []
  for key, by_variant in by_metric.items():
    first = next(iter(by_variant.values()))
    rows.append([
        *key, None if first['chance'] is None else f'{first["chance"]:.4g}',
        ', '.join(f'{name} {value:.3f}{router_report.part(first, name)}' for name, value in first['baselines'].items()),
        *(s and f'{s["mean"]:.3f}' + ('' if s['interval'] is None else f' ± {s["interval"]:.3f}')
          for s in map(by_variant.get, columns))])
  return markdown.table(['evaluator', 'metric', 'chance', 'baselines', *columns], rows)
