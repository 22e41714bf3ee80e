"""The cells of both sweeps and their commands."""

import pathlib

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from uni_moe_jax.analysis.sweep import grid
from uni_moe_jax.analysis.sweep.variants import VARIANTS
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.config.schema import VARIANTS as SIZES
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train import workdir
from uni_moe_jax.utils.errors import UsageError

_OUT = pathlib.Path('out')
_MEASURES = tuple(m for m in grid.MEASURES if m != 'along')


def _router_cells(variants, num_seeds, steps='', measures=_MEASURES):
  cells, settings = grid.router_grid(
      _OUT, 'ablation', variants, measures, 8, steps, num_seeds, ['train.steps=99'])
  assert settings == {
      'sweep': 'routers', 'config': 'ablation', 'num_batches': 8, 'overrides': ['train.steps=99']}
  return cells


@pytest.fixture(name='run', scope='module')
def _run(tmp_path_factory):
  run = tmp_path_factory.mktemp('run')
  workdir.claim_workdir(run, tiny.config('shape', data_dir=tiny.data_dir()), 'print')
  return run


def _commands(cell):
  return {stage.name: stage.command for stage in cell.stages}


def test_a_router_cell_has_the_commands_that_a_person_would_type():
  first, cell = _router_cells(['token'], '2')
  commands = _commands(cell)
  config_flags = ('--config=ablation:router=token', '--config.seed=1', '--config.train.steps=99')
  workdir_flag = '--workdir=out/token-1'
  assert list(commands) == ['interference at init', 'train', 'evaluate', 'interference', 'experts', 'report']
  assert commands['interference at init'] == (
      'interference', '--at_init', *config_flags, workdir_flag, '--num_batches=8')
  assert commands['train'] == ('train', *config_flags, workdir_flag)
  assert _commands(first)['train'][-1] == '--compile_separately'  # whose program is cached
  assert commands['interference'] == ('interference', workdir_flag, '--num_batches=8')
  assert [s.name for s in cell.stages if s.needs] == ['evaluate', 'interference', 'experts', 'report']


def test_the_report_comes_last_and_is_written_again_after_any_other_stage():
  [cell] = _router_cells(['task'], '1', measures=['report', 'merged', 'experts'])
  assert [(s.name, s.shows_all) for s in cell.stages] == [
      ('train', False), ('experts', False), ('merged', False), ('report', True)]


def test_models_whose_experts_merge_are_evaluated_merged_after_their_own_evaluation():
  dense, task, token = (cell.stages[-1] for cell in _router_cells(
      ['dense', 'task', 'token'], '1', measures=['evaluation', 'merged']))
  assert (task.name, task.needs) == ('merged', 'evaluate')
  assert task.command == ('evaluate', '--workdir=out/task-0', '--merged')
  assert dense.name == token.name == 'evaluate'
  [alone] = _router_cells(['task'], '1', measures=['merged'])  # nothing else evaluates the run
  assert [(s.name, s.needs) for s in alone.stages] == [('train', ''), ('merged', 'train')]


def test_all_variants_of_a_seed_come_first_and_a_dense_model_has_no_expert_usage():
  cells = _router_cells(['dense', 'token', 'dense'], '2')
  assert [(c.folder, c.variant, c.seed) for c in cells] == [
      (_OUT / 'dense-0', 'dense', 0), (_OUT / 'token-0', 'token', 0),
      (_OUT / 'dense-1', 'dense', 1), (_OUT / 'token-1', 'token', 1)]
  dense, token = _commands(cells[0]), _commands(cells[1])
  assert list(dense) == [name for name in token if name != 'experts']


def test_seeds_and_steps_have_a_default_and_exceptions():
  cells = _router_cells(['token', 'task', 'dense'], '1,dense=3,modality=9', steps='50,token=20')
  assert [c.folder.name for c in cells] == ['token-0', 'task-0', 'dense-0', 'dense-1', 'dense-2']
  assert [c.fields for c in cells[:3]] == [('train.steps=20',), ('train.steps=50',), ('train.steps=50',)]
  # The last of several flags counts.
  assert _commands(cells[0])['train'][3:5] == ('--config.train.steps=99', '--config.train.steps=20')
  assert cli.config_from('ablation:router=token', ['train.steps=99', 'train.steps=20']).train.steps == 20
  by_exception = _router_cells(['task', 'token'], '', steps='token=20')
  assert [(c.folder.name, c.fields) for c in by_exception] == [('task-0', ()), ('token-0', ('train.steps=20',))]


def test_interference_is_measured_at_the_checkpoints_that_are_kept_before_the_last():
  overrides = ['train.steps=600', 'train.keep_every=200']
  [cell], _ = grid.router_grid(_OUT, 'ablation', ['token'], ['along'], 8, '', '', overrides)
  assert {s.name: s.command[1:] for s in cell.stages[1:]} == {
      f'interference at step {n}': ('--workdir=out/token-0', f'--step={n}', '--num_batches=8') for n in (200, 400)}
  overrides = ['train.steps=900', 'train.keep_every=300', 'train.checkpoint_every=200']  # saved at 200, 400, 600, 800
  [cell], _ = grid.router_grid(_OUT, 'ablation', ['token'], ['along'], 8, '', '', overrides)
  assert [s.name for s in cell.stages[1:]] == ['interference at step 600']
  for without in ('train.keep_every=0', 'train.keep_every=600'):
    with pytest.raises(UsageError, match='--measure=along needs checkpoints .*: set train.keep_every to a multiple'):
      grid.router_grid(_OUT, 'ablation', ['token'], ['along'], 8, '', '', ['train.steps=600', without])


def test_measurements_can_be_left_out():
  [cell] = _router_cells(['token'], '1', measures=['evaluation'])
  assert [s.name for s in cell.stages] == ['train', 'evaluate']
  [cell] = _router_cells(['token'], '1', measures=['interference'])
  assert [s.name for s in cell.stages] == ['interference at init', 'train', 'interference']


def test_variants_are_a_router_with_other_fields_of_any_config_that_takes_one():
  names = ['attribute_every_2', 'attribute_top_1', 'attribute_top_4', 'token_in_4']
  cells, _ = grid.router_grid(_OUT, 'pretrain:size=tiny', names, _MEASURES, 8, '', '', [])
  assert [c.fields for c in cells] == [
      ('moe.placement=every_2',), ('moe.top_k=1',), ('moe.top_k=4',), ('moe.experts_per_condition=4',)]
  assert _commands(cells[0])['train'] == (
      'train', '--config=pretrain:size=tiny,router=attribute', '--config.seed=0', '--config.moe.placement=every_2',
      f'--workdir={_OUT}/attribute_every_2-0', '--compile_separately')


def _config(name, *overrides):
  """The config of a variant of tiny.config."""
  router, fields = VARIANTS[name]
  c = tiny.config('shape', 'text', data_dir=tiny.data_dir())
  c.model.num_layers = 4
  for field in (*overrides, f'moe.router={router}'):
    _set(c, field)
  for field in fields(c):
    _set(c, field)
  return c


def _set(c, field):
  path, _, value = field.partition('=')
  section, name = path.split('.')
  c[section][name] = int(value) if value.isdecimal() else value


@pytest.mark.parametrize('overrides', [
    ('model.width=64',), ('model.width=64', 'moe.placement=every_2'), ('model.width=64', 'model.mlp_dim=200'),
    ('model.variant=Ti/16', *(f'model.{name}={x}' for name, x in SIZES['Ti/16'].items()))])
def test_dense_wide_has_the_parameters_of_the_experts(overrides):
  wide, dense, experts = (
      train_run.build(_config(name, *overrides), jax.devices()[:1]).parameter_counts()['total']
      for name in ('dense_wide', 'dense', 'modality'))
  assert wide == pytest.approx(experts, rel=.02) and dense < .8 * experts


@pytest.mark.slow
def test_all_variants_of_a_seed_have_the_same_batches_and_another_seed_has_others():
  def batches(name, seed=0):
    c = _config(name)
    c.seed = seed
    return jax.tree.leaves(list(train_run.build(c, jax.devices()[:1]).mixture().iterate(0, 2)))

  first = batches('dense')
  for name in ('dense_wide', 'attribute_top_1', 'token'):
    assert all(np.array_equal(x, y) for x, y in zip(first, batches(name), strict=True)), name
  assert not all(np.array_equal(x, y) for x, y in zip(first, batches('dense', seed=1), strict=True))


def test_seeds_of_a_recipe_are_adjacent_and_zero_shot_evaluation_has_one(run):
  cells, settings = grid.adaptation_grid(
      _OUT, [str(run)], ('digits', 'video_name'), ('zero-shot', 'prompts'), '', [])
  assert [c.folder.name for c in cells] == [
      'digits-zero-shot', 'digits-prompts-0', 'digits-prompts-1', 'digits-prompts-2',
      'video_name-zero-shot', 'video_name-prompts-0', 'video_name-prompts-1', 'video_name-prompts-2']
  assert settings == {'sweep': 'adaptation', 'runs': [str(run)], 'steps': [None], 'overrides': []}


def test_an_adaptation_cell_has_the_commands_that_a_person_would_type(run):
  recipes = ['zero-shot', 'finetune', 'finetune-all']
  cells, _ = grid.adaptation_grid(_OUT, [str(run)], ['digits'], recipes, '2', ['train.steps=99'])
  zero_shot, _, finetune, _, finetune_all = cells
  for cell, recipe, amount in ((finetune, 'finetune', 'few'), (finetune_all, 'finetune-all', 'all')):
    workdir_flag = f'--workdir=out/digits-{recipe}-1'
    assert _commands(cell) == {
        'train': ('train', f'--config=finetune:run={run},task=digits,data={amount}',
                  '--config.seed=1', '--config.train.steps=99', workdir_flag),
        'evaluate': ('evaluate', workdir_flag)}
    assert [s.needs for s in cell.stages] == ['', 'train']
  assert _commands(zero_shot) == {'evaluate': (
      'evaluate', f'--config=zero_shot:run={run},task=digits', '--config.seed=0',
      '--config.train.steps=99', '--workdir=out/digits-zero-shot')}


def test_each_of_several_runs_is_adapted_with_its_own_seed(tmp_path):
  c = tiny.config('shape', data_dir=tiny.data_dir())
  runs = [tmp_path / name for name in ('dense-0', 'dense-1', 'task-1', 'more/task-1')]
  for path in runs:
    c.seed = int(path.name[-1])
    workdir.claim_workdir(path, c, 'print')
  *runs, same_name = map(str, runs)
  cells, settings = grid.adaptation_grid(_OUT, runs, ['digits'], ['zero-shot', 'prompts'], '', [])
  assert [(c.folder.name, c.run, c.variant, c.seed) for c in cells] == [
      (f'{run}-{seed}-digits-{recipe}', run, recipe, seed) for recipe in ('zero-shot', 'prompts')
      for run, seed in (('dense', 0), ('dense', 1), ('task', 1))]
  assert settings['runs'] == runs
  assert _commands(cells[-1])['train'][1:3] == (
      f'--config=prompt_tune:run={tmp_path}/task-1,task=digits,data=few', '--config.seed=1')
  twice = [runs[0], f'{runs[0]}/', '']  # as --run=a,a/, is
  assert grid.adaptation_grid(_OUT, twice, ['digits'], ['prompts'], '', [])[1]['runs'] == runs[:1]
  with pytest.raises(UsageError, match='two runs have one name, and both would be task-1-digits-prompts'):
    grid.adaptation_grid(_OUT, [*runs, same_name], ['digits'], ['prompts'], '', [])
  with pytest.raises(UsageError, match='--num_seeds=2: of several runs each is adapted with its own seed'):
    grid.adaptation_grid(_OUT, runs, ['digits'], ['prompts'], '2', [])


def test_runs_are_averaged_only_if_their_names_differ_in_their_seeds_alone(tmp_path):
  c, runs = tiny.config('shape', data_dir=tiny.data_dir()), []
  for name, seed in (('own-big', 0), ('own-small', 0), ('wide-3', 3), ('wide-4', 4), ('wide-2', 5)):
    c.seed = seed
    workdir.claim_workdir(tmp_path / name, c, 'print')
    runs.append(str(tmp_path / name))
  cells, _ = grid.adaptation_grid(_OUT, runs, ['digits'], ['zero-shot'], '', [])
  assert [c.run for c in cells] == ['own-big', 'own-small', 'wide', 'wide', 'wide-2']
