"""The grid of a sweep: its cells, each one work directory, and the commands that make them. Imports no JAX.

Every command can be typed by hand, so that each cell can be repeated without the sweep. All configs are checked before
anything runs.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.train import finetuning, workdir
from uni_moe_jax.utils import cli, storage
from uni_moe_jax.utils.errors import UsageError

ROUTERS, ADAPTATION = 'routers', 'adaptation'  # the sweeps
TRAIN, EVALUATE = 'train', 'evaluate'  # stages
ZERO_SHOT = 'zero-shot'  # the recipe that trains nothing


class Stage(NamedTuple):
  """One command of a cell; it is skipped until the stage named by `needs` has finished."""
  name: str
  command: tuple[str, ...]
  needs: str = ''


class Cell(NamedTuple):
  """One work directory of a sweep."""
  folder: storage.Path  # its name identifies the cell
  variant: str  # what the sweep compares: a router or a fine-tuning recipe
  task: str  # that the recipe adapts to; '' in the router ablation
  seed: int
  stages: tuple[Stage, ...]


Grid = tuple[list[Cell], dict[str, Any]]  # cells, and the settings that all cells of a work directory have


def router_grid(
    folder: storage.Path, config: str, routers: Sequence[str], num_batches: int, num_seeds: int | None,
    overrides: Sequence[str]) -> Grid:
  """Trains, evaluates and measures every router with every seed, one by default.

  The arguments are flags of uni-moe sweep.

  Raises:
    UsageError: no router, no such config, or one that is not valid.
  """
  if not routers:
    raise UsageError('--routers is empty: name at least one.')
  cells, batches = [], f'--num_batches={num_batches}'
  for router in dict.fromkeys(routers):
    with_router = f'{config}:router={router}'
    is_dense = _check(with_router, overrides).moe.router == 'dense'
    for seed in range(num_seeds or 1):
      path = folder / f'{router}-{seed}'
      workdir_flag, config_flags = f'--workdir={path}', _config_flags(with_router, seed, overrides)
      cells.append(Cell(path, router, '', seed, (
          Stage('interference at init', ('interference', '--at_init', *config_flags, workdir_flag, batches)),
          # A process that has compiled trains more slowly, see `train.loop.compile_steps`.
          Stage('compile', (TRAIN, *config_flags, workdir_flag, '--compile_only')),
          Stage(TRAIN, (TRAIN, *config_flags, workdir_flag)),
          Stage(EVALUATE, (EVALUATE, workdir_flag), TRAIN),
          Stage('interference', ('interference', workdir_flag, batches), TRAIN),
          *([] if is_dense else [Stage('experts', ('experts', workdir_flag), TRAIN)]),
          Stage('report', ('report', workdir_flag), TRAIN))))
  return cells, {'sweep': ROUTERS, 'config': config, 'num_batches': num_batches, 'overrides': overrides}


def adaptation_grid(
    folder: storage.Path, run: str | None, tasks: Sequence[str], recipes: Sequence[str], num_seeds: int | None,
    overrides: Sequence[str]) -> Grid:
  """Adapts a trained run to every task with every recipe and seed.

  Seeds, three by default, vary fastest, because cells of one task and recipe share a compiled step; a seed draws the
  examples, their order and fresh parameters. Zero-shot evaluation has one seed. The arguments are flags of
  uni-moe sweep.

  Raises:
    UsageError: no run, an unknown recipe or task, or a config that is not valid.
  """
  if not run:
    raise UsageError('--sweep=adaptation needs --run: the work directory of a trained run.')
  if unknown := [r for r in recipes if r not in finetuning.RECIPES]:
    raise UsageError(f'--recipes={unknown[0]} is unknown; choices: {", ".join(finetuning.RECIPES)}.')
  run, cells = str(storage.absolute(os.path.expanduser(run))), []
  for task in dict.fromkeys(tasks):
    for name in dict.fromkeys(recipes):
      config = finetuning.RECIPES[name].format(run=run, task=task)
      _check(config, overrides)
      for seed in range(1 if name == ZERO_SHOT else num_seeds or 3):
        path = folder / (f'{task}-{name}' + ('' if name == ZERO_SHOT else f'-{seed}'))
        workdir_flag, config_flags = f'--workdir={path}', _config_flags(config, seed, overrides)
        stages = (Stage(EVALUATE, (EVALUATE, *config_flags, workdir_flag)),) if name == ZERO_SHOT else (
            Stage(TRAIN, (TRAIN, *config_flags, workdir_flag)),
            Stage(EVALUATE, (EVALUATE, workdir_flag), TRAIN))
        cells.append(Cell(path, name, task, seed, stages))
  return cells, {'sweep': ADAPTATION, 'run': run, 'step': workdir.saved_step(run), 'overrides': overrides}


def _check(config: str, overrides: Sequence[str]) -> Any:
  parsed = cli.config_from(config, overrides)
  make_plan(parsed)
  return parsed


def _config_flags(config: str, seed: int, overrides: Sequence[str]) -> tuple[str, ...]:
  return (f'--config={config}', f'--config.seed={seed}', *(f'--config.{o}' for o in overrides))
