"""The cells of both sweeps and their commands."""

import pathlib

import pytest

from tests.helpers import tiny
from uni_moe_jax.analysis.sweep import grid
from uni_moe_jax.train import workdir

_OUT = pathlib.Path('out')


def _router_cells(routers, num_seeds):
  cells, settings = grid.router_grid(_OUT, 'ablation', routers, 8, num_seeds, ['train.steps=99'])
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
  cell = _router_cells(['token'], 2)[1]
  commands = _commands(cell)
  config_flags = ('--config=ablation:router=token', '--config.seed=1', '--config.train.steps=99')
  workdir_flag = '--workdir=out/token-1'
  assert list(commands) == [
      'interference at init', 'compile', 'train', 'evaluate', 'interference', 'experts', 'report']
  assert commands['interference at init'] == (
      'interference', '--at_init', *config_flags, workdir_flag, '--num_batches=8')
  assert commands['compile'] == (*commands['train'], '--compile_only') == (
      'train', *config_flags, workdir_flag, '--compile_only')
  assert commands['interference'] == ('interference', workdir_flag, '--num_batches=8')
  assert [s.name for s in cell.stages if s.needs] == ['evaluate', 'interference', 'experts', 'report']


def test_every_router_has_a_cell_per_seed_and_a_dense_model_no_expert_usage():
  cells = _router_cells(['dense', 'token', 'dense'], 2)
  assert [(c.folder, c.variant, c.seed) for c in cells] == [
      (_OUT / 'dense-0', 'dense', 0), (_OUT / 'dense-1', 'dense', 1),
      (_OUT / 'token-0', 'token', 0), (_OUT / 'token-1', 'token', 1)]
  dense, token = _commands(cells[0]), _commands(cells[2])
  assert list(dense) == [name for name in token if name != 'experts']


def test_seeds_of_a_recipe_are_adjacent_and_zero_shot_evaluation_has_one(run):
  cells, settings = grid.adaptation_grid(
      _OUT, str(run), ('digits', 'video_name'), ('zero-shot', 'prompts'), None, [])
  assert [c.folder.name for c in cells] == [
      'digits-zero-shot', 'digits-prompts-0', 'digits-prompts-1', 'digits-prompts-2',
      'video_name-zero-shot', 'video_name-prompts-0', 'video_name-prompts-1', 'video_name-prompts-2']
  assert settings == {'sweep': 'adaptation', 'run': str(run), 'step': None, 'overrides': []}


def test_an_adaptation_cell_has_the_commands_that_a_person_would_type(run):
  recipes = ['zero-shot', 'finetune', 'finetune-all']
  cells, _ = grid.adaptation_grid(_OUT, str(run), ['digits'], recipes, 2, ['train.steps=99'])
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
