"""Evaluators of answers at a slot: the GLUE tasks with their own metrics, and questions about images."""

import dataclasses
import statistics
from collections.abc import Callable

import numpy as np

from uni_moe_jax.config.metric_names import is_measured
from uni_moe_jax.data.text.vqa_answers import normalize_answer
from uni_moe_jax.eval import evaluators, metrics
from uni_moe_jax.eval.evaluators import Query
from uni_moe_jax.eval.metrics import Score


def glue(q: Query) -> list[Score]:
  """Accuracy; with two classes also F1 of the second and Matthews' correlation.

  GLUE reports accuracy for most of its tasks, F1 for MRPC and QQP, Matthews for CoLA.
  """
  ids = q.ids()
  predicted, _, labels = evaluators.answered(q, ids)
  _, by, counts = evaluators.label_baselines(q, ids, labels)
  n, V = len(labels), len(q.names)
  scores = [Score.share('accuracy', metrics.hits(predicted, labels), 1 / V, by(metrics.accuracy))]
  if is_measured('F1', V):
    f1, matthews = map(_of_two, (metrics.f1, metrics.matthews))
    scores += [Score('F1', f1(predicted, labels), n, baselines=by(f1)),
               Score('Matthews', matthews(predicted, labels), n, 0.0, by(matthews))]
  return [dataclasses.replace(score, baseline_counts=counts) for score in scores]


def _of_two(metric: Callable[..., float]) -> Callable[..., float]:
  """A metric of two classes, of examples that have one: what is not the label counts as the other class."""
  def of(predicted: np.ndarray, labels: np.ndarray) -> float:
    known = labels >= 0
    return metric(np.where(predicted == labels, labels, 1 - labels)[known], labels[known])
  return of


def vqa(q: Query) -> list[Score]:
  """Soft score (see `metrics.vqa_score`) of the most likely answer, and how often it is the most frequent answer.

  Where several answers have the highest score, or one is NaN, none is right. The baselines of both are the most
  frequent training answer for all questions, and answers predicted from the questions alone.
  """
  ids, several, named = q.ids(), q.examples.references, [normalize_answer(key) for key in q.keys]
  ranked, labels = q.gather(ids, lambda fields: (q.ranked(fields), fields['label'][:, 0]))
  chosen = np.where(ranked.is_alone, ranked.best, len(named))
  answers = np.array([*named, evaluators.NONE])[chosen].tolist()  # no normalized answer has parentheses
  truth = [[*map(normalize_answer, s)] for s in several(ids)] if several else [[named[i]] for i in labels]
  pairs = {}  # baseline → its answers, and what is right for the same questions
  if q.evaluation.baselines:
    trained, rows, fitted = q.baselines.answers(ids)
    if trained:
      common = statistics.mode(trained)
      pairs[f'always {common!r}'] = [common] * len(ids), truth
    pairs |= {name: (predicted, [truth[i] for i in rows]) for name, predicted in fitted.items()}
  soft, exact = metrics.vqa_score, lambda answers, truth: metrics.hits(np.array(answers), np.array(_first(truth)))
  q.show(ids, _first(truth), answers)
  by_metric = lambda metric: {name: float(np.mean(metric(*pair))) for name, pair in pairs.items()}
  counts = {name: len(given) for name, (given, _) in pairs.items() if len(given) < len(ids)}
  scores = ((Score.mean('soft score', soft(answers, truth), {}), soft),
            (Score.share('exact_match', exact(answers, truth)), exact))
  return [dataclasses.replace(score, chance=1 / len(q.names), baselines=by_metric(metric), baseline_counts=counts)
          for score, metric in scores]


def _first(truth: list[list[str]]) -> list[str]:
  """The most frequent answer to each question."""
  return [statistics.mode(several) for several in truth]
