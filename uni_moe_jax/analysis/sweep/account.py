"""Variants against dense: paired by seed and example, one main metric per evaluator.

Scores are such that higher is better: a mean over examples, and of perplexity its negative logarithm. Seeds differ, and
so would other examples, which are the same for all runs: both variances add up, and the degrees of freedom are
Satterthwaite's (1946). So p-values are right at small levels, too, which Holm's correction needs. A bootstrap is not:
resamples of three seeds give no p between 0.07 and 0.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from uni_moe_jax.eval import headline, metrics
from uni_moe_jax.tasks.router_names import DENSE

WIN, TIE, LOSS = 'win', 'tie', 'loss'
_LEVEL = 0.05

Examples = Mapping[tuple[str, str], np.ndarray]  # see `example_scores.read`


@dataclasses.dataclass(frozen=True)
class Mean:
  """A mean over examples and seeds. by_seed: {seed: mean over examples}; variance: of the mean, by examples alone."""
  by_seed: Mapping[int, float]
  variance: float
  num_examples: int

  @property
  def value(self) -> float:
    return round(float(np.mean([*self.by_seed.values()])), 12)  # so that equal models are equal

  def scaled(self, zero: float, one: float) -> 'Mean':
    """The mean with other units: `zero` becomes 0, and `one` 1."""
    return Mean({s: (x - zero) / (one - zero) for s, x in self.by_seed.items()}, self.variance / (one - zero)**2,
                self.num_examples)


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
    by_variant = {v: {s: x.astype(np.float64) for (variant, s), x in same.items() if variant == v} for v in variants}
    means = {v: mean_of(of_seeds, weights) for v, of_seeds in by_variant.items() if of_seeds}
    task = _task(row, len(weights), [m.value for m in means.values()])
    tasks.append(task)
    has_scale = task['reference'] is not None
    for v, m in means.items():
      if has_scale:
        averages[v].append(m.scaled(task['reference_score'], task['best']))
      gains = {s: x - by_variant[DENSE][s] for s, x in by_variant[v].items() if s in by_variant.get(DENSE, ())}
      if v != DENSE and gains:
        gain = mean_of(gains, weights)
        paired.append({'variant': v, 'evaluator': key[0], 'metric': key[1], 'seeds': len(gains), **interval(gain)})
        if has_scale:
          averages[v, DENSE].append(gain.scaled(0, task['best'] - task['reference_score']))
  for v in variants:
    rows = [p for p in paired if p['variant'] == v]
    for p, p_holm in zip(rows, holm([p['p'] for p in rows]), strict=True):
      p |= {'p_holm': p_holm, 'outcome': _outcome(p['gain'], p['p']), 'outcome_holm': _outcome(p['gain'], p_holm)}
  number = sum(task['reference'] is not None for task in tasks)
  mean = lambda key: _average(averages[key]) if number and len(averages[key]) == number else None
  return {'errors': errors, 'tasks': tasks, 'paired': paired, 'variants': [
      _summary(v, [c for c in cells if c['variant'] == v], [p for p in paired if p['variant'] == v], mean(v),
               mean((v, DENSE))) | _training_losses(v, cells) for v in variants]}


def _main_rows(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  # Of all cells together: one that diverged may lack the main metric of the others.
  return [line.row for line in headline.lines(row for c in cells for row in c['evaluation'])]


def mean_of(values: Mapping[int, np.ndarray], weights: np.ndarray) -> Mean:
  """The mean of {seed: values [N]} with weights [N] of the examples."""
  variance = metrics.variance_of_mean(np.mean([*values.values()], 0), weights)
  return Mean({s: float(np.average(x, weights=weights)) for s, x in values.items()}, variance, len(weights))


def _average(means: Sequence[Mean]) -> Mean | None:
  """The mean of means over different examples, of the seeds that all have; None without one."""
  seeds = [s for s in means[0].by_seed if all(s in m.by_seed for m in means)]
  by_seed = {s: float(np.mean([m.by_seed[s] for m in means])) for s in seeds}
  variance = sum(m.variance for m in means) / len(means)**2
  return Mean(by_seed, variance, min(m.num_examples for m in means)) if seeds else None


def interval(mean: Mean, name: str = 'gain') -> dict[str, float]:
  """{name, 'low', 'high', 'p'}: Student's t; p is two-sided, of a value of 0."""
  S, value = len(mean.by_seed), mean.value
  of_seeds = float(np.var([*mean.by_seed.values()], ddof=1)) / S if S > 1 else 0.
  total = of_seeds + mean.variance
  parts = of_seeds**2 / max(S - 1, 1) + mean.variance**2 / max(mean.num_examples - 1, 1)
  freedom = total**2 / parts if parts else math.inf
  error = math.sqrt(total)
  half = stats.t.ppf(1 - _LEVEL / 2, freedom) * error
  unknown = S == 1 and mean.num_examples < 2  # how much others differ
  p = 2 * stats.t.sf(abs(value) / error, freedom) if error else value == 0 or unknown
  return {name: value, 'low': float(value - half), 'high': float(value + half), 'p': float(p)}


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
    average: Mean | None, gain: Mean | None) -> dict[str, Any]:
  steps = [c['seconds_per_step'] for c in cells if c['seconds_per_step']]
  counts = next((c['parameters'] for c in cells if c['parameters']), {})
  outcomes = {f'{outcome}{end}': sum(p[f'outcome{end}'] == outcome for p in paired)
              for end in ('', '_holm') for outcome in (WIN, TIE, LOSS)}
  mean = dict.fromkeys(('average', 'low', 'high')) if average is None else interval(average, 'average')
  return {'variant': variant, 'seeds': len({c['seed'] for c in cells if c['evaluation']}),
          **(outcomes if variant != DENSE else {}),
          'average': mean['average'], 'average_low': mean['low'], 'average_high': mean['high'],
          **(dict.fromkeys(('gain', 'low', 'high', 'p')) if gain is None else interval(gain)),
          'seconds_per_step': float(np.median(steps)) if steps else None,
          'total': counts.get('total'), 'active': counts.get('active')}


def _training_losses(variant: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
  """The final training loss of a variant, and how far it is below that of dense in the same seeds."""
  by_run = {(c['variant'], c['seed']): loss for c in cells if (loss := c['final_loss']) is not None}
  own = {s: loss for (v, s), loss in by_run.items() if v == variant}
  gains = {s: by_run[DENSE, s] - loss for s, loss in own.items() if variant != DENSE and (DENSE, s) in by_run}
  keys = 'gain', 'low', 'high', 'p'
  gain = interval(Mean(gains, 0., 1)) if len(gains) > 1 else dict.fromkeys(keys)
  return {'training_loss': float(np.mean([*own.values()])) if own else None,
          **{f'training_loss_{k}': gain[k] for k in keys}}
