"""The cells of both sweeps and their commands."""

from uni_moe_jax.analysis.sweep import grid


def _commands(cell):
  return {stage.name: stage.command for stage in cell.stages}


def _router_cells(routers, seeds, dense=()):
  return grid.router_cells('out', 'configs/ablation.py', routers, dense, seeds, 8, ['train.steps=3'])


def test_a_router_cell_has_the_commands_that_a_person_would_type():
  [cell] = _router_cells(['token'], [1])
  commands = _commands(cell)
  config_flags = ('--config=configs/ablation.py:token', '--config.seed=1', '--config.train.steps=3')
  workdir = '--workdir=out/token-1'
  assert list(commands) == [
      'interference at init', 'compile', 'train', 'evaluate', 'interference', 'experts', 'report']
  assert commands['interference at init'] == (
      'launch/interference.py', '--at_init', *config_flags, workdir, '--num_batches=8')
  assert commands['compile'] == (*commands['train'], '--compile_only') == (
      'launch/train.py', *config_flags, workdir, '--compile_only')
  assert commands['interference'] == ('launch/interference.py', workdir, '--num_batches=8')
  assert [s.name for s in cell.stages if s.needs] == ['evaluate', 'interference', 'experts', 'report']


def test_every_router_has_a_cell_per_seed_and_a_dense_model_no_expert_usage():
  cells = _router_cells(['dense', 'token'], range(2), dense=['dense'])
  assert [(c.folder, c.variant, c.seed) for c in cells] == [
      ('dense-0', 'dense', 0), ('dense-1', 'dense', 1), ('token-0', 'token', 0), ('token-1', 'token', 1)]
  dense, token = _commands(cells[0]), _commands(cells[2])
  assert list(dense) == [name for name in token if name != 'experts']


def test_seeds_of_a_recipe_are_adjacent_and_the_untuned_run_has_one():
  cells = grid.adaptation_cells('out', 'runs/a', ('a', 'b'), ('untuned', 'prompt'), range(3), [])
  assert [c.folder for c in cells] == ['a-untuned', 'a-prompt-0', 'a-prompt-1', 'a-prompt-2',
                                       'b-untuned', 'b-prompt-0', 'b-prompt-1', 'b-prompt-2']


def test_an_adaptation_cell_has_the_commands_that_a_person_would_type():
  untuned, finetune, finetune_all = grid.adaptation_cells(
      'out', 'runs/a', ['digits'], ['untuned', 'finetune', 'finetune-all'], [2], ['train.steps=3'])
  for cell, recipe, amount in ((finetune, 'finetune', 'few'), (finetune_all, 'finetune-all', 'all')):
    workdir = f'--workdir=out/digits-{recipe}-2'
    assert _commands(cell) == {
        'train': ('launch/train.py', f'--config=configs/finetune.py:runs/a,digits,{amount}', '--config.seed=2',
                  '--config.train.steps=3', workdir),
        'evaluate': ('launch/evaluate.py', workdir)}
    assert [s.needs for s in cell.stages] == ['', 'train']
  assert _commands(untuned) == {'evaluate': (
      'launch/evaluate.py', '--config=configs/zero_shot.py:runs/a,digits', '--config.seed=2', '--config.train.steps=3',
      '--workdir=out/digits-untuned')}
