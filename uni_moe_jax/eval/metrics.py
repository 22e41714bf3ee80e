"""Every number an evaluation prints is computed here, from plain arrays and texts.

Each example comes once (padding is dropped before). Ties and NaNs count against the model everywhere, so that a broken
model looks broken. Axis letters: Q queries, V targets, N examples.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.config.metric_names import lower_is_better
from uni_moe_jax.data.text import vqa_answers
from uni_moe_jax.utils.errors import UsageError

# A value counts as different from a reference when it is at least this many standard errors away.
SIGNIFICANT = 3.0

BETTER, LEVEL, WORSE = 'better', 'level', 'worse'


def best_positive_rank(similarity: np.ndarray, positives: np.ndarray) -> np.ndarray:
  """Returns the rank (1 is best) of each query's best positive among its negatives, int [Q].

  Args:
    similarity: float [Q, V], higher is closer.
    positives: bool [Q, V], the targets that are right for a query. Other positives of the same query never push its
      rank down.

  Raises:
    UsageError: a query has no positive.
  """
  similarity, positives = np.asarray(similarity), np.asarray(positives, bool)
  _check_positives(positives)
  best = np.where(positives, similarity, -np.inf).max(axis=1, keepdims=True)  # [Q, 1]
  # "not lower" rather than "higher": ties count against the model, and so does any NaN.
  return 1 + (~positives & ~(similarity < best)).sum(axis=1)


def mutual_ranks(
    similarity: Callable[[slice], np.ndarray], positives: np.ndarray, at_once: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ranks of `best_positive_rank` of each query among the targets, [Q], and vice versa, [V].

  Args:
    similarity: a slice of queries → their float [q, V]. It is called twice for each, so that [Q, V] is never in memory.
    positives: bool [Q, V].
    at_once: queries whose similarities to every target are in memory together.
  """
  blocks = [slice(start, start + at_once) for start in range(0, len(positives), at_once)]
  _check_positives(positives.T)
  ranks, best = [], []
  for block in blocks:
    values = similarity(block)
    ranks.append(best_positive_rank(values, positives[block]))
    best.append(np.where(positives[block], values, -np.inf).max(axis=0))
  best = np.max(best, axis=0, keepdims=True)  # [1, V]
  above = sum((~positives[block] & ~(similarity(block) < best)).sum(axis=0) for block in blocks)
  return np.concatenate(ranks), 1 + above


def share_within(ranks: np.ndarray, k: int) -> float:
  """Returns the share of ranks (int [N], 1 is best) that are at most k: recall at k, or top-k accuracy."""
  return _mean(np.asarray(ranks) <= k)


def recall_by_chance(positives: np.ndarray, k: int) -> float:
  """Returns the recall at k of a random order, of positives bool [Q, V].

  With m positives among V targets, C(V - m, k) of the C(V, k) possible sets of the first k contain none of them.
  """
  m, V = np.asarray(positives, bool).sum(axis=1), np.shape(positives)[1]
  drawn = np.arange(min(k, V))[:, None]
  return _mean(1 - np.prod(np.maximum(V - m - drawn, 0) / (V - drawn), axis=0))


def hits(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Returns which entries of two arrays [N] of ints or strings are equal: bool [N]."""
  predictions, labels = np.asarray(predictions), np.asarray(labels)
  if predictions.shape != labels.shape or labels.ndim != 1:
    raise UsageError(f'predictions {predictions.shape} and labels {labels.shape} must both be [examples].')
  return predictions == labels


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Returns the share of equal entries of two arrays [N] of ints or strings."""
  return _mean(hits(predictions, labels))


def balanced_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Returns the mean recall of the classes that are present in labels; both are int or string [N]."""
  return _mean(_class_recall(predictions, labels)[0])


def balanced_accuracy_error(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Returns the standard error of the balanced accuracy.

  It is sqrt(Σ p_c (1 - p_c) / (n_c - 1)) / C, for C classes with a share p_c of their n_c examples predicted correctly.
  A class of one example, and all of them if every p_c is 0 or 1, have the variance of an example of any class.
  """
  share, count = _class_recall(predictions, labels)
  variance = share * (1 - share) / np.maximum(count - 1, 1)
  of_any = _variance(float(share @ count) / count.sum(), count.sum())
  variance = np.where((count == 1) | ~variance.any(), of_any / count, variance)
  return float(np.sqrt(variance.sum())) / len(share)


def _class_recall(predictions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(recall [C], count [C]) of the classes present in labels."""
  _, group, count = np.unique(labels, return_inverse=True, return_counts=True)
  return np.bincount(group, weights=hits(predictions, labels)) / count, count


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Returns F1 of label 1 of two: 2 TP / (2 TP + FP + FN); 0 if label 1 occurs nowhere."""
  from sklearn.metrics import f1_score  # Costs time to load, and only GLUE needs it.
  return float(f1_score(labels, predictions, zero_division=0))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Returns Matthews' correlation of labels 0 and 1; 0 where one of the two sides is constant."""
  from sklearn.metrics import matthews_corrcoef  # Costs time to load, and only GLUE needs it.
  return float(matthews_corrcoef(labels, predictions))


def vqa_score(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
  """Returns the soft score of each answer, the official measure of VQA v2: float64 [N]; see `vqa_answers.soft_score`.

  Args:
    predictions: N answers.
    answers: for each the annotators' answers, normalized like the predictions (`data/text/vqa_answers.py`).

  Raises:
    UsageError: not as many of each, or a question without answers.
  """
  def score(answer: str, people: Sequence[str]) -> float:
    return vqa_answers.soft_score(sum(p == answer for p in people), len(people))

  return each_score(score, predictions, answers)


def perplexity(nll_sum: float, weight_sum: float) -> float:
  """Returns exp of the mean negative log-likelihood (in nats); infinite when it overflows."""
  if weight_sum <= 0:
    raise UsageError(f'the weights sum to {weight_sum}; perplexity needs at least one weighted position.')
  try:
    return math.exp(nll_sum / weight_sum)
  except OverflowError:
    return math.inf


def variance_of_mean(values: np.ndarray, weights: np.ndarray) -> float:
  """Returns N / (N - 1) Σ w² (x - mean)² / (Σ w)², of values x and weights w [N]; 0 of one value."""
  squares = (weights * (values - np.average(values, weights=weights)))**2
  return float(squares.sum() / weights.sum()**2 * len(values) / max(len(values) - 1, 1))


def perplexity_error(value: float, log_p: np.ndarray, weights: np.ndarray) -> float | None:
  """Returns the standard error of a perplexity: that of the mean log p of examples, times the perplexity.

  Args:
    value: the perplexity, exp of minus the weighted mean.
    log_p, weights: float [N], of each example the mean over its positions, and their number.

  Returns:
    value · sqrt(`variance_of_mean`); None of one example, or if it is not finite.
  """
  return value * math.sqrt(variance_of_mean(log_p, weights)) if len(log_p) > 1 and np.isfinite(value) else None


def exact_match(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
  """Returns the share of `exact_matches`."""
  return float(exact_matches(predictions, references).mean())


def exact_matches(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> np.ndarray:
  """Returns 1 for predictions equal to a reference, one or several each, else 0: float64 [N].

  Case and spacing do not count.
  """
  return each_score(lambda text, several: _words(text) in map(_words, several), predictions, references)


def word_f1(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> np.ndarray:
  """Returns the F1 of the bags of words of each example: float64 [N]. Of several references the closest one counts.

  "greek small letter" against "greek letter alpha" shares 2 of 3 words both ways: 2/3.
  """
  def f1_of_bags(left: list[str], right: list[str]) -> float:
    shared = (collections.Counter(left) & collections.Counter(right)).total()
    return 2 * shared / (len(left) + len(right)) if left or right else 1.0

  return each_score(lambda text, several: max(f1_of_bags(_words(text), _words(one)) for one in several),
                    predictions, references)


def binomial_standard_error(proportion: float, count: int) -> float:
  """Returns the standard error of a share p of n independent examples, sqrt(q (1 - q) / (n + 4)).

  Here q = (p n + 2) / (n + 4), as Agresti and Coull count two successes and two failures more: sqrt(p (1 - p) / n) is 0
  where all or no examples are right, however few they are.
  """
  return math.sqrt(_variance(proportion, count) / (count + 4))


def _variance(proportion: float, count: int) -> float:
  """The variance q (1 - q) of one of the examples of `binomial_standard_error`."""
  q = (proportion * count + 2) / (count + 4)
  return q * (1 - q)


@dataclasses.dataclass(frozen=True)
class Score:
  """One measured number with all that is needed to judge it."""

  name: str
  value: float
  count: int  # examples (or masked positions) behind the value
  chance: float | None = None  # what a blind guess scores; None where the notion is empty
  baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)  # name -> value
  standard_error: float | None = None
  baseline_counts: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of those on a part of the examples

  @classmethod
  def proportion(cls, name: str, value: float, count: int, chance: float | None = None,
                 baselines: Mapping[str, float] | None = None) -> Score:
    """Returns a Score of a share of `count` examples, with its binomial standard error."""
    return cls(name, value, count, chance, baselines or {}, binomial_standard_error(value, count))

  @classmethod
  def share(cls, name: str, right: np.ndarray, chance: float | None = None,
            baselines: Mapping[str, float] | None = None) -> Score:
    """Returns a Score of the share of examples that are right, bool or 0 and 1 [N]."""
    return cls.proportion(name, _mean(right), len(right), chance, baselines)

  @classmethod
  def mean(cls, name: str, values: np.ndarray, baselines: Mapping[str, np.ndarray]) -> Score:
    """Returns a Score of the mean of values [N], one per example, with its standard error.

    A single example has no standard error; that of equal values is the error of a share of 0. baselines: their values
    [N], by name.
    """
    n = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) or binomial_standard_error(0, n) if n > 1 else None
    return cls(name, float(np.mean(values)), len(values), standard_error=error,
               baselines={k: float(np.mean(v)) for k, v in baselines.items()})

  def row(self, evaluator: str, step: int) -> dict[str, Any]:
    """Returns the row of evaluation.json for this score."""
    return dict(evaluator=evaluator, metric=self.name, value=float(self.value), chance=self.chance,
                baselines={name: float(value) for name, value in self.baselines.items()},
                baseline_counts={name: n for name, n in self.baseline_counts.items() if name in self.baselines},
                standard_error=self.standard_error, count=int(self.count), step=int(step),
                higher_is_better=not lower_is_better(self.name))


def verdict(row: Mapping[str, Any], reference: float, baseline: str = '') -> str:
  """Returns 'better', 'level' or 'worse': how a row's value compares with chance or a baseline.

  Level means nearer than three standard errors, or equal where the row has no standard error. baseline: its name; one
  that was scored on m of the n examples has an error, too: that of the row, times sqrt(n / m).
  """
  gain = (row['value'] - reference) * (1 if row['higher_is_better'] else -1)
  m = row.get('baseline_counts', {}).get(baseline)  # absent in the rows of earlier versions
  error = (row.get('standard_error') or 0.0) * math.sqrt(1 + row['count'] / m if m else 1)
  if gain == 0 or abs(gain) < SIGNIFICANT * error:
    return LEVEL
  return BETTER if gain > 0 else WORSE  # NaN is not better than anything


def format_number(value: float | None) -> str:
  """Returns a measured number with the digits that matter; an em dash for None."""
  if value is None:
    return '—'
  if not math.isfinite(value):
    return str(value)
  size = abs(value)
  digits = ',.0f' if size >= 1000 else '.1f' if size >= 10 else '.3f' if size >= 0.01 or value == 0 else '.2g'
  return f'{value:{digits}}'


def format_error(error: float | None) -> str:
  """Returns a standard error to the digits its value is shown with; an em dash for None."""
  return f'{error:.3f}' if error is not None and 0.001 <= error < 0.01 else format_number(error)


def each_score(
    score: Callable[[str, Sequence[str]], float], predictions: Sequence[str],
    references: Sequence[str | Sequence[str]]) -> np.ndarray:
  """Returns score(prediction, its references) of each example: float64 [N]."""
  return np.array([score(*pair) for pair in with_references(predictions, references)], np.float64)


def with_references(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[tuple[str, Sequence[str]]]:
  """Returns (prediction, its references) of each example.

  Raises:
    UsageError: there are no examples, an example has no reference, or lengths differ.
  """
  if len(predictions) != len(references):
    raise UsageError(f'{len(predictions)} predictions for {len(references)} references: the numbers must be equal.')
  several = [[one] if isinstance(one, str) else list(one) for one in references]
  if not all(several):
    raise UsageError(f'example {several.index([])} has no reference: drop it before scoring.')
  _check_examples(several)
  return list(zip(predictions, several))


def _check_positives(positives: np.ndarray) -> None:
  empty = np.flatnonzero(~positives.any(axis=1))
  if empty.size:
    raise UsageError(f'query {empty[0]} has no positive target ({empty.size} of {len(positives)} have none): drop such '
                     'queries before scoring.')


def _mean(values: np.ndarray) -> float:
  _check_examples(values)
  return float(np.mean(values))


def _check_examples(examples: Sequence) -> None:
  if not len(examples):
    raise UsageError('there are no examples to score.')


def _words(text: str) -> list[str]:
  return unicodedata.normalize('NFKC', text).casefold().split()  # as SentencePiece does before it cuts tokens
