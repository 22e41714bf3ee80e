"""Of the scores of V targets only ranks are kept: they are those of the whole matrix, which is never in memory."""

import tracemalloc

import jax.numpy as jnp
import numpy as np

from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.examples.examples import Examples
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.eval import metrics, predictor
from uni_moe_jax.eval.evaluators import Query
from uni_moe_jax.eval.suite import EVALUATORS

_V = 5000


def _labels(ids):
  return ids * 7 % _V


def test_ranks_on_the_device_are_those_of_the_metrics():
  rng = np.random.default_rng(0)
  scores = rng.integers(0, 6, (3, 4, 5)).astype(np.float32)  # ties
  scores[0, 0] = np.nan
  scores[1, :, 2] = np.nan
  scores[2, 0] = 1.0
  labels = rng.integers(0, 5, (3, 4))
  ranked = predictor.rank(scores, labels)
  expected = metrics.best_positive_rank(scores.reshape(12, 5), labels.reshape(12, 1) == np.arange(5))
  np.testing.assert_array_equal(ranked.rank.ravel(), expected)
  assert ranked.rank[0, 0] == ranked.rank[2, 0] == 5 and len(set(expected.tolist())) >= 4
  np.testing.assert_array_equal(ranked.best, scores.argmax(-1))
  counts = (scores == scores.max(-1, keepdims=True)).sum(-1)  # none equals NaN
  assert {0, 1, 2} <= set(counts.ravel().tolist())
  np.testing.assert_array_equal(ranked.is_alone, counts == 1)
  np.testing.assert_array_equal(ranked.score, np.take_along_axis(scores, labels[..., None], -1)[..., 0])


def test_views_are_averaged_also_where_every_probability_is_0_in_float32():
  """The second of 20 targets is 95 behind the first and the others 100: e^-95 is 0."""
  log_p = jnp.asarray([[[0., -95., *[-100.] * 18]]], jnp.float32)
  assert jnp.exp(log_p).tolist() == [[[1.0] + [0.0] * 19]]
  assert predictor.rank(predictor.mean_log_probability([log_p, log_p]), np.array([[1]])).rank.tolist() == [[2]]


class _Shifted:
  """The label of example i is at rank i % 8 + 1. Only one batch of scores exists at a time."""
  mesh = None

  def inputs(self, task_type, fields):
    return fields['id'].astype(int)

  def log_probabilities(self, ids, task=None):
    scores = np.zeros((len(ids), 1, _V), np.float32)
    for row, i in zip(scores[:, 0], ids):
      row[(_labels(i) + np.arange(8)) % _V] = 1 + np.roll(np.arange(8), i % 8 + 1)[::-1]
    return scores

  def ranked(self, views, task, labels):
    [ids] = views
    return predictor.rank(self.log_probabilities(ids), labels)


def _evaluate(num_examples: int):
  """Scores, and the peak of NumPy's memory in bytes."""
  import tensorflow as tf
  keys = tuple(f'class {i}' for i in range(_V))
  c = tiny.config(data_dir='')
  c.target_sets.s = config_lib.target_set(keys, family='words')
  c.tasks.t = config_lib.task('text_classification', 'own:x', batch_size=1, target_set='s', label_column='label',
                              template='{a} <spe> <eot>', max_len=8)
  c.evaluators.e = config_lib.evaluator('classification', 't', split='test', batch_size=20, baselines=False)
  [e] = make_plan(c).evaluations
  records = FileDataset('own:x', num_examples, None, {}, {'label': keys}, {}, '')
  examples = Examples(num_examples, lambda ids, hashes: {
      'id': ids, 'label': tf.cast(ids * 7 % _V, tf.int32)[:, None], 'weight': tf.ones([tf.size(ids), 1])})
  query = Query(e, _Shifted(), examples, records, records, keys, keys, None, {}, '')
  tracemalloc.start()
  scores = {s.name: s for s in EVALUATORS['classification'](query)}
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  return scores, peak


def test_classification_keeps_no_scores_of_examples_times_classes():
  scores, peak = _evaluate(2000)
  assert scores['top-1'].value == 1 / 8 and scores['top-5'].value == 5 / 8 and scores['top-1'].count == 2000
  assert peak < 8e6  # 2,000 × 5,000 float32 are 4e7 bytes, one batch of them 4e5
