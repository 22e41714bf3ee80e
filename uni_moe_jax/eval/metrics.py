"""Every number an evaluation prints is computed here, from plain arrays and texts.

No function here takes a model: scores, labels and texts come in as numpy arrays or Python strings, each
example once (padding is dropped before), and a float comes out. One rule holds everywhere: ties and
NaNs count against the model, so that a broken model looks broken.

Axis letters: Q queries, V targets, N examples.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.utils.errors import UsageError

# A value counts as different from a reference when it is at least this many standard errors away.
SIGNIFICANT = 3.0

BETTER, LEVEL, WORSE = 'better', 'level', 'worse'
_MARKS = {BETTER: '+', LEVEL: '=', WORSE: '-'}


def best_positive_rank(similarity: np.ndarray, positives: np.ndarray) -> np.ndarray:
  """Returns the rank (1 is best) of each query's best positive among its negatives, int [Q].

  Args:
    similarity: float [Q, V], higher is closer.
    positives: bool [Q, V], the targets that are right for a query; at least one each. Other
      positives of the same query never push its rank down.

  Raises:
    UsageError: shapes differ, or a query has no positive.
  """
  similarity, positives = np.asarray(similarity), np.asarray(positives, bool)
  if similarity.ndim != 2 or similarity.shape != positives.shape:
    raise UsageError(f'similarity {similarity.shape} and positives {positives.shape} must have the '
                     'same shape [queries, targets].')
  empty = np.flatnonzero(~positives.any(axis=1))
  if empty.size:
    raise UsageError(f'query {empty[0]} has no positive target ({empty.size} of {len(positives)} '
                     'have none): drop such queries before scoring.')
  best = np.where(positives, similarity, -np.inf).max(axis=1, keepdims=True)  # [Q, 1]
  # "not lower" rather than "higher": ties count against the model, and so does any NaN.
  return 1 + (~positives & ~(similarity < best)).sum(axis=1)


def recall_at_k(similarity: np.ndarray, positives: np.ndarray, k: int) -> float:
  """Returns the share of queries with a positive among their k closest targets.

  Args:
    similarity: float [Q, V], higher is closer.
    positives: bool [Q, V], at least one per query.
    k: at least 1.
  """
  return _share_within(best_positive_rank(similarity, positives), k)


def recall_by_chance(positives: np.ndarray, k: int) -> float:
  """Returns the recall at k of a random order.

  With m positives among V targets, C(V - m, k) of the C(V, k) possible sets of the first k contain none of them.

  Args:
    positives: bool [Q, V].
    k: at least 1.
  """
  m, V = np.asarray(positives, bool).sum(axis=1), np.shape(positives)[1]
  missed = np.ones(len(m))
  for drawn in range(min(k, V)):
    missed *= np.maximum(V - m - drawn, 0) / (V - drawn)
  return _mean(1 - missed)


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
  """Returns the share of examples whose label is among the k highest scores.

  Args:
    scores: float [N, V].
    labels: int [N] in [0, V).
    k: at least 1.

  Raises:
    UsageError: shapes do not fit, a label is outside [0, V), or there are no examples.
  """
  scores, labels = np.asarray(scores), np.asarray(labels)
  if scores.ndim != 2 or labels.shape != scores.shape[:1]:
    raise UsageError(f'scores {scores.shape} must be [examples, targets] and labels '
                     f'{labels.shape} [examples].')
  if labels.size and not 0 <= labels.min() <= labels.max() < scores.shape[1]:
    raise UsageError(f'labels reach from {labels.min()} to {labels.max()}, but there are '
                     f'{scores.shape[1]} targets: labels must be in [0, {scores.shape[1]}).')
  return _share_within(best_positive_rank(scores, labels[:, None] == np.arange(scores.shape[1])), k)


def _share_within(ranks: np.ndarray, k: int) -> float:
  if k < 1:
    raise UsageError(f'k is {k}; it must be at least 1.')
  return _mean(ranks <= k)


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Returns the share of equal entries of two arrays [N] of ints or strings."""
  return _mean(_pair_up(predictions, labels))


def balanced_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Returns the mean recall of the classes that are present in labels.

  Args:
    predictions: int or string [N].
    labels: int or string [N]. A class that is only predicted has no recall and does not count.
  """
  return _mean(_class_recall(predictions, labels)[0])


def balanced_accuracy_error(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Returns the standard error of the balanced accuracy.

  It is sqrt(Σ p_c (1 - p_c) / n_c) / C, for C classes with a share p_c of their n_c examples predicted correctly.
  """
  share, count = _class_recall(predictions, labels)
  return float(np.sqrt(np.sum(share * (1 - share) / count))) / len(share)


def _class_recall(predictions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(recall [C], count [C]) of the classes present in labels."""
  correct = _pair_up(predictions, labels)
  _, group = np.unique(labels, return_inverse=True)
  return np.bincount(group, weights=correct) / np.maximum(np.bincount(group), 1), np.bincount(group)


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Returns F1 of label 1 of two: 2 TP / (2 TP + FP + FN); 0 if label 1 occurs nowhere."""
  predictions, labels = np.asarray(predictions), np.asarray(labels)
  hits = int((_pair_up(predictions, labels) & (labels == 1)).sum())
  return 2 * hits / max(int((predictions == 1).sum() + (labels == 1).sum()), 1)


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Returns Matthews' correlation of labels 0 and 1; 0 where one of the two sides is constant."""
  from sklearn.metrics import matthews_corrcoef  # Costs time to load, and only GLUE needs it.

  _pair_up(np.asarray(predictions), np.asarray(labels))
  return float(matthews_corrcoef(labels, predictions))


def vqa_score(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
  """Returns the soft score of each answer, the official measure of VQA v2.

  It is the mean over annotators of min(1, others who gave the same answer / 3): an answer that 1, 2, 3, 4 of ten
  annotators gave scores 0.3, 0.6, 0.9, 1.

  Args:
    predictions: N answers.
    answers: for each the annotators' answers, normalized like the predictions (`data/pipeline/vqa_answers.py`).

  Raises:
    UsageError: not as many of each, or a question without answers.
  """
  scores = []
  for answer, people in with_references(predictions, answers):
    same = sum(p == answer for p in people)
    # An annotator who gave this answer has one fewer of it among the others.
    mine, others = min(1.0, (same - 1) / 3), min(1.0, same / 3)
    scores.append((same * mine + (len(people) - same) * others) / len(people))
  return scores


def most_common(texts: Sequence[str]) -> str:
  """Returns the most frequent text; of equally frequent ones the first."""
  return collections.Counter(texts).most_common(1)[0][0]


def perplexity(nll_sum: float, weight_sum: float) -> float:
  """Returns exp of the mean negative log-likelihood (in nats); infinite when it overflows."""
  if weight_sum <= 0:
    raise UsageError(f'the weights sum to {weight_sum}; perplexity needs at least one weighted '
                     'position.')
  try:
    return math.exp(nll_sum / weight_sum)
  except OverflowError:
    return math.inf


def exact_match(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
  """Returns the share of predictions equal to a reference; case and spacing do not count.

  Args:
    predictions: N texts.
    references: for each one text, or several of which any will do.
  """
  return _mean(any(_words(prediction) == _words(one) for one in several)
               for prediction, several in with_references(predictions, references))


def word_f1(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> np.ndarray:
  """Returns the F1 of the bags of words of each example: float64 [N].

  Of several references the closest one counts.
  "greek small letter" against "greek letter alpha" shares 2 of 3 words both ways: 2/3.
  """
  return each(max(_bag_f1(_words(prediction), _words(one)) for one in several)
              for prediction, several in with_references(predictions, references))


def bleu4(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
  """Returns corpus BLEU-4 in [0, 1]: sacrebleu's (tokenizer 13a, lower case) divided by 100."""
  import sacrebleu  # Costs time to load, and only captioning needs it.

  pairs = with_references(predictions, references)
  if not pairs:
    raise UsageError('there are no examples to score.')
  most = max(len(several) for _, several in pairs)
  # sacrebleu wants one list per reference number; None fills up examples that have fewer.
  streams = [[several[i] if i < len(several) else None for _, several in pairs]
             for i in range(most)]
  return sacrebleu.corpus_bleu(list(predictions), streams, lowercase=True).score / 100


def binomial_standard_error(proportion: float, count: int) -> float:
  """Returns sqrt(p (1 - p) / n), the standard error of a share p of n independent examples."""
  if count < 1 or not 0 <= proportion <= 1:
    raise UsageError(f'{proportion} of {count} examples is not a proportion: it must be in [0, 1] '
                     'of at least 1 example.')
  return math.sqrt(proportion * (1 - proportion) / count)


@dataclasses.dataclass(frozen=True)
class Score:
  """One measured number with all that is needed to judge it; prints as a row of the table."""

  name: str
  value: float
  count: int  # examples (or masked positions) behind the value
  chance: float | None = None  # what a blind guess scores; None where the notion is empty
  baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)  # name -> value
  standard_error: float | None = None
  higher_is_better: bool = True

  @classmethod
  def proportion(cls, name: str, value: float, count: int, chance: float | None = None,
                 baselines: Mapping[str, float] | None = None) -> Score:
    """Returns a Score of a share of `count` examples, with its binomial standard error."""
    return cls(name, value, count, chance, baselines or {}, binomial_standard_error(value, count))

  @classmethod
  def mean(cls, name: str, values: np.ndarray, baselines: Mapping[str, np.ndarray]) -> Score:
    """Returns a Score of the mean of values [N], one per example, with its standard error.

    A single example has no standard error. baselines: their values [N], by name.
    """
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return cls(name, float(np.mean(values)), len(values), standard_error=error,
               baselines={k: float(np.mean(v)) for k, v in baselines.items()})

  def row(self, evaluator: str, step: int) -> dict[str, Any]:
    """Returns the row of evaluation.json for this score."""
    return dict(evaluator=evaluator, metric=self.name, value=float(self.value), chance=self.chance,
                baselines={name: float(value) for name, value in self.baselines.items()},
                standard_error=self.standard_error, count=int(self.count), step=int(step),
                higher_is_better=self.higher_is_better)

  def __str__(self) -> str:
    return '  '.join(_cells(self.row('', 0))[1:]).rstrip()


def verdict(row: Mapping[str, Any], reference: float) -> str:
  """Returns 'better', 'level' or 'worse': how a row's value compares with chance or a baseline.

  Level means nearer than three standard errors, or equal where the row has no standard error.

  Args:
    row: as `Score.row` gives it; `higher_is_better` may be absent and is then read off the name.
    reference: the value to compare with.
  """
  gain = row['value'] - reference
  if not higher_is_better(row):
    gain = -gain
  margin = SIGNIFICANT * (row.get('standard_error') or 0.0)
  if gain == 0 or abs(gain) < margin:
    return LEVEL
  return BETTER if gain > 0 else WORSE  # NaN is not better than anything


def higher_is_better(row: Mapping[str, Any]) -> bool:
  """Returns whether a larger value of this row is the better one."""
  lower = any(word in row['metric'] for word in ('perplexity', 'loss', 'error'))
  return row.get('higher_is_better', not lower)


def evaluation_table(rows: Iterable[Mapping[str, Any]]) -> str:
  """Returns evaluation rows as an aligned plain-text table, with a legend line under it.

  Args:
    rows: as returned by `Score.row` and as read from evaluation.json.
  """
  header = ('evaluator', 'metric', 'value', '± s.e.', 'count', 'chance', 'baselines')
  table = [header] + [_cells(row) for row in rows]
  if len(table) == 1:
    return 'no evaluation rows'
  widths = [max(len(line[i]) for line in table) for i in range(len(header))]
  table.insert(1, tuple('-' * width for width in widths))
  aligned = ('<', '<', '>', '>', '>', '>', '<')
  lines = ['  '.join(f'{cell:{side}{width}}' for cell, side, width in zip(line, aligned, widths))
           for line in table]
  lines.append(f'+ better than it by at least {SIGNIFICANT:.0f} standard errors, = level, - worse; '
               'without a standard error: better, equal, worse')
  return '\n'.join(line.rstrip() for line in lines)


def format_number(value: float | None) -> str:
  """Returns a measured number with the digits that matter; an em dash for None."""
  if value is None:
    return '—'
  if not math.isfinite(value):
    return str(value)
  size = abs(value)
  if size >= 1000:
    return f'{value:,.0f}'
  if size >= 10:
    return f'{value:.1f}'
  return f'{value:.3f}' if size >= 0.01 or value == 0 else f'{value:.2g}'


def format_error(error: float | None) -> str:
  """Returns a standard error to the digits its value is shown with; an em dash for None."""
  return f'{error:.3f}' if error is not None and 0.001 <= error < 0.01 else format_number(error)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
  def marked(reference: float) -> str:
    return f'{format_number(reference)} {_MARKS[verdict(row, reference)]}'

  chance = row.get('chance')
  return (row['evaluator'],
          row['metric'] + ('' if higher_is_better(row) else ' (lower is better)'),
          format_number(row['value']), format_error(row.get('standard_error')),
          f'{row["count"]:,}', '—' if chance is None else marked(chance),
          ', '.join(f'{name} {marked(value)}' for name, value in row.get('baselines', {}).items()))


def each(values: Iterable[float]) -> np.ndarray:
  """Returns the values as float64 [N]; raises UsageError where there are none."""
  values = np.asarray(list(values), np.float64)
  if not values.size:
    raise UsageError('there are no examples to score.')
  return values


def _mean(values: Iterable[float]) -> float:
  return float(each(values).mean())


def _pair_up(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
  predictions, labels = np.asarray(predictions), np.asarray(labels)
  if predictions.shape != labels.shape or labels.ndim != 1:
    raise UsageError(f'predictions {predictions.shape} and labels {labels.shape} must both be '
                     '[examples].')
  return predictions == labels


def with_references(predictions: Sequence[str], references: Sequence[str | Sequence[str]]
                    ) -> list[tuple[str, Sequence[str]]]:
  """Returns (prediction, its references) of each example; raises UsageError where one has none."""
  if len(predictions) != len(references):
    raise UsageError(f'{len(predictions)} predictions for {len(references)} references: there must '
                     'be as many of each.')
  several = [[one] if isinstance(one, str) else list(one) for one in references]
  if not all(several):
    raise UsageError(f'example {several.index([])} has no reference: drop it before scoring.')
  return list(zip(predictions, several))


def _words(text: str) -> list[str]:
  return text.casefold().split()


def _bag_f1(prediction: list[str], reference: list[str]) -> float:
  if not prediction and not reference:
    return 1.0
  shared = sum((collections.Counter(prediction) & collections.Counter(reference)).values())
  return 2 * shared / (len(prediction) + len(reference))
