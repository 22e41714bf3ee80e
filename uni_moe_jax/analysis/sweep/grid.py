"""The grid of a sweep: its cells, each one work directory, and the commands that make them. Imports no JAX.

Every command can be typed by hand, so that each cell can be repeated without the sweep.
"""

import dataclasses
import os
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

import ml_collections

from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.train import finetuning
from uni_moe_jax.train import workdir as workdir_lib
from uni_moe_jax.utils import cli
from uni_moe_jax.utils.errors import UsageError

ROUTERS, ADAPTATION = 'routers', 'adaptation'  # the sweeps
INTERFERENCE_AT_INIT, COMPILE, TRAIN, EVALUATE, INTERFERENCE, EXPERTS, REPORT = (
    'interference at init', 'compile', 'train', 'evaluate', 'interference', 'experts', 'report')
UNTUNED = 'untuned'


@dataclasses.dataclass(frozen=True)
class Stage:
  """One command of a cell; it is skipped until the stage named by `needs` has finished."""
  name: str
  command: tuple[str, ...]
  needs: str = ''


@dataclasses.dataclass(frozen=True)
class Cell:
  """One work directory of a sweep.

  Attributes:
    folder: name of the work directory inside that of the sweep.
    variant: what the sweep compares: a router or a fine-tuning recipe.
    task: that the recipe adapts to; '' in the router ablation.
    seed: of the run.
    stages: in order.
  """
  folder: str
  variant: str
  task: str
  seed: int
  stages: tuple[Stage, ...]


def router_grid(
    workdir: str | os.PathLike[str], config: str, routers: Sequence[str], num_batches: int, num_seeds: int | None, overrides: Sequence[str],
    root: pathlib.Path) -> tuple[list[Cell], dict[str, Any]]:
  """(cells, settings that the cells of one work directory share) of a router ablation. Checks all configs.

  Args:
    workdir, config, routers, num_batches, overrides: see `router_cells`.
    num_seeds: 1 by default.
    root: of the repository; a relative config is relative to it.

  Raises:
    UsageError: no router, no such file, or a router or an override that the config does not accept.
  """
  routers = list(dict.fromkeys(routers))
  if not routers:
    raise UsageError('--routers is empty: name at least one.')
  file = (root / os.path.expanduser(config)).resolve()
  if not file.is_file():
    raise UsageError(f'--config={config}: there is no such file.')
  dense = [r for r in routers if _checked_config(f'{file}:{r}', overrides).moe.router == 'dense']
  settings = {'sweep': ROUTERS, 'config': config, 'num_batches': num_batches, 'overrides': overrides}
  return router_cells(workdir, str(file), routers, dense, range(num_seeds or 1), num_batches, overrides), settings


def adaptation_grid(
    workdir: str | os.PathLike[str], run: str | None, tasks: Sequence[str], recipes: Sequence[str], num_seeds: int | None,
    overrides: Sequence[str], root: pathlib.Path) -> tuple[list[Cell], dict[str, Any]]:
  """(cells, settings that the cells of one work directory share) of an adaptation study. Checks all configs.

  Args:
    workdir, run, tasks, recipes, overrides: see `adaptation_cells`.
    num_seeds: 3 by default.
    root: of the repository.

  Raises:
    UsageError: no run, an unknown recipe, or a task or an override that a config does not accept.
  """
  if not run:
    raise UsageError('--sweep=adaptation needs --run: the work directory of a trained run.')
  if unknown := [r for r in recipes if r not in finetuning.RECIPES]:
    raise UsageError(f'--recipes={unknown[0]} is unknown; choices: {", ".join(finetuning.RECIPES)}.')
  run = os.path.abspath(os.path.expanduser(run))
  for task in tasks:
    for recipe in map(finetuning.RECIPES.get, recipes):
      _checked_config(f'{root / recipe.file}:{recipe.argument(run, task)}', overrides)
  settings = {'sweep': ADAPTATION, 'run': run, 'step': workdir_lib.saved_step(run), 'overrides': overrides}
  return adaptation_cells(workdir, run, tasks, recipes, range(num_seeds or 3), overrides), settings


def _checked_config(spec: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
  config = cli.config_from(spec, overrides)
  make_plan(config)
  return config


def router_cells(
    workdir: str | os.PathLike[str], config: str, routers: Sequence[str], dense: Collection[str], seeds: Sequence[int], num_batches: int,
    overrides: Sequence[str]) -> list[Cell]:
  """Trains, evaluates and measures every router with every seed.

  Args:
    workdir: of the sweep.
    config: path of a config file whose argument is the router.
    routers: names that the config file accepts.
    dense: the routers that give a model without experts.
    seeds: of the runs.
    num_batches: of the interference measurement, per task.
    overrides: 'train.steps=20', of fields of the config.
  """
  cells = []
  for router in routers:
    for seed in seeds:
      folder = f'{router}-{seed}'
      cell_dir, config_flags = _flags(workdir, folder, f'{config}:{router}', seed, overrides)
      batches = f'--num_batches={num_batches}'
      stages = [
          Stage(INTERFERENCE_AT_INIT, ('launch/interference.py', '--at_init', *config_flags, cell_dir, batches)),
          # A process that has compiled trains more slowly, see `train.loop.compile_steps`.
          Stage(COMPILE, ('launch/train.py', *config_flags, cell_dir, '--compile_only')),
          Stage(TRAIN, ('launch/train.py', *config_flags, cell_dir)),
          Stage(EVALUATE, ('launch/evaluate.py', cell_dir), TRAIN),
          Stage(INTERFERENCE, ('launch/interference.py', cell_dir, batches), TRAIN),
          *([] if router in dense else [Stage(EXPERTS, ('launch/experts.py', cell_dir), TRAIN)]),
          Stage(REPORT, ('launch/report.py', cell_dir), TRAIN)]
      cells.append(Cell(folder, router, '', seed, tuple(stages)))
  return cells


def adaptation_cells(
    workdir: str | os.PathLike[str], run: str, tasks: Sequence[str], recipes: Sequence[str], seeds: Sequence[int],
    overrides: Sequence[str]) -> list[Cell]:
  """Adapts a trained run to every task with every recipe and seed.

  Seeds vary fastest, because the cells of one task and recipe share a compiled step. The untuned run has one seed.

  Args:
    workdir: of the sweep.
    run: work directory of the trained run.
    tasks: of the run, or of `finetuning.TRANSFER`.
    recipes: names in `finetuning.RECIPES`.
    seeds: of the examples, their order and fresh parameters.
    overrides: as in `router_cells`.
  """
  cells = []
  for task in tasks:
    for name in recipes:
      recipe = finetuning.RECIPES[name]
      for seed in seeds[:1] if name == UNTUNED else seeds:
        folder = f'{task}-{name}' + ('' if name == UNTUNED else f'-{seed}')
        cell_dir, config_flags = _flags(workdir, folder, f'{recipe.file}:{recipe.argument(run, task)}', seed, overrides)
        if name == UNTUNED:
          stages = (Stage(EVALUATE, ('launch/evaluate.py', *config_flags, cell_dir)),)
        else:
          stages = (Stage(TRAIN, ('launch/train.py', *config_flags, cell_dir)),
                    Stage(EVALUATE, ('launch/evaluate.py', cell_dir), TRAIN))
        cells.append(Cell(folder, name, task, seed, stages))
  return cells


def _flags(
    workdir: str | os.PathLike[str], folder: str, config: str, seed: int, overrides: Sequence[str]) -> tuple[str, tuple[str, ...]]:
  """(--workdir=…, (--config=…, its overrides)) of a cell."""
  config_flags = (f'--config={config}', f'--config.seed={seed}', *(f'--config.{o}' for o in overrides))
  return f'--workdir={pathlib.Path(workdir) / folder}', config_flags
