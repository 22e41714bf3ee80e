"""The grid of a sweep: its cells, each one work directory, and the commands that make them. Imports no JAX.

Every command can be typed by hand, so that each cell can be repeated without the sweep. All configs are checked before
anything runs.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from uni_moe_jax.analysis.sweep.variants import VARIANTS, PerVariant
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.io import storage
from uni_moe_jax.tasks.router_names import DENSE, MERGED
from uni_moe_jax.train import adaptation, workdir
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

ROUTERS, ADAPTATION = 'routers', 'adaptation'  # the sweeps
TRAIN, EVALUATE = 'train', 'evaluate'  # stages
ZERO_SHOT = 'zero-shot'  # the recipe that trains nothing
MEASURES = ('evaluation', 'interference', 'along', 'experts', 'report', 'merged')  # of a trained cell of a router sweep


class Stage(NamedTuple):
  """One command of a cell; it is skipped until the stage named by `needs` has finished."""
  name: str
  command: tuple[str, ...]
  needs: str = ''
  shows_all: bool = False  # what it writes depends on all stages before it, so that it is repeated after them


class Cell(NamedTuple):
  """One work directory of a sweep."""
  folder: storage.Path  # its name identifies the cell
  variant: str  # what the sweep compares: a name in `VARIANTS`, or a fine-tuning recipe
  task: str  # that the recipe adapts to; '' in a router sweep
  seed: int
  stages: tuple[Stage, ...] = ()
  fields: tuple[str, ...] = ()  # 'field=value' of its config that other variants do not have
  run: str = ''  # group of the run that a recipe adapts, such as its router, if several runs are adapted


Grid = tuple[list[Cell], dict[str, Any]]  # cells, and the settings that all cells of a work directory have


def router_grid(
    folder: storage.Path, config: str, variants: Sequence[str], measures: Sequence[str], num_batches: int, steps: str,
    num_seeds: str, overrides: Sequence[str]) -> Grid:
  """Trains and measures every variant with every seed, one by default.

  All variants of a seed come before the next seed, so that a sweep that is stopped has complete comparisons. They see
  the same batches in the same order, which depend on data, tasks and seed alone, see `data/batches/mixtures.py`. The
  arguments are flags of uni-moe sweep.

  Raises:
    UsageError: no variant, an unknown one, no such config, or one that is not valid.
  """
  for flag, given, choices in (('variants', variants, VARIANTS), ('measure', measures, MEASURES)):
    if unknown := [x for x in given if x not in choices]:
      raise UsageError(f'--{flag}={",".join(given)}: {unknown[0]!r} is unknown; {nearest(unknown[0], choices)}.')
  if not variants:
    raise UsageError('--variants is empty: name at least one.')
  _check_overrides(overrides, {'moe.router': '--variants', 'seed': '--num_seeds'})
  seeds, steps_of = (PerVariant(*x) for x in (
      ('num_seeds', num_seeds, tuple(VARIANTS), 1), ('steps', steps, tuple(VARIANTS), None)))
  configs, batches = {}, f'--num_batches={num_batches}'
  for name in dict.fromkeys(variants):
    router, fields = VARIANTS[name]
    with_router = f'{config}{"," if ":" in config else ":"}router={router}'
    own = fields(cli.config_from(with_router, overrides))
    own += (f'train.steps={steps_of[name]}',) if steps_of[name] else ()
    parsed = _check(with_router, (*overrides, *own))
    kept = _kept(parsed.train)
    if 'along' in measures and not kept:
      raise UsageError('--measure=along needs checkpoints between the first step and the last: set train.keep_every '
                       f'to a multiple of train.checkpoint_every={parsed.train.checkpoint_every} below '
                       f'train.steps={parsed.train.steps}.')
    configs[name] = with_router, own, parsed.moe.router, kept

  def cell(name: str, seed: int) -> Cell:
    (with_router, own, router, kept), path = configs[name], folder / f'{name}-{seed}'
    workdir_flag, config_flags = f'--workdir={path}', _config_flags(with_router, seed, (*overrides, *own))
    evaluated = EVALUATE if 'evaluation' in measures else TRAIN  # what --merged needs; else it evaluates the run, too
    measured = {
        'evaluation': [Stage(EVALUATE, (EVALUATE, workdir_flag), TRAIN)],
        'interference': [Stage('interference', ('interference', workdir_flag, batches), TRAIN)],
        'along': [Stage(f'interference at step {s}', ('interference', workdir_flag, f'--step={s}', batches), TRAIN)
                  for s in kept],
        'experts': [Stage('experts', ('experts', workdir_flag), TRAIN)] if router != DENSE else [],
        'merged': [Stage('merged', (EVALUATE, workdir_flag, '--merged'), evaluated)] if router in MERGED else [],
        'report': [Stage('report', ('report', workdir_flag), TRAIN, shows_all=True)]}
    compiles = ['--compile_separately'] if seed == 0 else []  # later seeds find the program in JAX's cache
    at_init = Stage('interference at init', ('interference', '--at_init', *config_flags, workdir_flag, batches))
    return Cell(path, name, '', seed, (
        *([at_init] if 'interference' in measures else []),
        Stage(TRAIN, (TRAIN, *config_flags, workdir_flag, *compiles)),
        *(stage for measure, stages in measured.items() if measure in measures for stage in stages)), own)

  cells = [cell(name, seed) for seed in range(max(seeds[name] for name in configs)) for name in configs
           if seed < seeds[name]]
  return cells, {'sweep': ROUTERS, 'config': config, 'num_batches': num_batches, 'overrides': list(overrides)}


def adaptation_grid(
    folder: storage.Path, runs: Sequence[str], tasks: Sequence[str], recipes: Sequence[str], num_seeds: str,
    overrides: Sequence[str]) -> Grid:
  """Adapts trained runs to every task with every recipe and seed.

  Seeds vary fastest, because cells of one task and recipe share a compiled step; a seed draws the examples, their order
  and fresh parameters. One run is adapted with three seeds by default, and evaluated zero-shot once. Of several runs
  each is adapted with its own seed. Those whose names differ in it alone, as dense-0 and dense-1, are averaged. The
  arguments are flags of uni-moe sweep.

  Raises:
    UsageError: no run, an unknown recipe or task, or a config that is not valid.
  """
  if not any(runs):
    raise UsageError('--sweep=adaptation needs --run: the work directory of a trained run, or several with commas.')
  _check_overrides(overrides, {'train.init': '--run', 'seed': '--num_seeds'})
  if unknown := [r for r in recipes if r not in adaptation.RECIPES]:
    raise UsageError(f'--recipes={unknown[0]} is unknown; choices: {", ".join(adaptation.RECIPES)}.')
  runs, cells = list(dict.fromkeys(str(storage.absolute(r)) for r in runs if r)), []
  several = len(runs) > 1
  if several and num_seeds:
    raise UsageError(f'--num_seeds={num_seeds}: of several runs each is adapted with its own seed; remove it.')
  seeds = PerVariant('num_seeds', num_seeds, tuple(adaptation.RECIPES), 3)

  def cell(run: str, task: str, recipe: str, seed: int) -> Cell:
    config, run_name = adaptation.RECIPES[recipe].format(run=run, task=task), os.path.basename(run)
    own, last = f'{run_name}-' if several else '', '' if several or recipe == ZERO_SHOT else f'-{seed}'
    path = folder / f'{own}{task}-{recipe}{last}'
    workdir_flag, config_flags = f'--workdir={path}', _config_flags(config, seed, overrides)
    stages = (Stage(EVALUATE, (EVALUATE, *config_flags, workdir_flag)),) if recipe == ZERO_SHOT else (
        Stage(TRAIN, (TRAIN, *config_flags, workdir_flag)), Stage(EVALUATE, (EVALUATE, workdir_flag), TRAIN))
    return Cell(path, recipe, task, seed, stages, run=run_name.removesuffix(f'-{seed}') or run_name if several else '')

  for task in dict.fromkeys(tasks):
    for recipe in dict.fromkeys(recipes):
      for run in runs:
        _check(adaptation.RECIPES[recipe].format(run=run, task=task), overrides)
        of_run = [workdir.load_config(run).seed] if several else range(1 if recipe == ZERO_SHOT else seeds[recipe])
        cells += [cell(run, task, recipe, seed) for seed in of_run]
  names = [c.folder.name for c in cells]
  if twice := [name for name in names if names.count(name) > 1]:
    raise UsageError(f'--run={",".join(runs)}: two runs have one name, and both would be {twice[0]}; rename a folder.')
  steps = [workdir.saved_step(run) for run in runs]
  return cells, {'sweep': ADAPTATION, 'runs': runs, 'steps': steps, 'overrides': list(overrides)}


def _check_overrides(overrides: Sequence[str], set_by: Mapping[str, str]) -> None:
  """Raises UsageError for a field that differs between cells, which would be the same run. set_by: field → its flag."""
  for override in overrides:
    if (field := override.partition('=')[0]) in set_by:
      raise UsageError(f'--override={override}: each cell has its own {field}; remove it and use {set_by[field]}.')


def _check(config: str, overrides: Sequence[str]) -> Any:
  parsed = cli.config_from(config, overrides)
  make_plan(parsed)
  return parsed


def _kept(train: ml_collections.ConfigDict) -> range:
  """Steps of the checkpoints that a run keeps before its last one."""
  every = math.lcm(train.keep_every, train.checkpoint_every)  # 0: none are kept
  return range(every, train.steps, every) if every else range(0)


def _config_flags(config: str, seed: int, overrides: Sequence[str]) -> tuple[str, ...]:
  return (f'--config={config}', f'--config.seed={seed}', *(f'--config.{o}' for o in overrides))
