"""The results of a router sweep: every run, failed ones too, whether only variants differ, and the page."""

import json

import numpy as np
import pytest

from tests.helpers import tiny
from uni_moe_jax.analysis.sweep import grid, results, router_figures, router_report, routers, runner
from uni_moe_jax.analysis.sweep.variants import VARIANTS
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
  """Two layers, two conditions, two experts."""
  return {'router': 'task', 'checkpoint': 'step 6', 'num_batches': 0, 'layers': [0, 1],
          'sublayers': ['attention', 'mlp'], 'conditions': ['names', 'motion'],
          'coefficients': [[[[.5, .5], [1, 0]]] * 2] * 2,
          'effective_experts': [[[1., 2.], [2., 2.]], [[2., 2.], [2., 2.]]],
          'tasks': {'names': {'visual': 0}, 'motion': {'visual': 1}}, 'mean_task_overlap': [[1, .25], [.25, 1]],
          'entropy': 'is not shown'}


def _cells(folder, *variants, seed=0):
  names = 'interference at init', 'train', 'evaluate', 'interference', 'report'
  stages = tuple(grid.Stage(name, ()) for name in names)
  return [grid.Cell(folder / f'{variant}-{seed}', variant, '', seed, stages) for variant in variants]


def _attempt(stage, exit_code=0, seconds=10., command=''):
  return {'stage': stage, 'command': command, 'exit_code': exit_code, 'seconds': seconds}


def _finish(workdir, variant, steps=6, data='print', seed=0, right=(1, 0, 0, 0), sign=-1, **optim):
  """Writes what the stages of a variant leave. right: the examples. sign: of interference after training."""
  [cell] = _cells(workdir, variant, seed=seed)
  path = cell.folder
  config = tiny.config('shape', data_dir=tiny.data_dir())
  config.moe.router, config.seed = variant, seed
  config.optim.update(optim)
  workdir_lib.claim_workdir(path, config, data)
  losses = ((2, 1., 4), (4, 2., 9), (4, 2., 3), (steps, 4., 2))  # step 4 again after a restart
  lines = [{'step': s, 'steps_per_second': r, 'loss/names': x, 'loss/total': x} for s, r, x in losses]
  (path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  row = dict(evaluator='class', metric='top-1', value=.5, standard_error=.1, chance=.1, baselines={'neighbor': .7},
             higher_is_better=True)
  command = f'uni-moe train --workdir={path}'
  contents = {
      runner.LOG: [_attempt('train', 75, 2.5), *(_attempt(s.name, command=command) for s in cell.stages)],
      'evaluation.json': [row], 'run.json': {
          'parameters': {'total': 3200, 'active': 1600}, 'seed': 0, 'commit': 'c' * 40},
      'interference_init.json': _interference(1, 'init'), 'interference_step_4.json': _interference(sign, 'step 4'),
      'interference.json': _interference(sign, 'step 6')}
  if variant != 'dense':
    contents['experts.json'] = _experts()
    contents['merged.json'] = {'largest_difference': 10**(seed - 7), 'metric': 'class, top-1'}
  for name, content in contents.items():
    (path / name).write_text(json.dumps(content))
  np.savez(path / 'evaluation_examples.npz', **{'class/top-1': np.stack([right, np.ones(4)]).astype(np.float32)})


@pytest.fixture(name='workdir', scope='module')
def _workdir(tmp_path_factory):
  """Two seeds of dense and task are finished; token failed in training; context was not started."""
  workdir = tmp_path_factory.mktemp('sweep')
  for seed in (0, 1):
    _finish(workdir, 'dense', seed=seed)
    _finish(workdir, 'task', seed=seed, right=(1, 1, 0, 0), sign=1)
  (workdir / 'token-0').mkdir()
  (workdir / 'token-0' / runner.LOG).write_text(json.dumps([_attempt('train', 1, 3.)] * 2))
  return workdir


@pytest.fixture(name='report', scope='module')
def _report(workdir):
  cells = [*_cells(workdir, 'dense', 'task', 'token', 'context'), *_cells(workdir, 'dense', 'task', seed=1)]
  return results.collect('routers', cells, ['configs/c.py'], 'python launch/sweep.py')


def test_every_run_is_reported_with_what_it_left(report):
  dense, _, task, _, token, context = report['cells']  # by variant, then by seed
  # 1, 2, 2 and 4 steps per second
  assert (dense['status'], dense['steps'], dense['seconds_per_step']) == ('finished', 6, .5)
  assert dense['seconds']['train'] == 12.5 and dense['exit_codes']['train'] == [75, 0]
  assert dense['experts'] is None and dense['curves'] == {'names': [[2, 4, 6], [4, 3, 2]]}
  assert (dense['final_loss'], token['final_loss']) == (2, None)
  assert task['experts'] == {k: x for k, x in _experts().items() if k != 'entropy'}
  assert token['status'] == 'train failed with exit code 1' and token['seconds'] == {'train': 6}
  assert token['evaluation'] == [] and token['interference'] == {'init': None, 'final': None}
  assert context['status'] == 'not started'
  assert report['errors'] == ['token-0: train failed with exit code 1.', 'context-0: not started.']


def test_every_number_can_be_traced_to_a_config_a_command_a_commit_and_data(report):
  first, second, task = report['cells'][:3]
  assert report['config']['moe']['router'] == 'dense' and report['config']['data']['dir'] != tiny.data_dir()
  assert first['changed'] == [] and second['changed'] == ['seed: 0 → 1']
  assert task['changed'] == ["moe.router: 'dense' → 'task'"]
  assert (task['commit'], task['data'], task['commands']['train']) == (
      'c' * 40, 'print', 'uni-moe train --workdir=task-0')


def test_the_account_compares_the_examples_of_the_runs(report):
  [pair] = report['account']['paired']
  assert (pair['variant'], pair['evaluator'], pair['seeds'], pair['gain']) == ('task', 'class', 2, .25)


def test_the_largest_difference_of_a_merged_model_is_on_the_page(report, tmp_path):
  text = results.write(report, tmp_path)
  assert '2 of the models were evaluated again: the largest' in text and 'is 1e-06 (task-1, class, top-1).' in text


def test_a_merged_model_with_a_score_that_is_not_finite_is_an_error_and_the_page_is_written(tmp_path):
  for variant in ('dense', 'task', 'token'):
    _finish(tmp_path, variant)
  merged = {'largest_difference': float('inf'), 'metric': 'text, perplexity'}
  (tmp_path / 'task-0/merged.json').write_text(json.dumps(merged))
  report = results.collect('routers', _cells(tmp_path, 'dense', 'task', 'token'), ['c'], 'p')
  assert report['errors'] == ['task-0: text, perplexity is not finite with merged experts, or without.']
  assert '1 of the models were evaluated again: the largest' in results.write(report, tmp_path / 'out')


def test_a_diverged_run_is_reported_and_the_others_are_compared(tmp_path):
  for variant in ('dense', 'task', 'token'):
    _finish(tmp_path, variant)
  row = json.loads((tmp_path / 'token-0/evaluation.json').read_text())[0]
  (tmp_path / 'token-0/evaluation.json').write_text(json.dumps([{**row, 'value': float('nan')}]))
  values = np.array([[1, np.nan, 0, 0], np.ones(4)], np.float32)
  np.savez(tmp_path / 'token-0/evaluation_examples.npz', **{'class/top-1': values})
  report = results.collect('routers', _cells(tmp_path, 'dense', 'task', 'token'), ['c'], 'p')
  assert report['errors'] == ['token-0: class has top-1 nan, which is left out.']
  assert [p['variant'] for p in report['account']['paired']] == ['task']
  results.write(report, tmp_path / 'out')


@pytest.mark.parametrize('log, status', [
    ([_attempt('interference at init')], 'not trained yet'),  # another sweep trains it right now
    ([_attempt('interference at init'), _attempt('train', 1)], 'train failed with exit code 1')])
def test_a_run_that_has_not_trained_to_its_end_is_reported_and_counts_in_no_mean(tmp_path, log, status):
  for seed in (0, 1):
    _finish(tmp_path, 'dense', seed=seed)
    _finish(tmp_path, 'task', seed=seed)
  cells = [*_cells(tmp_path, 'dense', 'task'), *_cells(tmp_path, 'dense', 'task', seed=1)]
  losses = lambda report: [v['training_loss'] for v in report['account']['variants']]
  assert losses(results.collect('routers', cells, ['c'], 'p')) == [2, 2]
  folder = cells[-1].folder
  (folder / runner.LOG).write_text(json.dumps(log))
  (folder / 'metrics.jsonl').write_text('{"step": 1, "steps_per_second": 1.0, "loss/names": 50.0, "loss/total": 50.0}')
  report = results.collect('routers', cells, ['c'], 'p')
  assert report['errors'] == [f'task-1: {status}.'] and losses(report) == [2, 2]
  assert [c['curves'] != {} for c in report['cells']] == [True, True, True, False]


@pytest.mark.parametrize('seconds, shown', [
    (None, None), (.0012345, '0.00123'), (.2, '0.200'), (.99996, '1.00'), (12.345, '12.3'), (99.96, '100'),
    (1234., '1234')])
def test_seconds_have_three_digits_also_where_a_step_takes_milliseconds(seconds, shown):
  assert router_report._seconds(seconds) == shown


def test_steps_of_equal_time_are_those_of_dense():
  cells = [{'variant': v, 'steps': 600, 'seconds_per_step': x} for v, x in (
      ('dense', 1.), ('dense', 3.), ('dense', 2.), ('task', 2.5), ('token', 4e9), ('context', None))]
  assert routers.equal_time_steps(cells) == '600,task=480,token=1'  # medians; 600 · 2 / 2.5
  assert routers.equal_time_steps(cells[3:]) is None
  failed = {'variant': 'dense', 'steps': 40, 'seconds_per_step': 2.}
  assert routers.equal_time_steps([failed, *cells]) == '600,task=480,token=1'


def test_curves_are_means_of_equal_parts_of_a_run():
  steps = list(range(1, 81))
  metrics = {'loss/a': (steps, steps), 'loss/total': (steps, [0] * 80)}
  steps, losses = routers._curves(metrics)['a']
  assert len(steps) == 40 and steps[:2] == losses[:2] == [1.5, 3.5] and list(routers._curves(metrics)) == ['a']


def test_a_line_that_a_killed_run_left_unfinished_does_not_count(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 2, "loss/a": 1.0}\n{"step": 4, "lo')
  measured = routers.measure(tmp_path, [_attempt('train')])
  assert measured['steps'] == 2 and measured['curves'] == {'a': [[2.], [1.]]}


def test_the_results_have_tables_and_figures_and_no_path_of_the_machine(report, workdir):
  out = workdir / results.FOLDER
  text = results.write(report, out)
  assert sorted(p.name for p in out.iterdir()) == [
      'curves.png', 'experts_task.png', 'interference.png', 'interference_dense.png', 'interference_task.png',
      'results.json', 'results.md', 'scores.png']
  assert (out / 'results.md').read_text() == text + '\n'
  for line in (
      '# Router ablation',
      '| variant | class, top-1 | average | training loss | s / step | parameters | active | seeds |',
      'training loss below dense | p |',
      '| strongest baseline | 0.700 neighbor |', '| dense | 0.500 ± 0.196 |', '| 0.500 | 3,200 | 1,600 | 2 |',
      '| dense-0 | 6 | 0.500 | 12 | 52 | cccccccccccc | print | finished |',
      '| token-0 | 0 |  | 6 | 6 |  |  | train failed with exit code 1 |', '* context-0: not started.',
      'Equal time: `--steps=6,task=6`', '| task | 0 / 1 / 0 | 0 / 1 / 0 |', '| class, top-1 | 0.250 (',
      '| evaluator | metric | chance | baselines | dense | task | token | context |',
      '| class | top-1 | 0.1 | neighbor 0.700 | 0.500 ± 0.196 | 0.500 ± 0.196 |  |  |',
      '| mean of pairs at | init | step 4 | final |',
      '| dense | 0.25 (0.15 … 0.35) | -0.25 (-0.35 … -0.15) | -0.25 (-0.35 … -0.15) |',
      '| dense | 0.00 (0.00 … 1.00) | 1.00 (0.00 … 1.00) | 1.00 (0.00 … 1.00) |',
      '| variant | attention experts | mlp experts | overlap |',
      '| task | 1.75 | 2.00 | 0.25 |',
      # A step on motion hurts names in dense; the row of motion has no base.
      '| at | a step on | for | dense | task |',
      '| step 4 | motion | names | -0.25 (2/2) | 0.25 (0/2) |', '| final | motion | names | -0.25 (2/2) | 0.25 (0/2) |',
      '![experts by condition, task-0](experts_task.png)', 'seeds 0, 1, commit cccccccccccc,',
      '± 95 %: the error of the test examples and the spread'):
    assert line in text, line
  assert text.count('or on a sample of them where there are many') == 2 and 'all training examples' not in text
  assert text.count('(2/2)') == 2 and 'token' not in text.partition('## Interference')[2].partition('## Experts')[0]
  assert str(workdir) not in text + (out / 'results.json').read_text()


def test_the_page_names_metrics_whose_intervals_lack_the_error_of_the_test_examples(report, tmp_path):
  bleu = [{**score, 'metric': 'BLEU-4', 'error': None} for score in report['scores']]  # in the last table alone
  page = '\n'.join(results._report({**report, 'scores': [*report['scores'], *bleu]}, {}))
  assert page.count('of the test examples (without: BLEU-4) and the spread') == page.count('(without') == 1
  page = results.write({**report, 'scores': [{**score, 'error': None} for score in report['scores']]}, tmp_path)
  assert page.count('of the test examples (without: top-1) and') == 2
  assert '![scores of all variants with 95 % intervals (of seeds alone: top-1)]' in page


def test_the_line_of_a_baseline_is_in_its_panel_also_where_it_beats_the_models(report, tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(router_figures, 'save_figure', lambda figure, *_, **__: figures.append(figure))
  for baseline in (.2, .95):  # the models have .5, with an interval of less than .2
    scores = [{**s, 'baselines': {'neighbor': baseline}} for s in report['scores']]
    router_figures._draw_scores(tmp_path, {**report, 'scores': scores}, ['dense', 'task'])
    axes = figures.pop().axes[0]
    left, right = axes.get_xlim()
    assert left == 0 and baseline < right and list(axes.lines[-1].get_xdata()) == [baseline] * 2


def test_a_variant_has_a_color_of_its_own_and_the_same_one_in_every_sweep():
  colors = router_figures._colors([*VARIANTS, *(f'of a later version {i}' for i in range(10))])
  assert len(set(colors.values())) == len(VARIANTS) + 10
  assert router_figures._colors(['dense', 'token'])['token'] == colors['token']


def test_everything_is_drawn_again_from_the_json_alone(report, workdir, tmp_path):
  text = results.write(report, workdir / 'written')
  (tmp_path / 'results.json').write_bytes((workdir / 'written/results.json').read_bytes())
  assert results.redraw(tmp_path / 'results.json') == text
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in (workdir / 'written').iterdir())
  with pytest.raises(ValueError, match='--redraw=.*none.json: the file does not exist'):
    results.redraw(tmp_path / 'none.json')
  for other in (text, '[]', '{"format": 2}'):  # such as results.md
    (tmp_path / 'other').write_text(other)
    with pytest.raises(ValueError, match='--redraw=.*other: it is not the results.json of a sweep'):
      results.redraw(tmp_path / 'other')
  for old in ({'sweep': 'routers', 'source': 'x', 'cells': []}, {'sweep': 'adaptation', 'source': 'x', 'cells': []},
              {**json.loads((tmp_path / 'results.json').read_text()), 'format': 1}):
    (tmp_path / 'old.json').write_text(json.dumps(old))
    with pytest.raises(ValueError, match='an older version wrote it'):
      results.redraw(tmp_path / 'old.json')


@pytest.mark.parametrize('changes, message', [
    ({}, None),
    (dict(learning_rate=.5), 'task-0 and dense-0 differ in more than their variant: optim.learning_rate: 0.01 → 0.5.'),
    (dict(data='other'), 'the data (its fingerprint)'), (dict(steps=5), 'task-0 has 5 of 6 steps.'),
    (dict(b2=.5, fields=('optim.b2=0.5',)), None)])
def test_runs_that_differ_in_more_than_their_variant_are_an_error(tmp_path, changes, message):
  dense, task = _cells(tmp_path, 'dense', 'task')
  task = task._replace(fields=changes.pop('fields', ()))
  _finish(tmp_path, 'dense')
  _finish(tmp_path, 'task', **changes)
  errors = results.collect('routers', [dense, task], ['c'], 'p')['errors']
  assert errors == [] if message is None else message in errors[0]


def test_scores_of_evaluators_with_other_fields_are_an_error(tmp_path):
  """A config may change its evaluators while a run continues, and cells of a sweep that continues have both."""
  for variant, beams in (('dense', 1), ('task', 1), ('token', 4)):
    _finish(tmp_path, variant)
    (tmp_path / f'{variant}-0/evaluators.json').write_text(json.dumps({'captions': {'beam_size': beams}}))
  cells = _cells(tmp_path, 'dense', 'task', 'token')
  assert results.collect('routers', cells[:2], ['c'], 'p')['errors'] == []
  assert results.collect('routers', cells, ['c'], 'p')['errors'] == [
      'token-0 and dense-0 have scores of other evaluators or data: evaluator.captions.beam_size: 1 → 4.']


def test_interference_over_training_is_in_the_order_of_steps_and_averaged_over_the_seeds_that_have_it():
  def cell(**values):
    none = dict.fromkeys(('value', 'low', 'high'))
    subset = lambda x: dict.fromkeys(('mean_of_pairs', 'negative_share'), none if x is None else dict.fromkeys(none, x))
    measured = {k.replace('_', ' '): {'subset': subset(x)} for k, x in values.items()}
    return {'variant': 'dense', 'interference': measured}

  cells = [cell(final=1., step_1000=.5, step_200=.25, init=None), cell(final=3.)]
  cells += [{'variant': 'task', 'interference': {}}]
  assert routers.checkpoints(cells) == ['init', 'step 200', 'step 1000', 'final']
  means = routers.mean_interference(cells, 'dense')  # no row has a base at init
  assert {k: m['mean_of_pairs']['low'] for k, m in means.items()} == {'step 200': .25, 'step 1000': .5, 'final': 2.}
  assert routers.mean_interference(cells, 'task') == {}


def test_pairs_conflict_if_most_seeds_of_dense_are_certainly_below_0_with_a_base():
  def cell(variant, value, high, own_low=.1):
    """A run in which a step on b has I = value for a; the interval of a's own effect begins at own_low."""
    ratio = {'value': [[1, value], [.5, 1]], 'low': [[1, value - 1], [.4, 1]], 'high': [[1, high], [.6, 1]]}
    subset = {'ratio_of_means': ratio, 'delta': {'low': [[own_low, 0], [0, .1]]}}
    return {'variant': variant, 'interference': {'final': {'tasks': ['a', 'b'], 'subset': subset}}}

  def conflicts(*dense):
    others = [cell('task', .2, .3), cell('task', -.4, -.3), cell('task', .9, 1, own_low=-.1)]
    return router_report._conflicts([*dense, *others], ['dense', 'task', 'token'], 'final')

  certain, uncertain, without_base = cell('dense', -.2, -.1), cell('dense', -.2, .1), cell('dense', -.8, -.1, -.1)
  # Of task, the third run has no base: the mean of .2 and -.4, of which one of three runs is certainly below 0.
  assert conflicts(certain, certain, uncertain) == [('b', 'a', '-0.20 (2/3)', '-0.10 (1/3)', None)]
  assert conflicts(certain, uncertain) == conflicts(certain, without_base) == conflicts() == []
  other = {'tasks': ['b'], 'subset': {'ratio_of_means': {k: [[1]] for k in ('value', 'low', 'high')},
                                      'delta': {'low': [[.1]]}}}  # of a config without a
  assert conflicts(certain, {'variant': 'dense', 'interference': {'final': other}}) == conflicts(certain) == [
      ('b', 'a', '-0.20 (1/1)', '-0.10 (1/3)', None)]
