"""The report of a router ablation: every run, failed ones too, and whether only routers differ."""

import json

import numpy as np
import pytest

from tests.helpers import tiny
from uni_moe_jax.analysis.sweep import grid, results, runner
from uni_moe_jax.train import workdir as workdir_lib

_TASKS = ['names', 'motion']


def _subset(sign):
  """A matrix whose second row has no base."""
  def bounds(value):
    return {'value': value, 'low': np.subtract(value, .1).tolist(), 'high': np.add(value, .1).tolist()}
  return {'subset': 'all', 'delta': bounds([[2, sign * .5], [.3, .05]]),
          'ratio_of_means': bounds([[1., sign * .25], [6., 1.]]),
          'mean_of_pairs': {'value': sign * .25, 'low': sign * .25 - .1, 'high': sign * .25 + .1},
          'negative_share': {'value': float(sign < 0), 'low': 0., 'high': 1.}}


def _interference(sign, checkpoint):
  return {'checkpoint': checkpoint, 'parameters': 'ffn_out', 'num_batches': 4, 'tasks': _TASKS,
          'subsets': [_subset(sign), _subset(-sign)]}


def _experts():
  return {'sublayers': ['attention', 'mlp'], 'effective_experts': [[[1., 2.], [2., 2.]], [[2., 2.], [2., 2.]]],
          'tasks': {'names': {}, 'motion': {}}, 'mean_task_overlap': [[1, .25], [.25, 1]]}


def _cells(folder, *routers):
  names = 'interference at init', 'compile', 'train', 'evaluate', 'interference', 'report'
  stages = tuple(grid.Stage(name, ()) for name in names)
  return [grid.Cell(folder / f'{router}-0', router, '', 0, stages) for router in routers]


def _attempt(stage, exit_code=0, seconds=10.):
  return {'stage': stage, 'command': '', 'exit_code': exit_code, 'seconds': seconds}


def _finish(workdir, router, steps=6, data='print', **optim):
  """Writes what the stages of a router leave."""
  [cell] = _cells(workdir, router)
  path = cell.folder
  config = tiny.config('shape', data_dir=tiny.data_dir())
  config.moe.router = router
  config.optim.update(optim)
  workdir_lib.claim_workdir(path, config, data)
  lines = [{'step': s, 'steps_per_second': r} for s, r in ((2, 1.), (4, 2.), (steps, 4.))]
  (path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  row = dict(evaluator='class', metric='top-1', value=.5, standard_error=.1, chance=.1, baselines={'neighbor': .7})
  contents = {
      runner.LOG: [_attempt('train', 75, 2.5), *(_attempt(s.name) for s in cell.stages)], 'evaluation.json': [row],
      'run.json': {'parameters': {'total': 3200, 'active': 1600}, 'seed': 0, 'commit': 'c' * 40},
      'interference_init.json': _interference(1, 'init'), 'interference.json': _interference(-1, 'step 6')}
  if router != 'dense':
    contents['experts.json'] = _experts()
    (path / 'experts.png').write_bytes(b'a figure')
  for name, content in contents.items():
    (path / name).write_text(json.dumps(content))


@pytest.fixture(name='workdir', scope='module')
def _workdir(tmp_path_factory):
  """dense and task are finished; token failed in training; context was not started."""
  workdir = tmp_path_factory.mktemp('sweep')
  _finish(workdir, 'dense')
  _finish(workdir, 'task')
  (workdir / 'token-0').mkdir()
  (workdir / 'token-0' / runner.LOG).write_text(json.dumps([_attempt('train', 1, 3.)] * 2))
  return workdir


@pytest.fixture(name='report', scope='module')
def _report(workdir):
  cells = _cells(workdir, 'dense', 'task', 'token', 'context')
  return results.collect('routers', cells, 'configs/c.py', 'python launch/sweep.py')


def test_every_run_is_reported_with_what_it_left(report):
  dense, task, token, context = report['cells']
  # 1, 2 and 4 steps per second
  assert (dense['status'], dense['steps'], dense['seconds_per_step']) == ('finished', 6, .5)
  assert dense['seconds']['train'] == 12.5 and dense['exit_codes']['train'] == [75, 0]
  assert dense['experts'] is None
  assert task['experts']['effective'] == {'attention': pytest.approx(1.75), 'mlp': pytest.approx(2)}
  assert task['experts']['overlap'] == pytest.approx(.25)
  assert token['status'] == 'train failed with exit code 1' and token['seconds'] == {'train': 6}
  assert token['evaluation'] == [] and token['interference'] == {'init': None, 'final': None}
  assert context['status'] == 'not started'
  assert report['errors'] == ['token-0: train failed with exit code 1.', 'context-0: not started.']


def test_the_results_have_tables_and_figures_and_no_path_of_the_machine(report, workdir):
  text = results.write(report, workdir)
  out = workdir / results.FOLDER
  assert sorted(p.name for p in out.iterdir()) == [
      'experts_task-0.png', 'interference_dense-0.png', 'interference_task-0.png', 'results.json', 'results.md']
  assert json.loads((out / 'results.json').read_text()) == json.loads(json.dumps(report))
  assert (out / 'results.md').read_text() == text + '\n'
  for line in (
      '# Router ablation', '| dense-0 | 6 | 3,200 | 1,600 | 0.50 | 12 | 62 | finished |',
      '| token-0 | 0 |  |  |  | 6 | 6 | train failed with exit code 1 |', '* context-0: not started.',
      '| evaluator | metric | chance | baselines | dense | task | token | context |',
      '| class | top-1 | 0.1 | neighbor 0.700 | 0.500 ± 0.196 | 0.500 ± 0.196 |  |  |',
      'alone: one seed does not show',
      '| task-0 | 0.25 (0.15 … 0.35) | 0.00 (0.00 … 1.00) | -0.25 (-0.35 … -0.15) | 1.00 (0.00 … 1.00) |',
      '| token-0 |  |  |  |  |', '| run | attention experts | mlp experts | overlap |',
      '| task-0 | 1.75 | 2.00 | 0.25 |',
      'task-0 at step 6:', '| names | 1.00 | -0.25 |', '| motion ° | 6.00 | 1.00 |',
      '![experts, task-0](experts_task-0.png)', 'seed 0, commit cccccccccccc,'):
    assert line in text, line
  assert str(workdir) not in text + (out / 'results.json').read_text()


@pytest.mark.parametrize('changes, message', [
    ({}, None),
    (dict(learning_rate=.5), 'task-0 and dense-0 differ in more than their variant: optim.learning_rate: 0.01 → 0.5.'),
    (dict(data='other'), 'the data (its fingerprint)'), (dict(steps=5), 'task-0 has 5 of 6 steps.'),
    (dict(weight_decay=.5, fields=('optim.weight_decay=0.5',)), None)])
def test_runs_that_differ_in_more_than_their_variant_are_an_error(tmp_path, changes, message):
  dense, task = _cells(tmp_path, 'dense', 'task')
  task = task._replace(fields=changes.pop('fields', ()))
  _finish(tmp_path, 'dense')
  _finish(tmp_path, 'task', **changes)
  errors = results.collect('routers', [dense, task], 'c', 'p')['errors']
  assert errors == [] if message is None else message in errors[0]
