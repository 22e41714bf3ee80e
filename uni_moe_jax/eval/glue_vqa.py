"""Evaluators of answers at a slot: the GLUE tasks with their own metrics, and questions about images."""

import statistics

import numpy as np

from uni_moe_jax.config.metric_names import is_measured
from uni_moe_jax.data.pipeline.vqa_answers import normalize_answer
from uni_moe_jax.eval import evaluators, metrics
from uni_moe_jax.eval.evaluators import Query
from uni_moe_jax.eval.metrics import Score


def glue(q: Query) -> list[Score]:
  """Accuracy; with two classes also F1 of the second and Matthews' correlation.

  GLUE reports accuracy for most of its tasks, F1 for MRPC and QQP, Matthews for CoLA.
  """
  ids = q.ids()
  predicted, labels = q.gather(ids, lambda fields: (q.ranked(fields).best, fields['label'][:, 0]))
  _, by = evaluators.label_baselines(q, ids, labels)
  n, V = len(labels), len(q.names)
  scores = [Score.share('accuracy', metrics.hits(predicted, labels), 1 / V, by(metrics.accuracy))]
  if is_measured('F1', V):
    scores += [Score('F1', metrics.f1(predicted, labels), n, baselines=by(metrics.f1)),
               Score('Matthews', metrics.matthews(predicted, labels), n, 0.0, by(metrics.matthews))]
  return scores


def vqa(q: Query) -> list[Score]:
  """Soft score (see `metrics.vqa_score`) of the most likely answer, and how often it is the most frequent answer.

  The baselines are the most frequent training answer for all questions, and answers predicted from the questions alone.
  """
  ids = q.ids()
  answers = [normalize_answer(q.keys[i]) for i in q.gather(ids, lambda fields: q.ranked(fields).best)]
  truth = [[normalize_answer(a) for a in several] for several in q.examples.references(ids)]
  first = [statistics.mode(several) for several in truth]
  soft = lambda answers, truth=truth: float(np.mean(metrics.vqa_score(answers, truth)))
  baselines = {}
  if q.evaluation.baselines:
    trained, rows, fitted = q.file_baselines.answers(ids)
    baselines = {name: soft(predicted, [truth[i] for i in rows]) for name, predicted in fitted.items()}
    if trained:
      common = statistics.mode(trained)
      baselines = {f'always {common!r}': soft([common] * len(ids)), **baselines}
  q.show(ids, first, answers)
  chance = 1 / len(q.names)
  return [Score('soft score', soft(answers), len(ids), chance, baselines,
                per_example=metrics.vqa_score(answers, truth)),
          Score.share('exact_match', metrics.hits(np.array(answers), np.array(first)), chance)]
