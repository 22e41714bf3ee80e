"""Answers at a slot: GLUE's metrics and VQA's soft score, of predictors with given answers."""

import dataclasses
import statistics
import tempfile

import numpy as np
import pytest

from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches.assemble import Data
from uni_moe_jax.data.examples.examples import Examples
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.eval import predictor
from uni_moe_jax.eval.evaluators import Query
from uni_moe_jax.eval.suite import EVALUATORS

LABELS = np.array([1, 1, 0, 1, 0, 0, 1])  # seven, evaluated in batches of three
ANSWERS = [('A cat',) * 4 + ('dog',) * 6, ('cat.',) * 10, ('bird',) * 10]


class _Predicts:
  """A predictor with given answers by example id, as log p; records which examples were evaluated."""
  mesh = None

  def __init__(self, answers, V):
    self.answers, self.V, self.seen = np.asarray(answers), V, []

  def inputs(self, task_type, fields):
    self.seen += fields['id'].tolist()
    return fields['id'].astype(int)

  def ranked(self, views, task, labels):
    [ids] = views
    return predictor.rank(np.log(np.eye(self.V)[self.answers[ids]] * 0.8 + 0.1)[:, None], labels)


def _evaluate(evaluator, task, keys, examples, predicts, trained=(), evaluated=(), query=Query, **values):
  """trained, evaluated: rows, or a dataset. values: of the evaluator."""
  columns = {'a': 'text', 'label': 'class', 'answers': 'texts'}
  with tempfile.TemporaryDirectory() as data_dir:
    c = tiny.config(data_dir=data_dir)
    c.target_sets.s = config_lib.target_set(keys, family='words')
    c.tasks.t = task
    c.evaluators.e = config_lib.evaluator(evaluator, 't', split='test', batch_size=3, **values)
    [e] = make_plan(c).evaluations
    records = [rows if isinstance(rows, FileDataset) else FileDataset(
        'own:x', len(rows), lambda ids, rows=rows: [rows[i] for i in ids], columns, {'label': keys}, {}, repr(rows))
               for rows in (evaluated, trained)]
    return {s.name: s for s in EVALUATORS[evaluator](
        query(e, predicts, examples, *records, keys, keys, None, {}, data_dir))}


class _FewEvaluated(Query):
  """Its baselines see two examples."""

  @property
  def baselines(self):
    return dataclasses.replace(super().baselines, num_examples={'text': (9, 2)})


def _text(**fields):
  return config_lib.task('text_classification', 'own:x', batch_size=1, target_set='s', label_column='label',
                         template='{a} <spe> <eot>', max_len=8, **fields)


def _examples(size, references=None, unanswered=()):
  """unanswered: ids of examples whose answer the target set lacks."""
  def make(ids, hashes):
    import tensorflow as tf
    pixels = {} if references is None else {'pixels': tf.zeros([tf.size(ids), 1, 4, 4, 3], tf.uint8)}
    weight = 1 - np.isin(np.arange(size), unanswered).astype(np.float32)
    columns = {'label': np.where(weight > 0, np.resize(LABELS, size), 0), 'weight': weight}
    return {'id': ids, **{k: tf.gather(tf.constant(v), ids)[:, None] for k, v in columns.items()}, **pixels}
  return Examples(size, make, references)


def test_glue_counts_every_example_once_and_scores_by_hand():
  # Always 1: of seven, four are 1. F1 = 2 · 4 / (7 + 4).
  predicts = _Predicts(np.ones(7, int), 2)
  trained = [{'a': a, 'label': label} for a, label in (('red', 'no'), ('red', 'no'), ('blue', 'yes'), ('blue', ''))]
  rows = trained, [{'a': 'blue' if label else 'red', 'label': ('no', 'yes')[label]} for label in LABELS]
  scores = _evaluate('glue', _text(), ('no', 'yes'), _examples(7), predicts, *rows)
  assert sorted(set(predicts.seen)) == list(range(7)) and scores['accuracy'].count == 7
  assert scores['accuracy'].value == pytest.approx(4 / 7)
  assert scores['F1'].value == pytest.approx(8 / 11)
  assert scores['Matthews'].value == 0
  # The most frequent class in training is no; its words tell the classes apart.
  assert scores['accuracy'].baselines == {'majority': pytest.approx(3 / 7), 'tf-idf': 1.0}
  right = _evaluate('glue', _text(), ('no', 'yes'), _examples(7), _Predicts(LABELS, 2), *rows, baselines=False)
  assert {name: s.value for name, s in right.items()} == {'accuracy': 1, 'F1': 1, 'Matthews': 1}
  assert right['accuracy'].baselines == {}


def test_baselines_of_texts_read_the_columns_of_the_template_alone():
  # The text is the same everywhere; the label column, another text and the pixels would tell the classes apart.
  names, task = np.array(['no', 'yes'])[LABELS], _text()
  columns = {'a': np.full(7, 'red'), 'text_type': names, 'text': names,
             'pixels': 255 * LABELS.astype(np.uint8)[:, None, None]}
  records = file_dataset.in_memory('x', columns, {'text_type': ('no', 'yes')})
  task.label_column = 'text_type'
  score = _evaluate('glue', task, ('no', 'yes'), _examples(7), _Predicts(LABELS, 2), records, records)['accuracy']
  assert score.baselines == {'majority': pytest.approx(4 / 7), 'tf-idf': pytest.approx(4 / 7)}


@pytest.mark.parametrize('evaluator, metric', [('glue', 'accuracy'), ('classification', 'top-1')])
def test_an_answer_that_the_target_set_lacks_is_never_right(evaluator, metric):
  """The model always gives the first entry, which is also the label of such an example."""
  rows = [{'a': 'x', 'label': 'maybe'}] * 7

  def score(**options):
    return _evaluate(evaluator, _text(), ('no', 'yes'), _examples(7, **options), _Predicts(np.zeros(7, int), 2),
                     rows, rows)[metric]
  assert score().value == pytest.approx(3 / 7) and score(unanswered=(0, 2, 4)).value == pytest.approx(1 / 7)
  assert score(unanswered=(0, 2, 4)).baselines == {'tf-idf': 0}  # which knows no answer of the target set


@pytest.mark.parametrize('evaluator, metric', [('glue', 'accuracy'), ('classification', 'top-1')])
def test_a_score_has_the_number_of_examples_of_a_baseline_on_a_part_of_them(evaluator, metric):
  rows = [{'a': 'x', 'label': 'no'}] * 7
  score = _evaluate(
      evaluator, _text(), ('no', 'yes'), _examples(7), _Predicts(LABELS, 2), rows, rows, _FewEvaluated)[metric]
  assert score.baselines.keys() == {'majority', 'tf-idf'} and score.baseline_counts == {'tf-idf': 2}


class _Broken(_Predicts):
  def __init__(self, score, V):
    super().__init__([], V)
    self.score = score

  def ranked(self, views, task, labels):
    return predictor.rank(np.full((*labels.shape, self.V), self.score, np.float32), labels)


@pytest.mark.parametrize('broken', [np.nan, 0.0])
def test_a_model_whose_scores_are_nan_or_equal_has_no_right_answer_in_any_metric_of_glue(broken):
  scores = _evaluate('glue', _text(), ('no', 'yes'), _examples(7), _Broken(broken, 2), baselines=False)
  assert {name: s.value for name, s in scores.items()} == {'accuracy': 0, 'F1': 0, 'Matthews': -1}


@pytest.mark.parametrize('broken', [np.nan, 0.0])
def test_a_model_whose_scores_are_nan_or_equal_has_no_right_answer_to_a_question(broken):
  """The first entry would be right for two of three."""
  task, examples = _text(), _examples(3, lambda ids: [ANSWERS[i] for i in ids])
  task.update(type='vqa', label_column='answers', max_predictions=10)
  scores = _evaluate('vqa', task, ('Cat', 'dog'), examples, _Broken(broken, 2), baselines=False)
  assert {name: s.value for name, s in scores.items()} == {'soft score': 0, 'exact_match': 0}


def test_three_label_words_have_an_accuracy_alone():
  assert set(_evaluate('glue', _text(), ('no', 'maybe', 'yes'), _examples(7), _Predicts(LABELS, 3),
                       baselines=False)) == {'accuracy'}


def test_questions_about_arrays_have_one_answer_each(tmp_path):
  c = tiny.config(data_dir=tiny.data_dir())
  c.tasks.t = config_lib.task('vqa', 'glyphs', batch_size=2, target_set='s', label_column='class', max_len=12,
                              template='{face} <eot> <spe> . <eot>')
  c.target_sets.s = config_lib.target_set('glyphs/class', family='words')
  c.evaluators.e = config_lib.evaluator('vqa', 't', split='train', batch_size=5)
  plan = make_plan(c)
  data, [e] = Data(c, plan), plan.evaluations
  keys, records = data.entry_keys['s'], data.records('glyphs', 'train')
  labels = records.labels['class']
  for answers, right in ((labels, 1.0), ((labels + 1) % len(keys), 0.0)):
    scores = {s.name: s for s in EVALUATORS['vqa'](Query(
        e, _Predicts(answers, len(keys)), data.examples(e.task), records, records, keys, keys, None, {}, tmp_path))}
    assert scores['exact_match'].value == right
    common = statistics.mode(keys[i] for i in labels)
    assert {f'always {common!r}', 'question alone', 'nearest neighbor'} == scores['soft score'].baselines.keys()
    assert scores['exact_match'].baselines == scores['soft score'].baselines  # one annotator: 1 or 0


def test_questions_score_by_how_many_people_agree():
  task = config_lib.task('vqa', 'own:x', batch_size=1, target_set='s', label_column='answers',
                         template='{a} <spe> <eot>', max_len=8, max_predictions=10)
  examples = _examples(3, lambda ids: [ANSWERS[i] for i in ids])
  purrs, flies = {'a': 'what purrs', 'answers': ('a cat',)}, {'a': 'what flies', 'answers': ('bird',)}
  trained = [flies, purrs] * 3 + [purrs]
  evaluated = [{'a': a, 'answers': several} for a, several in zip(('it purrs', 'it flies', 'it flies'), ANSWERS)]
  scores = _evaluate('vqa', task, ('Cat', 'dog'), examples, _Predicts([0, 0, 1], 2), trained, evaluated)
  # Four of ten answered cat: 1; ten: 1; nobody dog: 0. The most frequent answers are dog, cat, bird.
  assert scores['soft score'].value == pytest.approx(2 / 3)
  # Of 1, 1, 0 the variance is (1/9 + 1/9 + 4/9) / 2 = 1/3, that of their mean 1/9.
  assert scores['soft score'].standard_error == pytest.approx(1 / 3)
  assert scores['exact_match'].value == pytest.approx(1 / 3)
  # The most frequent answer in training is cat, though that of the evaluated questions is dog: 1, 1, 0. By their
  # questions: cat, bird, bird.
  assert scores['soft score'].baselines == {"always 'cat'": pytest.approx(2 / 3), 'tf-idf': pytest.approx(2 / 3)}
  assert scores['exact_match'].baselines == {"always 'cat'": pytest.approx(1 / 3), 'tf-idf': pytest.approx(1 / 3)}
  without = _evaluate('vqa', task, ('Cat', 'dog'), examples, _Predicts([0, 0, 1], 2), trained, evaluated,
                      baselines=False)
  assert without['soft score'].baselines == {} and without['soft score'].value == scores['soft score'].value
  untrained = _evaluate('vqa', task, ('Cat', 'dog'), examples, _Predicts([0, 0, 1], 2), [], evaluated)
  assert untrained['soft score'].baselines == {}  # no answer to learn
  of_two = _evaluate('vqa', task, ('Cat', 'dog'), examples, _Predicts([0, 0, 1], 2), trained, evaluated, _FewEvaluated)
  assert of_two['exact_match'].baseline_counts == of_two['soft score'].baseline_counts == {'tf-idf': 2}
