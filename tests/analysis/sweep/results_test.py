"""Scores over seeds, and the report of an adaptation study: what recipes trained and which promises they broke."""

import json
import math

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from tests.helpers import processes, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.analysis.sweep import adaptation, grid, results, router_report, runner
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.train import warm_start, workdir
from uni_moe_jax.train.checkpoint import Checkpoints


def _row(value, seed, variant='prompts', metric='top-1', error=.03):
  return {'task': 'digits', 'variant': variant, 'run': '', 'seed': seed, 'evaluator': 'digits', 'metric': metric,
          'value': value, 'standard_error': error, 'chance': .1, 'baselines': {'nearest neighbor': .9},
          'higher_is_better': metric != 'perplexity'}


def test_the_interval_has_the_spread_of_seeds_and_an_error_that_seeds_do_not_shrink():
  # Mean .5; deviations -.1, 0, .1: variance .02 / 2 = .01, spread .1. 95 % of Student's t with two degrees of freedom
  # lie within 4.303.
  [row] = results.summarize([_row(v, i) for i, v in enumerate((.4, .5, .6))])
  assert (row['mean'], row['spread'], row['error'], row['seeds']) == pytest.approx((.5, .1, .03, 3))
  assert row['interval'] == pytest.approx(math.sqrt(4.3027 ** 2 * .01 / 3 + 1.96 ** 2 * .0009), rel=1e-4)


@pytest.mark.parametrize('rows, interval', [
    ([_row(.4, 0)], 1.96 * .03),  # one seed: only the error of the test examples
    ([_row(.4, 0, error=None), _row(.6, 1, error=None)], 12.706 * .1),  # sqrt(.02) over sqrt(2); t of one degree
    ([_row(.4, 0, error=None)], None)])
def test_unknown_terms_of_an_interval_are_left_out(rows, interval):
  assert results.summarize(rows)[0]['interval'] == (None if interval is None else pytest.approx(interval, rel=1e-4))


def test_variants_and_metrics_are_not_mixed():
  rows = [_row(.4, 0), _row(.8, 0, variant='zero-shot'), _row(.2, 0, metric='balanced_accuracy')]
  assert {(r['variant'], r['metric']): r['mean'] for r in results.summarize(rows)} == {
      ('prompts', 'top-1'): .4, ('zero-shot', 'top-1'): .8, ('prompts', 'balanced_accuracy'): .2}


def test_the_score_table_has_chance_and_baselines():
  lines = results.score_table(results.summarize([_row(.5, 0)]), ['prompts', 'zero-shot'])
  assert lines == ['| evaluator | metric | chance | baselines | prompts | zero-shot |', '| --- ' * 6 + '|',
                   '| digits | top-1 | 0.1 | nearest neighbor 0.900 | 0.500 ± 0.059 |  |']


def test_a_baseline_on_a_part_of_the_examples_is_marked():
  row = {**_row(.5, 0), 'baselines': {'majority': .1, 'tf-idf': .6}, 'baseline_counts': {'tf-idf': 5000}}
  scores = results.summarize([row])
  assert '| majority 0.100, tf-idf 0.600 (on 5,000 examples) |' in results.score_table(scores, ['prompts'])[-1]
  summary = dict.fromkeys(('training_loss', 'average', 'seconds_per_step', 'total', 'active', 'seeds'))
  account = {'tasks': [{'evaluator': 'digits', 'metric': 'top-1', 'reference': None}],
             'variants': [{'variant': 'prompts', **summary}]}
  page = router_report._scores({'scores': scores, 'account': account, 'cells': []}, ['prompts'])
  assert page[2].startswith('| strongest baseline | 0.600 tf-idf (on 5,000 examples) |')


@pytest.mark.parametrize('heading, folder', [('Scores', ''), ('Equal time', 'equal_time')])
def test_the_published_page_has_the_numbers_of_its_results(heading, folder):
  docs, bounds = processes.ROOT / 'docs/results', router_report._bounds
  published = json.loads((docs / 'routers' / folder / 'results.json').read_text())
  steps = {c['variant']: c['steps'] for c in published['cells']}

  def expected(v):
    gain = bounds(v, 'gain', digits=3)  # dense has none
    return {
        'steps': str(steps[v['variant']]), 'seeds': str(v['seeds']), 'training loss': f'{v["training_loss"]:.2f}',
        'average': f'{v["average"]:.2f}',
        'below dense by': bounds(v, *(f'training_loss_{k}' for k in ('gain', 'low', 'high'))) or '',
        'gain over dense': f'{gain}, p {router_report._p(v["p"])}' if gain else '',
        'win / tie / loss': f'{v["win"]} / {v["tie"]} / {v["loss"]}' if gain else ''}

  section = (docs / 'routers.md').read_text().partition(f'\n## {heading}\n')[2]
  lines = section[section.index('| variant'):].partition('\n\n')[0].splitlines()
  columns, _, *rows = ([cell.strip() for cell in line[1:-1].split('|')] for line in lines)
  values = {v['variant']: expected(v) for v in published['account']['variants']}
  assert {name: dict(zip(columns[1:], row, strict=True)) for name, *row in rows} == {
      name: {column: of_variant[column] for column in columns[1:]} for name, of_variant in values.items()}


def test_a_bar_in_a_name_divides_no_cell():
  row = {**_row(.5, 0), 'evaluator': 'yes|no', 'baselines': {"always 'a|b'": .9}}
  assert results.score_table(results.summarize([row]), ['prompts'])[-1] == (
      r"| yes\|no | top-1 | 0.1 | always 'a\|b' 0.900 | 0.500 ± 0.059 |")


# Parameters before tuning: a and b with three values and one, b frozen; c is new.
_BEFORE = {'a': np.zeros(3, np.float32), 'b': np.float32(1)}


@pytest.mark.parametrize('changes, expected', [
    ({}, dict(identical=True, moved=True)),  # c is new and trains
    ({'a': np.ones(3, np.float32)}, dict(identical=True, moved=True)),
    ({'b': np.nextafter(np.float32(1), np.float32(2))}, dict(identical=False, moved=True)),
    ({'b': np.float32(1), 'c': None}, dict(identical=True, moved=False, parameters=4, trained=3)),
    ({'c': None, 'd': np.ones(2, np.float32)}, dict(identical=True)),  # d is frozen too, and new
    ({'a': -np.zeros(3, np.float32), 'c': None}, dict(identical=True, moved=True))])  # -0: other bits
def test_what_is_frozen_is_compared_bit_by_bit(changes, expected):
  after = {k: v for k, v in {**_BEFORE, 'c': np.zeros(2, np.float32), **changes}.items() if v is not None}
  result = warm_start.compare_params(_BEFORE, after, frozenset('bd'))
  assert {k: result[k] for k in expected} == expected
  assert result['parameters'] - result['trained'] == (3 if 'd' in after else 1)


def _cell(variant='prompts', **training):
  training = {'steps': 5, 'examples': 100, 'drawn': 160, 'parameters': 1000, 'trained': 19, 'share': .019,
              'identical': True, 'moved': True, **training}
  return {'name': f'digits-{variant}-0', 'variant': variant, 'run': '', 'task': 'digits', 'seed': 0,
          'training': None if variant == 'zero-shot' else training}


@pytest.mark.parametrize('cell, message', [
    (_cell(), None), (_cell(share=.02), '2.00% of the parameters train; prompt tuning trains less than 2%'),
    (_cell('finetune', share=1.), None), (_cell(identical=False), 'digits-prompts-0: a frozen parameter differs'),
    (_cell(moved=False), 'nothing was trained'), (_cell('zero-shot'), None)])
def test_a_broken_promise_is_an_error(cell, message):
  errors = adaptation.find_errors([cell], [{}])
  assert errors == [] if message is None else message in errors[0]


def _config(data='print', **fields):
  c = tiny.config('shape')
  for name, value in fields.items():
    section, _, field = name.partition('_')
    c[section][field] = value
  return {'config': c.to_dict(), 'data': data}


@pytest.mark.parametrize('second, run, message', [
    ({'train_init': 'b'}, '', None), ({'train_steps': 9}, '', 'train.steps: 6 → 9.'),
    ({'data': 'other'}, '', 'the data (its fingerprint).'), ({'model_width': 64}, '', 'model.width: 16 → 64.'),
    ({'model_width': 64, 'data': 'other'}, 'task', None), ({'train_steps': 9}, 'task', 'train.steps: 6 → 9.')])
def test_cells_of_a_recipe_that_differ_in_more_than_seed_and_run_are_an_error(second, run, message):
  cells = [_cell('zero-shot'), {**_cell(), 'name': 'a'}, {**_cell(), 'name': 'b', 'run': run}]
  errors = adaptation.find_errors(cells, [_config(optim_b2=.5), _config(train_init='a'), _config(**second)])
  assert errors == ([] if message is None else [f'b and a differ in more than their seed: {message}'])


def test_the_table_has_what_was_trained():
  def last_line(*cells):
    return adaptation.runs_table(cells)[-1]
  assert last_line(_cell()) == '| digits | prompts | 1 | 5 | 100 | 160 | 19 | 1.90% | identical |'
  assert 'CHANGED' in last_line(_cell(), _cell(identical=False))
  assert last_line(_cell(trained=1000, share=1.)).endswith('| 1,000 | 100.00% | — |')  # nothing is frozen
  assert last_line(_cell('zero-shot')) == '| digits | zero-shot | 1 | 0 | 0 | 0 | 0 | 0.00% | all |'
  assert last_line({**_cell(), 'training': None}) == '| digits | prompts | 0 |  |  |  |  |  |  |'


def _shapes(folder):
  return tiny.config('shape', data_dir=tiny.data_dir())


def _files(folder):
  """The same task of data in files: three classes of four texts."""
  (folder / 'in').mkdir()
  (folder / 'in/train.jsonl').write_text(''.join(
      json.dumps({'text_a': f'text {i}', 'text_b': 'b', 'label': 'xyz'[i % 3]}) + '\n' for i in range(12)))
  prepare.prepare(folder / 'in', folder, 'three', test_fraction=0.0)
  c = tiny.config(data_dir=str(folder))
  c.target_sets.three = config_lib.target_set('own:three/label', family='words')
  c.tasks.shape = config_lib.task(
      'text_classification', 'own:three', batch_size=8, target_set='three', label_column='label',
      template='{text_a} <eot> <spe>', max_len=8)
  return c


@pytest.mark.parametrize('config, frozen', [(_shapes, 'b'), (_files, 'embed/spatial')])
def test_a_cell_reports_what_its_work_directory_trained(tmp_path, config, frozen):
  c = config(tmp_path)
  c.tasks.shape.shots = 2
  c.model.posemb = 'frozen'  # embed/spatial
  c.optim.param_groups = (*([('b$', 'freeze')] if frozen == 'b' else []), ('.*', 1., 0.))
  c.evaluators.e = config_lib.evaluator('classification', 'shape', split='train')
  stages = grid.Stage('train', ()), grid.Stage('evaluate', ())
  cell = grid.Cell(tmp_path / 'shape-prompts-0', 'prompts', 'shape', 0, stages)
  path = cell.folder
  for folder, values, step in ((tmp_path / 'run', _BEFORE, 9), (path, {**_BEFORE, 'a': np.ones(3)}, 4)):
    workdir.claim_workdir(folder, c, 'print')
    c.train.init = str(tmp_path / 'run')
    with Checkpoints(folder, 1) as checkpoints:
      params = unflatten_dict({'a': values['a'], frozen: values['b']}, sep='/')
      params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
      checkpoints.save(step, {'params': params, 'ema_params': None})
  assert adaptation.measure(path, []) == {'training': None}
  log = [{'stage': stage.name, 'exit_code': 0, 'seconds': 1., 'command': ''} for stage in cell.stages]
  assert adaptation.measure(path, log)['training'] == {
      'steps': 4, 'examples': 6, 'drawn': 32, 'parameters': 4, 'trained': 3, 'share': .75, 'identical': True,
      'moved': True}
  (path / runner.LOG).write_text(json.dumps(log))
  (path / 'evaluation.json').write_text(json.dumps([_row(.5, 0)]))
  report = results.collect('adaptation', [cell], [str(tmp_path / 'run')], 'python launch/sweep.py')
  assert report['cells'][0]['training']['examples'] == 6 and report['scores'][0]['mean'] == .5
  assert 'trains less than 2%' in report['errors'][0]


def test_runs_are_named_as_they_were_typed(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  c, cells = tiny.config(), []
  for run in ('runs/dense-0', 'runs/task-0'):
    c.train.init, folder = str(tmp_path / run), tmp_path / 'out' / run.rpartition('/')[2]
    workdir.claim_workdir(folder, c, 'print')
    (folder / runner.LOG).write_text(json.dumps(
        [{'stage': 'evaluate', 'exit_code': 0, 'seconds': 1.,
          'command': f'uni-moe evaluate {tmp_path / run} {folder}'}]))
    (folder / 'evaluators.json').write_text(
        json.dumps({'e': {'data_fingerprint': f'of {run}', 'model_fingerprint': run}}))
    cells.append(grid.Cell(folder, 'prompts', 'shape', 0, ()))
  report = results.collect('adaptation', cells, ['runs/dense-0', 'runs/task-0'], 'uni-moe sweep')
  assert [r['changed'] for r in report['cells']] == [[], ["train.init: 'runs/dense-0' → 'runs/task-0'"]]
  assert report['cells'][1]['commands'] == {'evaluate': 'uni-moe evaluate runs/task-0 task-0'}
  assert str(tmp_path) not in json.dumps(report)
  assert report['errors'][-1] == (
      "task-0 and dense-0 have scores of other evaluators or data: evaluator.e.data_fingerprint: 'of runs/dense-0' → "
      "'of runs/task-0'.")


def _adapted(run, seed, right, variant='prompts'):
  """(cell, its examples): four answers of digits, some of them right."""
  examples = {('digits', 'top-1'): np.array([right, np.ones(4)], np.float32)}
  return {**_cell(variant), 'run': run, 'seed': seed, 'evaluation': [_row(np.mean(right), seed, variant)]}, examples


def test_runs_with_experts_are_compared_with_dense_ones_by_recipe():
  pairs = [_adapted(run, seed, right, recipe) for seed in (0, 1) for run, recipe, right in (
      ('dense', 'prompts', (1, 0, 0, 0)), ('task', 'prompts', (1, 1, 1, 0)), ('dense', 'zero-shot', (0, 0, 0, 1)),
      ('task', 'zero-shot', (0, 0, 0, 1)))]
  compared = adaptation.compare(*zip(*pairs))
  gains = {recipe: [(p['variant'], p['gain'], p['seeds']) for p in x['paired']] for recipe, x in compared.items()}
  assert gains == {'prompts': [('task', .5, 2)], 'zero-shot': [('task', 0, 2)]}
  cells = [cell for cell, _ in pairs]
  text = '\n'.join(adaptation.sections({'cells': cells, 'accounts': compared}))
  assert '| digits | zero-shot, task | 2 |' in text and 'training loss' not in text
  assert '| digits | prompts, task | 2 |' in text and '## prompts: against dense' in text and '0.500' in text
  only_dense = [pair for pair in pairs if pair[0]['run'] == 'dense']
  assert adaptation.compare(*zip(*only_dense)) == {}


def test_scores_of_groups_of_runs_are_columns_of_their_own():
  rows = [{**_row(v, 0), 'run': run} for run, v in (('dense', .4), ('task', .5))]
  scores = results.summarize(rows)
  assert [s['mean'] for s in scores] == [.4, .5]
  lines = results.score_table(scores, ['prompts, dense', 'prompts, task'])
  assert lines[-1] == '| digits | top-1 | 0.1 | nearest neighbor 0.900 | 0.400 ± 0.059 | 0.500 ± 0.059 |'
