"""Variants against dense: paired by seed and example, one main metric per evaluator.

Scores are such that higher is better: a mean over examples, and of perplexity its negative logarithm. Of every resample
of the bootstrap the examples are those of all runs, because all are evaluated on the same ones.
"""

import collections
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from uni_moe_jax.eval import headline
from uni_moe_jax.tasks.router_names import DENSE

WIN, TIE, LOSS = 'win', 'tie', 'loss'
RESAMPLES = 10_000
_CHUNK, _DRAWN = 500, 50_000_000  # at most so many resamples, and examples of them, are in memory together
_LEVEL = 0.05
_SEED = 27  # of the bootstrap

Examples = Mapping[tuple[str, str], np.ndarray]  # see `example_scores.read`


def compare(cells: Sequence[Mapping[str, Any]], examples: Sequence[Examples]) -> dict[str, Any]:
  """The account of a router sweep.

  Args:
    cells: of `results.collect`, with 'variant', 'seed', 'evaluation', 'final_loss', 'seconds_per_step' and
      'parameters'.
    examples: of the same cells.

  Returns:
    {'errors': sentences about runs that are left out,
     'tasks': [{'evaluator', 'metric', 'examples' (how many), 'reference' (name), 'reference_score', 'best'}],
     'paired': [{'variant', 'evaluator', 'metric', 'seeds' (how many), 'gain' over dense, 'low', 'high' (95 %), 'p',
       'p_holm', 'outcome', 'outcome_holm'}],
     'variants': [{'variant', 'seeds', WIN, TIE, LOSS and these with '_holm' (numbers of evaluators), 'average' with
       'average_low' and 'average_high', 'gain', 'low', 'high', 'p' of the average over dense, 'training_loss' (final),
       'training_loss_gain', … '_low', '_high', '_p' (below that of dense), 'seconds_per_step', 'total', 'active'
       parameters}]}. Unknown values are None.

  The average is that of (score - reference) / (best - reference) over evaluators: best is the score of the best
  variant, the reference the strongest of chance and baselines that is below all variants, or 0 without one. With a
  stronger one, which some variants miss, the quotient would have no bound. Holm's correction is over the evaluators
  of a variant.
  """
  variants = list(dict.fromkeys(c['variant'] for c in cells))
  errors, tasks, paired, averages = [], [], [], collections.defaultdict(list)
  for row in _main_rows(cells):
    key = row['evaluator'], row['metric']
    columns = {(c['variant'], c['seed']): e[key] for c, e in zip(cells, examples, strict=True)
               if key in e and np.isfinite(e[key]).all()}
    if not columns:
      continue
    _, weights = next(iter(columns.values())).astype(np.float64)
    same = {run: values for run, (values, others) in columns.items() if np.array_equal(others, weights)}
    errors += [f'{v}-{s}: {key[0]} has other examples than in the first run.' for v, s in columns if (v, s) not in same]
    rng = np.random.default_rng([_SEED, zlib.crc32(key[0].encode())])
    by_run = dict(zip(same, resampled_means(np.array([*same.values()], np.float64), weights, rng).T, strict=True))
    seeds = {v: [s for variant, s in by_run if variant == v] for v in variants}
    samples = {v: _over_seeds(np.stack([by_run[v, s] for s in seeds[v]], 1)) for v in variants if seeds[v]}
    task = _task(row, len(weights), [x[0] for x in samples.values()])
    tasks.append(task)
    for v, x in samples.items():
      if task['reference'] is not None:
        scale = task['best'] - task['reference_score']
        averages[v].append((x - task['reference_score']) / scale)
      common = [s for s in seeds[v] if s in seeds.get(DENSE, ())]
      if v != DENSE and common:
        gains = _over_seeds(np.stack([by_run[v, s] - by_run[DENSE, s] for s in common], 1))
        paired.append({'variant': v, 'evaluator': key[0], 'metric': key[1], 'seeds': len(common), **_interval(gains)})
        if task['reference'] is not None:
          averages[v, DENSE].append(gains / scale)
  for v in variants:
    rows = [p for p in paired if p['variant'] == v]
    for p, p_holm in zip(rows, holm([p['p'] for p in rows]), strict=True):
      p |= {'p_holm': p_holm, 'outcome': _outcome(p['gain'], p['p']), 'outcome_holm': _outcome(p['gain'], p_holm)}
  number = sum(task['reference'] is not None for task in tasks)
  mean = lambda key: np.mean(averages[key], 0) if number and len(averages[key]) == number else None
  return {'errors': errors, 'tasks': tasks, 'paired': paired, 'variants': [
      _summary(v, [c for c in cells if c['variant'] == v], [p for p in paired if p['variant'] == v], mean(v),
               mean((v, DENSE))) | _training_losses(v, cells) for v in variants]}


def _main_rows(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  # Of all cells together: one that diverged may lack the main metric of the others.
  return [line.row for line in headline.lines(row for c in cells for row in c['evaluation'])]


def resampled_means(values: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Weighted means [1 + R, M] of values [M, N], weights [N]: of the examples as they are, then of R resamples.

  A resample has the same examples for all M runs.
  """
  N, means = len(weights), [np.average(values, axis=1, weights=weights)[None]]
  chunk = max(1, min(_CHUNK, _DRAWN // N))
  for start in range(0, RESAMPLES, chunk):
    R = min(chunk, RESAMPLES - start)
    drawn = rng.integers(N, size=(R, N)) + N * np.arange(R)[:, None]
    times = np.bincount(drawn.reshape(-1), minlength=R * N).reshape(R, N) * weights
    means.append(times @ values.T / times.sum(1, keepdims=True))
  return np.concatenate(means).round(12)  # so that equal models are equal


def _over_seeds(means: np.ndarray) -> np.ndarray:
  """Means [1 + R, S] over resamples of examples, one column a seed → [1 + R] over resamples of examples and seeds.

  The first is the mean of all seeds. Resampling a few seeds understates their spread, by √((S - 1) / S), and lacks what
  Student's t adds: of three seeds without any true gain, 26 % would have p < 0.05. So deviations are widened by both
  factors, after which it is 5 % (`account_test.py`). All evaluators draw the same seeds.
  """
  R, S = means.shape
  average = means.mean(1)
  if S == 1:
    return average
  drawn = np.random.default_rng([_SEED, S]).integers(S, size=(R, S))
  drawn[0] = np.arange(S)
  wider = stats.t.ppf(1 - _LEVEL / 2, S - 1) / stats.norm.ppf(1 - _LEVEL / 2) * np.sqrt(S / (S - 1))
  return average + wider * (np.take_along_axis(means, drawn, 1).mean(1) - average)


def _interval(samples: np.ndarray, name: str = 'gain') -> dict[str, float]:
  """{name, 'low', 'high', 'p'}: p is two-sided, of a value of 0."""
  value, rest = samples[0], samples[1:]
  low, high = np.quantile(rest, (_LEVEL / 2, 1 - _LEVEL / 2))
  rarer = min((rest <= 0).sum(), (rest >= 0).sum())
  return {name: float(value), 'low': float(low), 'high': float(high),
          'p': float(min(1, 2 * (1 + rarer) / (1 + len(rest))))}


def holm(p: Sequence[float]) -> list[float]:
  """p-values of m tests, corrected by Holm's method: the smallest times m, the next times m - 1, …, never falling."""
  order, adjusted, largest = np.argsort(p), [0.] * len(p), 0.
  for rank, i in enumerate(order):
    largest = max(largest, min(1., p[i] * (len(p) - rank)))
    adjusted[i] = largest
  return adjusted


def _outcome(gain: float, p: float) -> str:
  return TIE if p >= _LEVEL else WIN if gain > 0 else LOSS


def _task(row: Mapping[str, Any], num_examples: int, scores: Sequence[float]) -> dict[str, Any]:
  is_log = row['metric'] == 'perplexity'
  candidates = {} if is_log or not max(scores) > 0 else {'0': 0.}
  for name, value in [('chance', row['chance']), *row['baselines'].items()]:
    if value is not None and (score := -float(np.log(value)) if is_log else value) < min(scores):
      candidates[name] = score
  reference = max(candidates, key=candidates.get, default=None)
  return {'evaluator': row['evaluator'], 'metric': row['metric'], 'examples': num_examples, 'reference': reference,
          'reference_score': candidates.get(reference), 'best': float(max(scores))}


def _summary(
    variant: str, cells: Sequence[Mapping[str, Any]], paired: Sequence[Mapping[str, Any]],
    average: np.ndarray | None, gain: np.ndarray | None) -> dict[str, Any]:
  steps = [c['seconds_per_step'] for c in cells if c['seconds_per_step']]
  counts = next((c['parameters'] for c in cells if c['parameters']), {})
  outcomes = {f'{outcome}{end}': sum(p[f'outcome{end}'] == outcome for p in paired)
              for end in ('', '_holm') for outcome in (WIN, TIE, LOSS)}
  mean = dict.fromkeys(('average', 'low', 'high')) if average is None else _interval(average, 'average')
  return {'variant': variant, 'seeds': len({c['seed'] for c in cells if c['evaluation']}),
          **(outcomes if variant != DENSE else {}),
          'average': mean['average'], 'average_low': mean['low'], 'average_high': mean['high'],
          **(dict.fromkeys(('gain', 'low', 'high', 'p')) if gain is None else _interval(gain)),
          'seconds_per_step': float(np.median(steps)) if steps else None,
          'total': counts.get('total'), 'active': counts.get('active')}


def _training_losses(variant: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
  """The final training loss of a variant, and how far it is below that of dense in the same seeds."""
  by_run = {(c['variant'], c['seed']): loss for c in cells if (loss := c['final_loss']) is not None}
  own = {s: loss for (v, s), loss in by_run.items() if v == variant}
  gains = [by_run[DENSE, s] - loss for s, loss in own.items() if variant != DENSE and (DENSE, s) in by_run]
  keys = 'gain', 'low', 'high', 'p'
  interval = _interval(_over_seeds(np.tile(gains, (1 + RESAMPLES, 1)))) if len(gains) > 1 else dict.fromkeys(keys)
  return {'training_loss': float(np.mean([*own.values()])) if own else None,
          **{f'training_loss_{k}': interval[k] for k in keys}}
