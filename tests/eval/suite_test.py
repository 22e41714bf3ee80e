"""A whole tiny run: trained, evaluated, reported."""

import json
import threading
import types
import warnings

import jax
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
from uni_moe_jax.eval import samples, suite
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


def _write_one(workdir, value, num_examples, model=''):
  """Writes an evaluation by one evaluator without a model. Returns its plan."""
  c = tiny.config('shape', data_dir=tiny.data_dir())
  c.evaluators.e = config_lib.evaluator('classification', 'shape', split='train', num_examples=num_examples)
  plan = make_plan(c)
  rows = [Score.proportion('top-1', value, 4).row('e', 3)]
  suite.write(workdir, rows, {}, suite._made_by(plan, {'e': 'print'}, model))
  return plan


def test_an_evaluation_counts_for_the_model_that_was_evaluated_alone(tmp_path):
  plan = _write_one(tmp_path, .5, 4, 'of a model')
  assert [row['value'] for row in suite.finished_rows(tmp_path, plan, 3, model='of a model')] == [.5]
  assert suite.finished_rows(tmp_path, plan, 3, model='of another') == []
  (tmp_path / suite.EVALUATORS_FILE).unlink()
  assert suite.finished_rows(tmp_path, plan, 3, model='of a model') == []


def test_an_evaluation_that_ends_while_it_writes_never_has_scores_of_other_evaluators(tmp_path):
  first = _write_one(tmp_path, .5, 4)
  (tmp_path / samples.FILE).unlink()
  (tmp_path / samples.FILE).mkdir()  # which a file cannot replace
  with pytest.raises(OSError):
    _write_one(tmp_path, .75, 2)
  assert suite.finished_rows(tmp_path, first, 3) == []
  (tmp_path / samples.FILE).rmdir()
  second = _write_one(tmp_path, .75, 2)
  assert [row['value'] for row in suite.finished_rows(tmp_path, second, 3)] == [.75]
  assert suite.finished_rows(tmp_path, first, 3) == []


def test_an_evaluation_on_other_data_does_not_count(tmp_path):
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
  plan = make_plan(c)
  rows = [Score.proportion('top-1', .5, 4).row('e', 3)]
  suite.write(tmp_path, rows, {}, suite._made_by(plan, Data(c, plan).evaluation_fingerprints(), ''))
  finished = lambda: suite.finished_rows(tmp_path, plan, 3, c)
  assert finished() == rows
  names.write_text('x\ny\tyes\nz\n')
  assert finished() == []
  names.write_text('x\ny\nz\n')
  prepare_texts('y', '2.0.0')
  assert finished() == [] and suite.finished_rows(tmp_path, plan, 3) == rows  # about any data
  names.unlink()
  assert finished() == rows  # they cannot be made again


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


def _run(num_threads, measure):
  """Scores of two evaluators of one task and one of another, which a function of the name makes."""
  named = [types.SimpleNamespace(name=name, task=types.SimpleNamespace(name=name[0])) for name in ('a1', 'a2', 'b1')]
  return [(name, s.value) for name, s in suite.run(named, lambda e: [Score('top-1', measure(e.name), 1)], num_threads)]


def test_two_tasks_are_evaluated_at_once_and_returned_in_order():
  both, threads = threading.Barrier(2, timeout=60), {}

  def meet(name):
    threads[name] = threading.get_ident()
    if name != 'a2':
      both.wait()  # 'a1' waits for 'b1'
    return float(name[1])
  assert _run(2, meet) == [('a1', 1.), ('a2', 2.), ('b1', 1.)]
  assert threads['a1'] == threads['a2'] != threads['b1']  # a task's evaluators share programs


def test_fits_of_baselines_warn_in_no_thread_and_have_one_each_after_another_one_has_ended(recwarn):
  ended, num_threads = threading.Event(), []

  def fit(name):
    with warnings.catch_warnings(), threadpoolctl.threadpool_limits(1):  # its end restores both for all threads
      warnings.warn(name, exceptions.ConvergenceWarning, stacklevel=1)
    if name == 'b1':
      assert ended.wait(60)
    num_threads.extend(pool['num_threads'] for pool in threadpoolctl.threadpool_info() if pool['user_api'] == 'blas')
    ended.set()
    return 0.
  with threadpoolctl.threadpool_limits(2):
    _run(2, fit)
  assert not recwarn and num_threads and {*num_threads} == {1}
  warnings.warn('afterward', exceptions.ConvergenceWarning, stacklevel=1)
  assert len(recwarn) == 1


def test_in_one_thread_evaluators_run_in_their_order_until_the_first_error():
  names = []

  def fail(name):
    names.append(name)
    if name == 'a2':
      raise ValueError(name)
    return 0.
  with pytest.raises(ValueError, match='a2'):
    _run(1, fail)
  assert names == ['a1', 'a2']


@pytest.mark.parametrize('error, is_awaited', [(KeyboardInterrupt, False), (ValueError, True)])
def test_ctrl_c_does_not_wait_for_the_evaluator_that_runs_and_an_error_does(error, is_awaited):
  both, ended, awaited = threading.Barrier(2, timeout=60), threading.Event(), []

  def fail(name):
    both.wait()
    if name == 'a1':
      raise error
    awaited.append(not ended.wait(.5))
    return 0.
  with pytest.raises(error):
    _run(2, fail)
  so_far = list(awaited)
  ended.set()
  assert so_far == [True] * is_awaited


def test_a_folder_that_cannot_be_written_is_an_error_before_the_evaluation(tmp_path):
  (tmp_path / 'file').touch()
  c = tiny.config('shape', data_dir=tiny.data_dir())
  c.evaluators.e = config_lib.evaluator('classification', 'shape', split='train')
  cannot_evaluate = types.SimpleNamespace(evaluation_fingerprints=lambda: {'e': ''}, inputs_fingerprint='')
  with pytest.raises(OSError, match='Not a directory'):
    suite.evaluate(make_plan(c), cannot_evaluate, types.SimpleNamespace(mesh=None), 3, tmp_path / 'file')
