"""A whole tiny run: trained, evaluated, reported."""

import contextlib
import dataclasses
import functools
import json
import math
import threading
import types
import warnings

import jax
import numpy as np
import pytest
import threadpoolctl
from sklearn import exceptions

from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.analysis import run_expert_usage
from uni_moe_jax.config import metric_names
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches.assemble import Data
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.eval import baselines, samples, suite
from uni_moe_jax.eval.metrics import Score
from uni_moe_jax.reporting import html
from uni_moe_jax.train import checkpoint, loop
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train.workdir import load_config


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """(workdir, rows) of three steps with a task router, averaged parameters and all evaluators.

  Texts alone are trained, which saves a compilation; the other tasks are evaluated.
  """
  workdir = tmp_path_factory.mktemp('run')
  c = tiny.config('shape', 'text', 'caption', 'pair', data_dir=tiny.data_dir())
  untrained = [c.tasks[name] for name in ('shape', 'caption', 'pair')]
  for task in untrained:
    task.batch_size = 0
  c.model.extra_temperature_groups = tuple(task.type for task in untrained)
  c.moe.router = 'task'
  c.train.update(dict(steps=3, ema_decay=0.5))
  for evaluator, task in (('classification', 'shape'), ('retrieval', 'pair'), ('caption', 'caption'), ('mlm', 'text')):
    c.evaluators[f'my {task}'] = config_lib.evaluator(evaluator, task, split='train', batch_size=6)
  c.evaluators['my pair'].num_draws = 3
  assert loop.train(c, str(workdir), jax.devices()[:1]) == loop.FINISHED
  with checkpoint.Checkpoints(workdir, 1) as checkpoints:
    run = train_run.build(load_config(workdir), jax.devices()[:1])
    params, _ = train_run.read_params(run, checkpoints)
  run_expert_usage.write_after_evaluation(run, params, 3, workdir)
  return workdir, suite.evaluate(run.plan, run.data, run.predictor(params), 3, workdir)


def test_every_evaluator_has_its_rows(finished):
  _, rows = finished
  first = ('top-1', 'i2t_R@1', 'exact_match', 'perplexity')
  assert [(r['evaluator'], r['metric']) for r in rows if r['metric'] in first] == [
      ('my caption', 'exact_match'), ('my pair', 'i2t_R@1'), ('my shape', 'top-1'), ('my text', 'perplexity')]
  assert all(r['baselines'] and r['step'] == 3 for r in rows)


def test_the_config_names_every_metric_and_which_are_lower_is_better(finished):
  workdir, rows = finished
  evaluations = {e.name: e for e in make_plan(load_config(workdir)).evaluations}
  for name, e in evaluations.items():
    known = metric_names.metric_names(e.type, e.task.type.name)
    measured = [r['metric'] for r in rows if r['evaluator'] == name]
    V = 3 if e.type == 'classification' else 0
    assert sorted(measured) == sorted(m for m in known if metric_names.is_measured(m, V)), name
  assert {r['metric'] for r in rows if not r['higher_is_better']} == {'perplexity'}


def test_perplexity_of_an_untrained_model_is_about_the_vocabulary(finished):
  row = next(r for r in finished[1] if r['metric'] == 'perplexity')
  assert 20 < row['value'] < 60 and 0 < row['standard_error'] < 20  # V is 40


def test_the_reported_values_are_weighted_means_of_the_scores_of_examples(finished):
  workdir, rows = finished
  with np.load(workdir / suite.EXAMPLES_FILE) as arrays:
    examples = {tuple(key.rsplit('/', 1)): arrays[key] for key in arrays.files}
  of_all = {(r['evaluator'], r['metric']): r for r in rows}
  assert of_all.keys() - examples.keys() == {('my caption', 'BLEU-4'), ('my shape', 'balanced_accuracy')}
  for key, (values, weights) in examples.items():
    row, mean = of_all[key], np.average(values.astype(float), weights=weights)
    assert (math.exp(-mean) if key[1] == 'perplexity' else mean) == pytest.approx(row['value'], rel=1e-5), key
    assert weights.sum() == row['count'] * (3 if 'R@' in key[1] else 1), key  # recall: three draws of candidates
  assert len(set(examples['my text', 'perplexity'][1])) > 1  # texts have different numbers of masked words


def test_an_evaluation_has_the_step_of_its_checkpoint(finished, tmp_path):
  assert suite.evaluated_step(finished[0]) == 3
  assert suite.evaluated_step(tmp_path) is None


def test_a_finished_evaluation_counts_for_its_step_and_its_evaluators_alone(finished):
  workdir, rows = finished
  c = load_config(workdir)
  assert suite.finished_rows(workdir, make_plan(c), 3) == rows
  assert suite.finished_rows(workdir, make_plan(c), 3, c) == rows
  assert suite.finished_rows(workdir, make_plan(c), 2) == []
  c.evaluators['my shape'].num_examples = 2
  assert suite.finished_rows(workdir, make_plan(c), 3) == []


def _evaluate_one(workdir, monkeypatch, value, num_examples):
  """Writes an evaluation by one evaluator without a model. Returns its plan."""
  c = tiny.config('shape', data_dir=tiny.data_dir())
  c.evaluators.e = config_lib.evaluator('classification', 'shape', split='train', num_examples=num_examples)
  monkeypatch.setattr(suite, '_measure', lambda *_, **__: [('e', Score.proportion('top-1', value, 4))])
  plan = make_plan(c)
  data = types.SimpleNamespace(evaluation_fingerprints=lambda: {'e': 'print'}, inputs_fingerprint='print')
  suite.evaluate(plan, data, types.SimpleNamespace(mesh=None), 3, workdir)
  return plan


def test_an_evaluation_without_the_record_of_its_evaluators_does_not_count(tmp_path, monkeypatch):
  plan = _evaluate_one(tmp_path, monkeypatch, .5, 4)
  assert [row['value'] for row in suite.finished_rows(tmp_path, plan, 3)] == [.5]
  (tmp_path / suite.EVALUATORS_FILE).unlink()  # as of an earlier version
  assert suite.finished_rows(tmp_path, plan, 3) == []


def test_an_evaluation_without_the_digest_of_its_model_counts_unless_that_of_another_run_was_evaluated(
    tmp_path, monkeypatch):
  plan, file = _evaluate_one(tmp_path, monkeypatch, .5, 4), tmp_path / suite.EVALUATORS_FILE
  trains_nothing, finished = dataclasses.replace(plan, tasks=()), functools.partial(suite.finished_rows, tmp_path)
  assert finished(plan, 3) == finished(trains_nothing, 3) != [] == finished(plan, 3, model='of another')
  made_by = json.loads(file.read_text())
  del made_by['e']['model_fingerprint']  # as of an earlier version
  file.write_text(json.dumps(made_by))
  assert [row['value'] for row in finished(plan, 3, model='of a model')] == [.5]
  assert finished(trains_nothing, 3, model='of a model') == []


@pytest.mark.parametrize('number', [1, 2, 3, 4])
def test_an_evaluation_that_is_killed_while_it_writes_never_has_scores_of_other_evaluators(
    tmp_path, monkeypatch, number):
  first, writes = _evaluate_one(tmp_path, monkeypatch, .5, 4), []

  def write(path, content):
    writes.append(path.name)
    if len(writes) == number:
      raise KeyboardInterrupt
    write_json(path, content)

  write_json = suite.write_json
  monkeypatch.setattr(suite, 'write_json', write)
  with pytest.raises(KeyboardInterrupt):
    _evaluate_one(tmp_path, monkeypatch, .75, 2)
  assert [row['value'] for row in suite.finished_rows(tmp_path, first, 3)] in ([], [.5])
  monkeypatch.undo()
  second = _evaluate_one(tmp_path, monkeypatch, .75, 2)
  assert [row['value'] for row in suite.finished_rows(tmp_path, second, 3)] == [.75]
  assert suite.finished_rows(tmp_path, first, 3) == []


def test_an_evaluation_on_other_data_does_not_count(tmp_path, monkeypatch):
  (tmp_path / 'in').mkdir()

  def prepare_texts(label, version):
    lines = [{'text_a': f'text {i}', 'label': y} for i, y in enumerate((label, *'yzxyz'))]
    (tmp_path / 'in/train.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    prepare.prepare(tmp_path / 'in', tmp_path, 'three', version, test_fraction=0.0)

  prepare_texts('x', '1.0.0')
  names = tmp_path / 'names.txt'
  names.write_text('x\ny\nz\n')
  c = tiny.config(data_dir=str(tmp_path))
  c.tokenizer.path = tiny.tokenizer_file()
  c.target_sets.three = config_lib.target_set('file:names.txt', family='words')
  c.tasks.t = config_lib.task('text_classification', 'own:three', batch_size=8, target_set='three', max_len=8,
                              label_column='label', template='{text_a} <eot> <spe>')
  c.evaluators.e = config_lib.evaluator('classification', 't', split='train')
  monkeypatch.setattr(suite, '_measure', lambda *_, **__: [('e', Score.proportion('top-1', .5, 4))])
  plan = make_plan(c)
  rows = suite.evaluate(plan, Data(c, plan), types.SimpleNamespace(mesh=None), 3, tmp_path)
  finished = lambda: suite.finished_rows(tmp_path, plan, 3, c)
  assert finished() == rows
  names.write_text('x\ny\tyes\nz\n')
  assert finished() == []
  names.write_text('x\ny\nz\n')
  prepare_texts('y', '2.0.0')
  assert finished() == [] and suite.finished_rows(tmp_path, plan, 3) == rows  # about any data
  names.unlink()
  assert finished() == rows  # they cannot be made again


def test_a_damaged_file_of_evaluators_is_written_again(tmp_path, monkeypatch):
  (tmp_path / suite.EVALUATORS_FILE).write_text('{')
  plan = _evaluate_one(tmp_path, monkeypatch, .75, 2)
  assert [row['value'] for row in suite.finished_rows(tmp_path, plan, 3)] == [.75]


def test_experts_have_two_coefficients_per_layer_router_and_condition(finished):
  experts = json.loads((finished[0] / 'experts.json').read_text())
  assert experts['checkpoint'] == 'step 3' and (finished[0] / 'experts.png').exists()
  assert experts['conditions'] == ['mlm', 'caption', 'retrieval', 'classification', 'words', 'names']
  table = experts['coefficients']
  assert (len(table), len(table[0]), len(table[0][0]), len(table[0][0][0])) == (2, 2, 6, 4)
  for row in (r for layer in table for router in layer for r in router):
    # Six digits are written of each; as whole numbers, since 1 - 0.999999 is more than 1e-6 in floating point.
    assert sum(c > 0 for c in row) == 2 and abs(sum(round(10**6 * c) for c in row) - 10**6) <= 1


def test_the_report_shows_the_run(finished):
  page = html.write_report(finished[0]).read_text()
  for shown in ('my caption', 'loss', 'Experts', '<svg', 'data:image/png'):
    assert shown in page


def _evaluate(monkeypatch, tmp_path, num_cores, scores):
  """Rows of two evaluators of one task and one of another, whose scores are made by a function of the name."""
  named = [types.SimpleNamespace(name=name, task=types.SimpleNamespace(name=name[0])) for name in ('a1', 'a2', 'b1')]
  settings = types.SimpleNamespace(evaluators={})
  plan, predictor = types.SimpleNamespace(evaluations=named, config=settings), types.SimpleNamespace(mesh=None)
  monkeypatch.setattr(suite.cores, 'available', lambda: num_cores)

  def with_sample(e, data, predictor, shown):
    value = scores(e.name)
    shown[e.name] = [value]
    return [Score('top-1', value, 1, per_example=np.array([value]))]
  monkeypatch.setattr(suite, 'scores', with_sample)
  return suite.evaluate(plan, types.SimpleNamespace(evaluation_fingerprints=dict), predictor, 1, tmp_path)


def test_on_one_cpu_two_tasks_are_evaluated_at_once_and_written_in_order(monkeypatch, tmp_path):
  both, threads = threading.Barrier(2, timeout=60), {}

  def meet(name):
    threads[name] = threading.get_ident()
    if name != 'a2':
      both.wait()  # 'a1' waits for 'b1'
    return float(name[1])
  rows = _evaluate(monkeypatch, tmp_path, 2, meet)
  assert [(r['evaluator'], r['value']) for r in rows] == [('a1', 1.), ('a2', 2.), ('b1', 1.)]
  assert threads['a1'] == threads['a2'] != threads['b1']  # a task's evaluators share programs
  assert list(json.loads((tmp_path / samples.FILE).read_text())) == ['a1', 'a2', 'b1']


def test_a_fit_of_a_baseline_that_ends_early_warns_in_no_thread(monkeypatch, tmp_path, recwarn):
  def fit(name):
    with warnings.catch_warnings():  # its end restores filters for the other thread, too
      warnings.warn(name, exceptions.ConvergenceWarning, stacklevel=1)
    return 0.
  _evaluate(monkeypatch, tmp_path, 2, fit)
  assert not recwarn
  warnings.warn('afterward', exceptions.ConvergenceWarning, stacklevel=1)
  assert len(recwarn) == 1


def test_a_fit_of_a_baseline_has_one_thread_after_that_of_another_evaluator_ended(monkeypatch, tmp_path):
  first, second, ended, num_threads = *(threading.Event() for _ in range(3)), []
  of_blas = lambda: [pool['num_threads'] for pool in threadpoolctl.threadpool_info() if pool['user_api'] == 'blas']

  def fit(*args):
    if not first.is_set():
      first.set()
      assert second.wait(60)
    else:
      second.set()
      assert ended.wait(60)
      num_threads.extend(of_blas())
    return real_fit(*args)

  def evaluate(name):
    if name != 'a2':
      assert name == 'a1' or first.wait(60)
      baselines.tfidf_logistic([np.array(['a b', 'c d'])], np.array([0, 1]), [np.array(['a'])])
      ended.set()
    return 0.

  real_fit = baselines.linear_model.LogisticRegression.fit
  monkeypatch.setattr(baselines.linear_model.LogisticRegression, 'fit', fit)
  with threadpoolctl.threadpool_limits(2):
    _evaluate(monkeypatch, tmp_path, 2, evaluate)
    assert num_threads and {*num_threads} == {1} and {*of_blas()} == {2}


def test_on_one_core_evaluators_run_in_their_order(monkeypatch, tmp_path):
  names = []
  _evaluate(monkeypatch, tmp_path, 1, lambda name: names.append(name) or 0.)
  assert names == ['a1', 'a2', 'b1']


def test_the_first_error_ends_an_evaluation(monkeypatch, tmp_path):
  names = []

  def fail(name):
    names.append(name)
    raise ValueError(name)
  with pytest.raises(ValueError, match='a1'):
    _evaluate(monkeypatch, tmp_path, 1, fail)
  assert 'a2' not in names and suite.evaluated_step(tmp_path) is None


@pytest.mark.parametrize('error, is_awaited', [(KeyboardInterrupt, False), (ValueError, True)])
def test_ctrl_c_does_not_wait_for_the_evaluator_that_runs_and_an_error_does(monkeypatch, tmp_path, error, is_awaited):
  both, ended, awaited = threading.Barrier(2, timeout=60), threading.Event(), []

  def fail(name):
    both.wait()
    if name == 'a1':
      raise error
    awaited.append(not ended.wait(.5))
    return 0.
  with pytest.raises(error):
    _evaluate(monkeypatch, tmp_path, 2, fail)
  so_far = list(awaited)
  ended.set()
  assert so_far == [True] * is_awaited


def test_a_folder_that_cannot_be_written_is_an_error_before_the_evaluation(monkeypatch, tmp_path):
  (tmp_path / 'file').touch()
  names = []
  with pytest.raises(OSError, match='Not a directory'):
    _evaluate(monkeypatch, tmp_path / 'file', 1, lambda name: names.append(name) or 0.)
  assert not names


def test_a_reader_of_the_last_evaluation_sees_all_of_it_while_the_next_one_is_written(monkeypatch, tmp_path):
  names = (suite.EVALUATION_FILE, samples.FILE, suite.EXAMPLES_FILE)
  values = {'a1': 0.1, 'a2': 0.2, 'b1': 0.3}
  _evaluate(monkeypatch, tmp_path, 1, values.get)
  last = {name: (tmp_path / name).read_bytes() for name in names}
  with contextlib.ExitStack() as stack:
    readers = {name: stack.enter_context(open(tmp_path / name, 'rb')) for name in names}
    _evaluate(monkeypatch, tmp_path, 1, lambda name: values[name] + 0.5)
    assert {name: file.read() for name, file in readers.items()} == last
  assert all((tmp_path / name).read_bytes() != last[name] for name in names)
