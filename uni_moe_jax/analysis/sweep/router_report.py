"""The page about a router sweep, as lines of Markdown, from results.json alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.analysis import expert_usage_file, interference_file
from uni_moe_jax.analysis.sweep import markdown, routers
from uni_moe_jax.analysis.sweep.account import LOSS, TIE, WIN
from uni_moe_jax.analysis.sweep.grid import TRAIN
from uni_moe_jax.eval import headline, metrics
from uni_moe_jax.tasks.router_names import DENSE

BASELINES = ('Baselines are fitted on the training examples, or on a sample of them where there are many '
             '(docs/guides/data.md has the numbers).')
_MAX_PAIRS = 8  # of tasks that hurt each other, per checkpoint
Cells = Sequence[Mapping[str, Any]]


def sections(results: Mapping[str, Any], captions: Mapping[str, str]) -> list[str]:
  """The page after its heading. captions: of the figures beside it, see `router_figures.draw`."""
  cells = results['cells']
  variants = list(dict.fromkeys(c['variant'] for c in cells))
  lines = ['## Scores', '', *_scores(results, variants), '', '## Against dense', '', *paired(results['account']), '']
  if measured := list(dict.fromkeys(c['variant'] for c in cells if any(c['interference'].values()))):
    lines += ['## Interference', '', *_interference(cells, measured), '']
  if any(c['experts'] for c in cells):
    lines += ['## Experts', '', *_experts(cells, variants), '']
  lines += ['## Runs', '', *_runs(cells), '']
  if captions:
    lines += ['## Figures', '', *(line for name, shown in captions.items() for line in (f'![{shown}]({name})', ''))]
  return lines


def _scores(results: Mapping[str, Any], variants: Sequence[str]) -> list[str]:
  """One row per variant: the main metric of every evaluator, the average and the cost."""
  tasks, summary = results['account']['tasks'], {v['variant']: v for v in results['account']['variants']}
  by_key = {(s['evaluator'], s['metric'], s['variant']): s for s in results['scores']}

  def score(task: Mapping[str, Any], variant: str) -> str | None:
    s = by_key.get((task['evaluator'], task['metric'], variant))
    return s and metrics.format_number(s['mean']) + (
        '' if s['interval'] is None else f' ± {metrics.format_error(s["interval"])}')

  def reference(task: Mapping[str, Any]) -> str | None:
    row = next(s for s in results['scores'] if (s['evaluator'], s['metric']) == (task['evaluator'], task['metric']))
    best = headline.strongest_baseline(row)
    return best and f'{metrics.format_number(best[1])} {best[0]}{part(row, best[0])}'

  count = lambda n: None if n is None else f'{n:,}'
  rows = [('strongest baseline', *map(reference, tasks), *[None] * 6)]
  for variant in variants:
    v = summary[variant]
    rows.append((variant, *(score(t, variant) for t in tasks), _bounds(v, 'average', 'average_low', 'average_high'),
                 v['training_loss'], _seconds(v['seconds_per_step']), count(v['total']), count(v['active']),
                 str(v['seeds'])))
  lower = {s['metric'] for s in results['scores'] if not s['higher_is_better']}
  columns = [f'{t["evaluator"]}, {t["metric"]}' + (' (lower is better)' if t['metric'] in lower else '') for t in tasks]
  references = '; '.join(f'{t["evaluator"]}: {t["reference"]}' for t in tasks if t['reference'] is not None)
  without = f' (without: {x})' if (x := without_error(main_scores(results))) else ''
  return [
      *markdown.table(
          ['variant', *columns, 'average', 'training loss', 's / step', 'parameters', 'active', 'seeds'], rows), '',
      f"± 95 %: the error of the test examples{without} and, with several seeds, the spread of seeds (Student's t). "
      'average: the mean of (score - reference) / (best - reference), with its interval; best is the best variant, the '
      'reference the strongest of chance and baselines below all variants, or 0, and perplexity is taken in logarithms '
      f'({references}). Training loss: the weighted sum of all tasks, in the last eighth of the run. '
      f'{BASELINES}',
      *_merged(results['cells'])]


def main_scores(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Scores of the main metric of every evaluator."""
  keys = {(t['evaluator'], t['metric']) for t in results['account']['tasks']}
  return [s for s in results['scores'] if (s['evaluator'], s['metric']) in keys]


def without_error(scores: Iterable[Mapping[str, Any]]) -> str:
  """Names of the metrics without an error of the test examples: their intervals are of seeds alone."""
  return ', '.join(dict.fromkeys(s['metric'] for s in scores if s['error'] is None))


def part(score: Mapping[str, Any], baseline: str) -> str:
  """' (on 5,000 examples)' of a baseline that answers a part of the evaluated examples, else ''."""
  count = score.get('baseline_counts', {}).get(baseline)  # absent in the results of earlier versions
  return '' if count is None else f' (on {count:,} examples)'


def _merged(cells: Cells) -> list[str]:
  """How far the scores of merged models are from those of the runs."""
  merged = [(difference, c['name'], c['merged']['metric']) for c in cells
            if c.get('merged') and (difference := c['merged']['largest_difference']) is not None]
  if not merged:
    return []
  difference, name, metric = max(merged)
  return ['', f'With experts merged permanently, as they are exported, {len(merged)} of the models were evaluated '
          f'again: the largest |difference| / max(1, |score|) of all metrics is {difference:.1g} ({name}, {metric}).']


def paired(account_of_variants: Mapping[str, Any]) -> list[str]:
  """Wins, ties and losses of every variant, then its gain in every evaluator."""
  summary = [v for v in account_of_variants['variants'] if v['variant'] != DENSE]
  pairs = {(p['variant'], p['evaluator']): p for p in account_of_variants['paired']}
  if not pairs:
    return ['Nothing to compare: dense and another variant must be evaluated with the same seed.']
  count = lambda v, end: ' / '.join(str(v[outcome + end]) for outcome in (WIN, TIE, LOSS))
  marks = {WIN: ' ▲', TIE: '', LOSS: ' ▼'}

  def gain(p: Mapping[str, Any] | None) -> str | None:
    return p and f'{_bounds(p, "gain", digits=3)}, p {_p(p["p"])}{marks[p["outcome"]]}' + (
        '' if p['outcome_holm'] == TIE else ' *')

  losses = any(v['training_loss_p'] is not None for v in summary)  # not of adapted runs
  below = lambda v: (_bounds(v, *(f'training_loss_{k}' for k in ('gain', 'low', 'high'))), _p(v['training_loss_p']))
  names = [v['variant'] for v in summary]
  return [
      'Gain: the mean difference from dense, paired by seed and example; above 0 is better, also for perplexity, which '
      "is compared in logarithms. Interval and two-sided p: Student's t, by the variances of seeds and examples; one "
      'seed shows nothing about how runs differ. A win (▲) or loss (▼) has p < 0.05, all else is a tie; with *, also '
      "after Holm's correction over the evaluators of the variant.", '',
      *markdown.table(
          ['variant', 'win / tie / loss', 'after Holm', 'gain of the average', 'p',
           *(['training loss below dense', 'p'] if losses else [])],
          [(v['variant'], count(v, ''), count(v, '_holm'), _bounds(v, 'gain', digits=3), _p(v['p']),
            *(below(v) if losses else ())) for v in summary]), '',
      *markdown.table(
          ['evaluator', *names],
          [(f'{t["evaluator"]}, {t["metric"]}', *(gain(pairs.get((name, t['evaluator']))) for name in names))
           for t in account_of_variants['tasks']])]


def _interference(cells: Cells, variants: Sequence[str]) -> list[str]:
  """Means over pairs of tasks, and the pairs that are certainly below 0 in dense."""
  means = {v: routers.mean_interference(cells, v) for v in variants}
  checkpoints = routers.checkpoints(cells)
  lines = ['I(i, j): how much a short step on task j lowers the loss of task i, relative to a step on i itself. Over '
           'pairs of different tasks, in rows whose own step has a certain effect, with 95 % bootstrap intervals over '
           'batches, means over seeds:', '']
  for key, text in (('mean_of_pairs', 'mean of pairs'), ('negative_share', 'share of pairs below 0')):
    lines += [*markdown.table([f'{text} at', *checkpoints], [
        (v, *((m := means[v].get(c)) and _bounds(m[key], 'value') for c in checkpoints)) for v in variants]), '']
  rows = [(c, *row) for c in checkpoints for row in _conflicts(cells, variants, c)]
  if not rows:
    return [*lines, 'No pair of tasks is certainly below 0 in most seeds of dense.']
  return [*lines, 'The pairs that are certainly below 0, in a row with a base, in most seeds of dense, and the same '
          'pairs in other variants: the mean over seeds with a base, and in how many seeds the pair is certainly below '
          '0.', '', *markdown.table(['at', 'a step on', 'for', *variants], rows)]


def _conflicts(cells: Cells, variants: Sequence[str], checkpoint: str) -> list[tuple[Any, ...]]:
  """Rows of the pairs of tasks that hurt each other in dense: both names, then a text per variant."""
  measured = {v: [m for c in cells if c['variant'] == v and (m := c['interference'].get(checkpoint))] for v in variants}
  if not measured.get(DENSE):
    return []
  tasks, rows = measured[DENSE][0]['tasks'], []
  # A run of a config whose tasks were changed, which `routers.find_errors` reports, has other pairs.
  measured = {v: [m for m in of_variant if m['tasks'] == tasks] for v, of_variant in measured.items()}

  def read(variant: str, i: int, j: int) -> tuple[float | None, int, int]:
    """(mean, seeds certainly below 0, seeds) of a pair."""
    based = [m['subset']['ratio_of_means'] for m in measured[variant] if interference_file.has_base(m['subset'])[i]]
    values = [r['value'][i][j] for r in based if r['value'][i][j] is not None]
    below = sum(r['high'][i][j] is not None and r['high'][i][j] < 0 for r in based)
    return float(np.mean(values)) if values else None, below, len(measured[variant])

  for i in range(len(tasks)):
    for j in range(len(tasks)):
      value, below, number = read(DENSE, i, j)
      if i != j and value is not None and below > number / 2:
        texts = (None if x is None else f'{x:.2f} ({n}/{total})' for x, n, total in (read(v, i, j) for v in variants))
        rows.append((value, tasks[j], tasks[i], *texts))
  return [row[1:] for row in sorted(rows)[:_MAX_PAIRS]]


def _experts(cells: Cells, variants: Sequence[str]) -> list[str]:
  """Means over seeds of the effective number of experts and of the overlap of tasks."""
  rows, sublayers = [], list(dict.fromkeys(s for c in cells if c['experts'] for s in c['experts']['sublayers']))
  for variant in variants:
    experts = [c['experts'] for c in cells if c['variant'] == variant and c['experts']]
    if experts:
      effective = np.mean([expert_usage_file.mean_effective(e).mean(-1) for e in experts], 0)
      rows.append((variant, *map(dict(zip(experts[0]['sublayers'], effective.tolist())).get, sublayers),
                   _mean(_overlap(e['mean_task_overlap']) for e in experts)))
  return ['The effective number of experts of a condition (the exponential of the entropy of their shares), and the '
          'overlap of two different tasks (1: the same experts, 0: no common one); means over seeds.', '',
          *markdown.table(['variant', *(f'{s} experts' for s in sublayers), 'overlap'], rows)]


def _overlap(matrix: Sequence[Sequence[float]]) -> float | None:
  """Mean over pairs of different tasks."""
  T = len(matrix)
  return float((np.sum(matrix) - np.trace(matrix)) / (T * (T - 1))) if T > 1 else None


def _runs(cells: Cells) -> list[str]:
  lines = markdown.table(
      ['run', 'steps', 's / step', 'training s', 'total s', 'commit', 'data', 'status'],
      [(c['name'], str(c['steps']), _seconds(c['seconds_per_step']), f'{c["seconds"].get(TRAIN, 0):.0f}',
        f'{sum(c["seconds"].values()):.0f}', *(x and x[:12] for x in (c['commit'], c['data'])), c['status'])
       for c in cells])
  if equal_time := routers.equal_time_steps(cells):
    lines += ['', f'Equal time: `--steps={equal_time}` trains every variant as long as dense.']
  return [*lines, '', 'Config, commands and the values of all figures are in results.json.']


def _seconds(x: float | None) -> str | None:
  """Three significant digits."""
  return None if x is None else f'{x:.0f}' if x >= 99.95 else f'{x:#.3g}'  # which would print 100.


def _mean(values: Iterable[float | None]) -> float | None:
  known = [x for x in values if x is not None]
  return float(np.mean(known)) if known else None


def _bounds(row: Mapping[str, Any], value: str, low: str = 'low', high: str = 'high', digits: int = 2) -> str | None:
  """'0.12 (0.08 … 0.16)'."""
  if row[value] is None:
    return None
  return f'{row[value]:.{digits}f} ({row[low]:.{digits}f} … {row[high]:.{digits}f})'


def _p(p: float | None) -> str | None:
  return None if p is None else '< 0.001' if p < 0.001 else f'{p:.3f}' if p < 0.1 else f'{p:.2f}'
