"""What a comparison reports: every run, failed ones too, and whether only routers differ."""

import json

import pytest

from tests.helpers import tiny
from uni_moe_jax.analysis import compare_results, compare_stages
from uni_moe_jax.train import workdir

_TASKS = ['names', 'motion']


def _part(sign):
  """A matrix whose second row has no base."""
  bounds = lambda v: {'value': v, 'low': [[x - .1 for x in r] for r in v], 'high': [[x + .1 for x in r] for r in v]}
  return {'part': 'all', 'delta': bounds([[2, sign * .5], [.3, .05]]), 'ratio_of_means': bounds([[1, sign * .25], [6, 1]]),
          'between': {'value': sign * .25, 'low': sign * .25 - .1, 'high': sign * .25 + .1},
          'negative': {'value': float(sign < 0), 'low': 0., 'high': 1.}}


def _interference(sign, name):
  return {'checkpoint': name, 'parameters': 'ffn_out', 'batches': 4, 'tasks': _TASKS, 'parts': [_part(sign), _part(-sign)]}


def _experts():
  return {'routers': ['attention', 'mlp'], 'effective_experts': [[[1., 2.], [2., 2.]], [[2., 2.], [2., 2.]]],
          'tasks': {'names': {}, 'motion': {}}, 'mean_task_overlap': [[1, .25], [.25, 1]]}


def _write(where, content):
  where.write_text(json.dumps(content))


def _finish(folder, router, steps=6, data='print', **changes):
  """What the stages of a router leave."""
  where = folder / router
  config = tiny.config('shape', data_dir=tiny.data_dir())
  config.moe.router = router
  config.optim.update(changes)
  workdir.claim_workdir(where, config, data)
  log = [{'stage': s.name, 'command': '', 'code': 0, 'seconds': 10.} for s in compare_stages.stages(router, 'c', 'f', 4, [], False)]
  _write(where / compare_stages.LOG, [{'stage': compare_stages.TRAIN, 'command': '', 'code': 75, 'seconds': 2.5}, *log])
  _write(where / 'run.json', {'parameters': {'total': 3200, 'active': 1600}, 'seed': 0, 'commit': 'c' * 40})
  lines = [{'step': s, 'steps_per_second': r} for s, r in ((2, 1.), (4, 2.), (steps, 4.))]
  (where / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  row = dict(evaluator='class', metric='top-1', value=.5, standard_error=.1, chance=.1, floors={'1-nn': .7})
  _write(where / 'evaluation.json', [row])
  _write(where / 'interference_init.json', _interference(1, 'init'))
  _write(where / 'interference.json', _interference(-1, 'step 6'))
  if router != 'dense':
    _write(where / 'experts.json', _experts())
    (where / 'experts.png').write_bytes(b'a picture')


@pytest.fixture(name='folder', scope='module')
def _folder(tmp_path_factory):
  """dense and task are finished; token failed at its start; context was not started."""
  folder = tmp_path_factory.mktemp('compare')
  _finish(folder, 'dense')
  _finish(folder, 'task')
  (folder / 'token').mkdir()
  _write(folder / 'token' / compare_stages.LOG, [{'stage': compare_stages.TRAIN, 'command': '', 'code': 1, 'seconds': 3.}] * 2)
  return folder


@pytest.fixture(name='found', scope='module')
def _found(folder):
  return compare_results.collect(folder, ['dense', 'task', 'token', 'context'], 'configs/c.py', 'python launch/compare.py')


def test_every_run_is_there_with_what_it_left(found):
  dense, task, token, context = found['runs']
  assert (dense['status'], dense['steps'], dense['seconds_per_step']) == ('finished', 6, .5)  # the median of 1, 2 and 4 steps/s
  assert dense['seconds'][compare_stages.TRAIN] == 12.5 and dense['tries'][compare_stages.TRAIN] == [75, 0]
  assert dense['experts'] is None
  assert task['experts']['effective'] == {'attention': pytest.approx(1.75), 'mlp': pytest.approx(2)}
  assert task['experts']['overlap'] == pytest.approx(.25)
  assert token['status'] == 'train failed with exit code 1' and token['seconds'] == {'train': 6}
  assert token['evaluation'] == [] and token['interference'] == {'before': None, 'after': None}
  assert context['status'] == 'not started'
  assert found['breaches'] == ['token: train failed with exit code 1.', 'context: not started.']


def test_the_folder_holds_all_that_is_said_and_no_path_of_the_machine(found, folder):
  text = compare_results.write(found, folder)
  out = folder / compare_results.FOLDER
  assert sorted(p.name for p in out.iterdir()) == [
      'experts_task.png', 'interference_dense.png', 'interference_task.png', 'results.json', 'results.md']
  assert json.loads((out / 'results.json').read_text()) == json.loads(json.dumps(found))
  assert (out / 'results.md').read_text() == text + '\n'
  for said in (
      '| dense | 6 | 3,200 | 1,600 | 0.50 | 12 | 72 | finished |', '| token | 0 |  |  |  | 6 | 6 | train failed with exit code 1 |',
      '* context: not started.', '| evaluator | metric | chance | floors | dense | task | token | context |',
      '| class | top-1 | 0.1 | 1-nn 0.700 | 0.500 ± 0.196 | 0.500 ± 0.196 |  |  |',
      '| task | 0.25 (0.15 … 0.35) | 0.00 (0.00 … 1.00) | -0.25 (-0.35 … -0.15) | 1.00 (0.00 … 1.00) |', '| token |  |  |  |  |',
      '| router | attention experts | mlp experts | overlap |', '| task | 1.75 | 2.00 | 0.25 |', 'task, after (step 6):',
      '| names | 1.00 | -0.25 |', '| motion ° | 6.00 | 1.00 |', '![experts, task](experts_task.png)', 'commit cccccccccccc,'):
    assert said in text, said
  assert str(folder) not in text + (out / 'results.json').read_text()


@pytest.mark.parametrize('changes, said', [
    ({}, None), (dict(learning_rate=.5), 'task and dense differ in more than their router: optim.learning_rate: 0.01 → 0.5.'),
    (dict(data='other'), 'the data (its fingerprint)'), (dict(steps=5), 'steps: 6 → 5')])
def test_runs_that_differ_in_more_than_their_router_are_told(tmp_path, changes, said):
  _finish(tmp_path, 'dense')
  _finish(tmp_path, 'task', **changes)
  found = compare_results.collect(tmp_path, ['dense', 'task'], 'c', 'p')['breaches']
  assert found == [] if said is None else said in found[0]
