"""The study of regimes: its cells, their commands, what they trained, and the arithmetic of the table."""

import dataclasses
import json
import math

import numpy as np
import pytest

from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.analysis import study_cells, study_results
from uni_moe_jax.data.files import prepare
from uni_moe_jax.eval import suite
from uni_moe_jax.train import warm_start, workdir
from uni_moe_jax.train.checkpoint import Checkpoints


def test_untuned_cells_know_no_seed_and_seeds_of_one_program_follow_each_other():
  every = study_cells.cells(('a', 'b'), ('untuned', 'prompt'), range(3))
  assert [c.folder for c in every] == ['a-untuned', 'a-prompt-0', 'a-prompt-1', 'a-prompt-2',
                                       'b-untuned', 'b-prompt-0', 'b-prompt-1', 'b-prompt-2']


def test_a_cell_is_what_a_person_would_type():
  untuned = study_cells.Cell('digits', 'untuned', 0)
  for regime, argument in (('finetune', 'few'), ('finetune-all', 'all')):
    where, seed = f'--workdir=out/digits-{regime}-2', '--config.seed=2'
    assert study_cells.commands(study_cells.Cell('digits', regime, 2), 'runs/a', 'out', ['train.steps=3']) == [
        ['launch/train.py', f'--config=configs/finetune.py:runs/a,digits,{argument}', where, seed, '--config.train.steps=3'],
        ['launch/evaluate.py', where]]
  assert study_cells.commands(untuned, 'runs/a', 'out', []) == [
      ['launch/evaluate.py', '--config=configs/zero_shot.py:runs/a,digits', '--workdir=out/digits-untuned', '--config.seed=0']]


def test_a_cell_is_done_when_it_is_evaluated(tmp_path):
  assert study_cells.EVALUATION == suite.EVALUATION_FILE
  cell = study_cells.Cell('digits', 'prompt', 0)
  (tmp_path / cell.folder).mkdir()
  assert not study_cells.done(tmp_path, cell)
  (tmp_path / cell.folder / 'evaluation.json').write_text('[]')
  assert study_cells.done(tmp_path, cell) and not study_cells.done(tmp_path, dataclasses.replace(cell, seed=1))


def test_a_folder_belongs_to_one_study(tmp_path):
  study_cells.claim(tmp_path / 'new', {'run': 'a', 'step': 200})
  study_cells.claim(tmp_path / 'new', {'run': 'a', 'step': 200})
  with pytest.raises(ValueError, match='other settings .*step: 200 → 400.*another --workdir'):
    study_cells.claim(tmp_path / 'new', {'run': 'a', 'step': 400})  # the run has gone on


def _row(value, seed, regime='prompt', metric='top-1', error=.03):
  return {'task': 'digits', 'regime': regime, 'seed': seed, 'evaluator': 'digits', 'metric': metric, 'value': value,
          'standard_error': error, 'chance': .1, 'floors': {'1-nn': .9}}


def test_the_interval_has_the_spread_of_seeds_and_an_error_that_seeds_do_not_shrink():
  # Mean .5; deviations -.1, 0, .1: variance .02 / 2 = .01, spread .1. 95 % of Student's t of two degrees of freedom lie within 4.303.
  [row] = study_results.summary([_row(v, i) for i, v in enumerate((.4, .5, .6))])
  assert (row['mean'], row['spread'], row['error'], row['seeds']) == pytest.approx((.5, .1, .03, 3))
  assert row['interval'] == pytest.approx(math.sqrt(4.3027 ** 2 * .01 / 3 + 1.96 ** 2 * .0009), rel=1e-4)


@pytest.mark.parametrize('rows, interval', [
    ([_row(.4, 0)], 1.96 * .03),  # one seed: the error of the test examples alone
    ([_row(.4, 0, error=None), _row(.6, 1, error=None)], 12.706 * .1),  # spread sqrt(.02) over sqrt(2); t of one degree
    ([_row(.4, 0, error=None)], None)])
def test_what_is_not_known_of_an_interval_is_left_out(rows, interval):
  assert study_results.summary(rows)[0]['interval'] == (None if interval is None else pytest.approx(interval, rel=1e-4))


def test_regimes_and_metrics_are_not_mixed():
  rows = study_results.summary([_row(.4, 0), _row(.8, 0, regime='untuned'), _row(.2, 0, metric='balanced')])
  assert {(r['regime'], r['metric']): r['mean'] for r in rows} == {
      ('prompt', 'top-1'): .4, ('untuned', 'top-1'): .8, ('prompt', 'balanced'): .2}


# What tuning did: a and b of three and one values, b frozen; c is new.
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
  found = warm_start.compare_params(_BEFORE, after, frozenset('bd'))
  assert {k: found[k] for k in expected} == expected
  assert found['parameters'] - found['trained'] == (3 if 'd' in after else 1)


def _results(**changes):
  cell = {'task': 'digits', 'regime': 'prompt', 'seed': 0, 'steps': 5, 'examples': 100, 'drawn': 160, 'parameters': 1000,
          'trained': 19, 'share': .019, 'identical': True, 'moved': True}
  return {'run': 'runs/a', 'cells': [{**cell, **changes}], 'scores': study_results.summary([_row(.5, 0)])}


@pytest.mark.parametrize('changes, said', [
    (dict(), None), (dict(share=.02), '2.00% of the parameters train; prompt tuning trains less than 2%'),
    (dict(regime='finetune', share=1.), None), (dict(identical=False), 'digits-prompt-0: a frozen parameter differs'),
    (dict(moved=False), 'nothing was trained'), (dict(regime='untuned', steps=0, identical=None, moved=None), None)])
def test_a_promise_that_is_broken_is_told(changes, said):
  found = study_results.breaches(_results(**changes))
  assert found == [] if said is None else said in found[0]


@pytest.mark.parametrize('metric, untuned, tuned, gains', [
    ('top-1', .4, .5, True), ('top-1', .5, .5, False), ('top-1', .6, .5, False), ('perplexity', 9, 8, True), ('perplexity', 8, 9, False)])
def test_prompt_tuning_must_gain_in_the_first_metric_or_in_the_words_of_captions(metric, untuned, tuned, gains):
  rows = [_row(v, 0, regime, m) for regime, v in (('untuned', untuned), ('prompt', tuned)) for m in (metric, 'second')]
  rows[3]['value'] = 0.  # of the second metric nothing is promised
  found = study_results.breaches({**_results(), 'scores': study_results.summary(rows)})
  assert found == ([] if gains else [
      f'digits, digits: prompt tuning has {metric} {tuned:.3f}, no gain over {untuned:.3f} untuned.'])
  captions = [_row(v, 0, regime, m) for m, change in (('exact', -.1), ('word F1', .1))
              for regime, v in (('untuned', .5), ('prompt', .5 + change))]
  assert study_results.breaches({**_results(), 'scores': study_results.summary(captions)}) == []
  captions[-1]['value'] = .4
  assert 'has word F1 0.400' in study_results.breaches({**_results(), 'scores': study_results.summary(captions)})[0]


def test_the_table_has_scores_beside_chance_and_floors_and_what_was_trained():
  lines = study_results.table(_results()).splitlines()
  assert lines[2] == '| digits | top-1 | 0.1 | 1-nn 0.900 | 0.500 ± 0.059 |'
  assert lines[-1] == '| digits | prompt | 1 | 5 | 100 | 160 | 19 | 1.90% | identical |'
  assert 'CHANGED' in study_results.table(_results(identical=False))
  assert study_results.table(_results(trained=1000, share=1.)).endswith('| 1,000 | 100.00% | — |')  # nothing is frozen


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
  c.tasks.shape = config_lib.task('text_classification', 'own:three', batch_size=8, target_set='three', label_column='label',
                                  template='{text_a} <eot> <spe>', max_len=8)
  return c


@pytest.mark.parametrize('config', [_shapes, _files])
def test_facts_of_a_cell_come_from_its_work_directory(tmp_path, config):
  c = config(tmp_path)
  c.tasks.shape.shots = 2
  c.optim.param_groups = (('b$', 'freeze'), ('.*', 1., 0.))
  c.evaluators.e = config_lib.evaluator('classification', 'shape', split='train')
  cell = study_cells.Cell('shape', 'prompt', 0)
  for folder, values, step in ((tmp_path / 'run', _BEFORE, 9), (tmp_path / cell.folder, {**_BEFORE, 'a': np.ones(3)}, 4)):
    workdir.claim_workdir(folder, c, 'print')
    with Checkpoints(folder, 1) as checkpoints:
      checkpoints.save(step, {'params': {k: np.asarray(v, np.float32) for k, v in values.items()}, 'ema_params': None})
  assert study_results.facts(cell, str(tmp_path / 'run'), str(tmp_path)) == {
      'steps': 4, 'examples': 6, 'drawn': 32, 'parameters': 4, 'trained': 3, 'share': .75, 'identical': True, 'moved': True}
  (tmp_path / cell.folder / 'evaluation.json').write_text(json.dumps([_row(.5, 0)]))
  found = study_results.collect([cell], str(tmp_path / 'run'), str(tmp_path))
  assert found['cells'][0]['examples'] == 6 and found['scores'][0]['mean'] == .5
  assert 'trains less than 2%' in study_results.breaches(found)[0]
