"""Trains and measures a list of runs, one after the other, each by the commands that a person would type.

A run has a work directory of its own, and `finished.json` in it lists the commands that succeeded: the next call skips
these and repeats the others, which continue where they stopped. Imports no JAX.
"""

import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import read_json, write_json
from uni_moe_jax.tasks.router_names import DENSE, ROUTERS
from uni_moe_jax.train import adaptation
from uni_moe_jax.utils import signals
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.exit_codes import FINISHED, PREEMPTED
from uni_moe_jax.utils.suggest import nearest

FINISHED_FILE = 'finished.json'  # in the work directory of a run
MEASURES = ('evaluate', 'interference', 'experts', 'report')  # commands after training
ZERO_SHOT = 'zero-shot'  # the recipe that trains nothing

Command = tuple[str, ...]  # a launch script and its arguments, such as ('train', '--workdir=…')


class SweepRun(NamedTuple):
  """One run of a sweep."""
  folder: storage.Path  # its work directory
  column: str  # of the table: runs that differ in their seed alone have the same
  commands: tuple[Command, ...]


def router_runs(
    folder: storage.Path, config: str, variants: Sequence[str], measures: Sequence[str], num_batches: int,
    num_seeds: int, overrides: Sequence[str]) -> list[SweepRun]:
  """Runs of routers on the same batches in the same order, which depend on data, tasks and seed alone.

  All variants of a seed come before the next seed, so that a sweep that is stopped has complete comparisons.

  Args:
    config: with an argument router=ROUTER.
    variants: routers, each followed by fields of its config: 'attribute', 'token+moe.top_k=1+train.steps=214'.
    measures: of `MEASURES`. num_batches: of interference. overrides: fields of every config.

  Raises:
    UsageError: an unknown router, measure or field, or a config that is not valid.
  """
  _check_choices('measure', measures, MEASURES)
  _check_choices('variants', [v.partition('+')[0] for v in variants], ROUTERS)
  _check_overrides([*overrides, *(field for v in variants for field in v.split('+')[1:])],
                   {'moe.router': '--variants', 'seed': '--num_seeds'})
  extra = {'interference': (f'--num_batches={num_batches}',)}
  runs = []
  for seed in range(num_seeds):
    for variant in dict.fromkeys(variants):
      router, *fields = variant.split('+')
      own_config = f'{config}{"," if ":" in config else ":"}router={router}'
      path = _folder_of(folder, variant, seed)
      train = _config_command('train', path, own_config, seed, [*overrides, *fields])
      runs.append(SweepRun(path, variant, (train, *(
          (measure, f'--workdir={path}', *extra.get(measure, ())) for measure in measures
          if not (measure == 'experts' and router == DENSE)))))
  return _distinct(runs)


def adaptation_runs(
    folder: storage.Path, trained: Sequence[str], tasks: Sequence[str], recipes: Sequence[str], num_seeds: int,
    overrides: Sequence[str]) -> list[SweepRun]:
  """Runs that adapt trained ones to every task with every recipe and seed; `ZERO_SHOT` needs no seeds.

  A seed draws the examples, their order and fresh parameters. trained: work directories; with several, a column has the
  name of the run, too.

  Raises:
    UsageError: no run, an unknown recipe or task, or a config that is not valid.
  """
  if not trained:
    raise UsageError('--sweep=adaptation needs --run: the work directory of a trained run, or several with commas.')
  _check_choices('recipes', recipes, adaptation.RECIPES)
  _check_overrides(overrides, {'train.init': '--run', 'seed': '--num_seeds'})
  runs, sources = [], [storage.absolute(run) for run in dict.fromkeys(trained)]
  for task in dict.fromkeys(tasks):
    for recipe in dict.fromkeys(recipes):
      for source in sources:
        config = adaptation.RECIPES[recipe].format(run=source, task=task)
        column = recipe if len(sources) == 1 else f'{source.name} {recipe}'
        for seed in range(1 if recipe == ZERO_SHOT else num_seeds):
          path = _folder_of(folder, f'{task}-{column}'.replace(' ', '-'), seed)
          commands = ((_config_command('evaluate', path, config, seed, overrides),) if recipe == ZERO_SHOT else (
              _config_command('train', path, config, seed, overrides), ('evaluate', f'--workdir={path}')))
          runs.append(SweepRun(path, column, commands))
  return _distinct(runs)


def _folder_of(folder: storage.Path, name: str, seed: int) -> storage.Path:
  return folder / f'{name.replace("=", "_").replace("/", "_")}-{seed}'  # '=' would end an argument of a config


def _config_command(
    command: str, workdir: storage.Path, config: str, seed: int, overrides: Sequence[str]) -> Command:
  """A command that takes a config, which is checked before anything runs."""
  make_plan(cli.config_from(config, overrides))
  return (command, f'--config={config}', f'--config.seed={seed}', *(f'--config.{o}' for o in overrides),
          f'--workdir={workdir}')


def _distinct(runs: list[SweepRun]) -> list[SweepRun]:
  folders = [run.folder for run in runs]
  if not runs:
    raise UsageError('the sweep has no runs: name at least one variant, or a task and a recipe.')
  if twice := [f.name for f in folders if folders.count(f) > 1]:
    raise UsageError(f'two runs would have the work directory {twice[0]}; rename a folder of --run.')
  return runs


def _check_choices(flag: str, given: Sequence[str], choices: Sequence[str]) -> None:
  if unknown := [x for x in given if x not in choices]:
    raise UsageError(f'--{flag}={",".join(given)}: {unknown[0]!r} is unknown; {nearest(unknown[0], choices)}.')


def _check_overrides(overrides: Sequence[str], set_by: dict[str, str]) -> None:
  """Raises UsageError for a field that the sweep itself sets. set_by: field → its flag."""
  for override in overrides:
    if (field := override.partition('=')[0]) in set_by:
      raise UsageError(f'{override}: every run has its own {field}; remove it and use {set_by[field]}.')


def run_all(runs: Sequence[SweepRun], start: Callable[[Command], int]) -> int:
  """Runs every command that has not finished; returns an exit code.

  A command that fails ends its run, and the next run starts. `start` runs a command and returns its exit code; after
  `PREEMPTED` nothing more is started. A report is written again after any other command of its run.
  """
  failed = False
  for number, run in enumerate(runs, 1):
    print(f'{number}/{len(runs)} {run.folder.name}', flush=True)
    storage.make_folder(run.folder)
    finished, has_changed = read_json(run.folder / FINISHED_FILE, []), False
    for command in run.commands:
      if list(command) in finished and not (has_changed and command[0] == 'report'):
        continue
      has_changed = True
      if (code := start(command)) == PREEMPTED:
        return PREEMPTED
      if code != FINISHED:
        print(f'error: {run.folder.name}: {command[0]} failed with exit code {code}.', file=sys.stderr, flush=True)
        failed = True
        break
      if list(command) not in finished:
        finished.append(list(command))
        write_json(run.folder / FINISHED_FILE, finished)
  return 1 if failed else FINISHED


def starter(scripts: pathlib.Path, cache: storage.Path) -> Callable[[Command], int]:
  """A `start` for `run_all`: runs launch scripts of a folder, which share a cache of compiled programs.

  A command gets a signal of a terminal only once, from this process, and SIGTERM if this process dies.
  """
  environment = {'JAX_COMPILATION_CACHE_DIR': str(cache), **os.environ}

  def start(command: Command) -> int:
    print('$ uni-moe', *command, flush=True)
    return signals.wait(signals.start(
        [sys.executable, scripts / f'{command[0]}.py', *command[1:]], env=environment))
  return start
