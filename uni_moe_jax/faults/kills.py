"""SIGKILL at random moments, some inside a save: a run that is started again ends as if nothing had happened."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.train import manifest
from uni_moe_jax.train.workdir import CHECKPOINTS, DAMAGED, saved_steps

_ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = 'configs/small.py'
_POLL = 0.001  # seconds
_LONGEST = 600.0  # of a run that is not killed
_ENDLESS = -signal.SIGKILL  # exit code of one that took longer
_SAVES_LET_PASS = 4  # at most, before one is hit
_BEYOND = 1.2  # kills inside a save are drawn from so much of the time that one takes: what comes after it is hit, too
_UNFINISHED = '*.orbax-checkpoint-tmp'
# How far a save was when it was hit.
EMPTY, ARRAYS, SEALED, DELETING = 'nothing written', 'arrays under way', 'manifest written', 'old one being deleted'


@dataclasses.dataclass
class Trainer:
  """Starts the training command in folders below `folder`.

  Attributes:
    folder: for work directories, compiled programs and the tokenizer.
    plant: fault of `planted.FAULTS`; '' is none.
    overrides: fields of the config. flags: more of launch/train.py.
    optimised: by XLA, as people's programs are; otherwise they compile sooner.
  """
  folder: pathlib.Path
  plant: str = ''
  overrides: tuple[str, ...] = ()
  flags: tuple[str, ...] = ()
  optimised: bool = False

  def compile(self, log: pathlib.Path) -> int:
    """Fills the cache of compiled programs; an exit code."""
    return dataclasses.replace(self, flags=('--compile_only',)).run(self.folder / 'compiled', log)[0]

  def command(self, workdir: pathlib.Path) -> list[str]:
    """Program and arguments."""
    return [sys.executable, *(['-m', 'uni_moe_jax.faults.planted', self.plant] if self.plant else []),
               str(_ROOT / 'launch/train.py'), f'--config={_ROOT / CONFIG}', f'--workdir={workdir}',
               f'--config.data.dir={self.folder}', *(f'--config.{o}' for o in self.overrides), *self.flags]

  def start(self, workdir: pathlib.Path, log: pathlib.Path) -> subprocess.Popen:
    """A process whose output is appended to `log`."""
    return start(self.command(workdir), log, environment(self.folder, self.optimised))

  def run(self, workdir: pathlib.Path, log: pathlib.Path) -> tuple[int, float]:
    """(exit code, seconds) of a run that is left alone, see `code_of`."""
    began = time.monotonic()
    return code_of(self.start(workdir, log)), time.monotonic() - began


def start(command: Sequence[str], log: pathlib.Path, env: Mapping[str, str]) -> subprocess.Popen:
  """A process, the first of its group, whose output is appended to `log`."""
  with log.open('ab') as file:
    return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=env)


def code_of(process: subprocess.Popen) -> int:
  """Waits until a process that `start` made ends, and not for ever: its group is killed after _LONGEST seconds; see `ending`."""
  try:
    return process.wait(_LONGEST)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def ending(code: int) -> str:
  """What a finding calls an exit code."""
  return f'no end in {_LONGEST:g} s' if code == _ENDLESS else f'exit code {code}'


def environment(folder: pathlib.Path, optimised: bool = False) -> dict[str, str]:
  """Of a child: this package, one device, and one cache of compiled programs, in `folder`, for all."""
  return {**os.environ, 'PYTHONPATH': f'{_ROOT}:{os.environ.get("PYTHONPATH", "")}', 'PYTHONUNBUFFERED': '1', 'JAX_PLATFORMS': 'cpu',
          'XLA_FLAGS': '' if optimised else '--xla_backend_optimization_level=0', 'JAX_COMPILATION_CACHE_DIR': str(folder / 'jax'),
          'TF_CPP_MIN_LOG_LEVEL': '2', 'TF_ENABLE_ONEDNN_OPTS': '0'}


@dataclasses.dataclass
class Tally:
  """What a series of kills came to.

  Attributes:
    before_steps: kills that hit a process before its first step. stages: how far saves were, of which one was under way or had just
      ended, see EMPTY and what follows it.
  """
  kills: int = 0
  inside_saves: int = 0
  before_steps: int = 0
  stages: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  starts: int = 0
  finished: int = 0
  findings: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Undisturbed:
  """A run that was left alone: its work directory, the seconds that it took, and those that one of its saves took."""
  workdir: pathlib.Path
  seconds: float
  save_seconds: float


def series(trainer: Trainer, whole: Undisturbed, kills: int, saves: int, seed: int) -> Tally:
  """Kills runs until there were enough kills, at least `saves` of them inside a save, and lets each run come to its end.

  Args:
    trainer: of the runs.
    whole: the same run, never disturbed.
    kills, saves: how many.
    seed: draws the moments.
  """
  rng, tally = random.Random(seed), Tally()
  while tally.kills < kills or tally.inside_saves < saves:
    workdir = trainer.folder / f'killed_{tally.finished}{trainer.plant}'
    log = workdir.with_suffix('.log')
    shutil.rmtree(workdir, ignore_errors=True)
    log.unlink(missing_ok=True)
    expected, code = None, None
    while code is None:
      enough = tally.kills >= kills and tally.inside_saves >= saves
      save = tally.inside_saves < saves and (kills - tally.kills <= saves - tally.inside_saves or rng.random() < .5)
      said_before = log.stat().st_size if log.exists() else 0
      code = _until_killed(trainer, workdir, log, rng, None if enough else save, whole, tally)
      tally.starts += 1
      said = log.read_text(errors='replace')[said_before:]
      _check_resumed(expected, said, tally)
      expected = newest_whole(workdir)
      if code is None:
        tally.before_steps += _STEPPED not in said
        _check_nothing_lost(workdir, expected, tally)
        _check_whole(workdir, expected, tally)
    tally.finished += 1
    if code != 0:
      tally.findings.append(f'{workdir.name}: {ending(code)}: {log.read_text(errors="replace")[-300:]}')
      break
    tally.findings += differences(whole.workdir, workdir)
    if tally.findings:
      break
    shutil.rmtree(workdir)
  return tally


def newest_whole(workdir: pathlib.Path) -> int | None:
  """The step from which a run has to go on."""
  folder = workdir / CHECKPOINTS
  return next((s for s in reversed(saved_steps(workdir)) if not manifest.damage(folder / str(s))), None)


def save_seconds(workdir: pathlib.Path) -> float:
  """How long the slowest save took of those that are there: what Orbax wrote down of its beginning and end."""
  said = [json.loads(path.read_text()) for path in (workdir / CHECKPOINTS).glob('*/_CHECKPOINT_METADATA')]
  return max(m['commit_timestamp_nsecs'] - m['init_timestamp_nsecs'] for m in said) / 1e9


def _until_killed(
    trainer, workdir, log, rng, save: bool | None, whole: Undisturbed, tally: Tally) -> int | None:
  """Starts a run and kills it: in a save, at a random moment, or not at all (None). Its exit code; None if it was killed."""
  saves = _Saves(workdir)
  process = trainer.start(workdir, log)
  if save is None:
    return code_of(process)
  if save:
    _wait_for_a_save(process, saves, rng.randrange(_SAVES_LET_PASS))
  # Into a save the next moments are drawn from, else the whole run.
  end = time.monotonic() + rng.uniform(0, _BEYOND * whole.save_seconds if save else whole.seconds)
  while time.monotonic() < end and process.poll() is None:
    saves.under_way()
    time.sleep(_POLL)
  if process.poll() is not None:
    return process.returncode
  process.kill()
  if process.wait() != -signal.SIGKILL:  # it ended by itself in the same moment
    return process.returncode
  tally.kills += 1
  tally.inside_saves += saves.under_way()
  if stage := saves.stage(len(saved_steps(whole.workdir))):
    tally.stages[stage] += 1
  return None


class _Saves:
  """Whether a save of the process that runs now is under way. What others have left unfinished stays until it is ready to save."""

  def __init__(self, workdir: pathlib.Path):
    self._folder = workdir / CHECKPOINTS
    self._left_over = self._unfinished()

  def under_way(self) -> bool:
    """To be asked often: the place of a file that goes may be given to one that comes."""
    now = self._unfinished()
    self._left_over &= now
    return bool(now - self._left_over)

  def stage(self, keep: int) -> str:
    """How far the save is that is under way, or has just ended; '' where there is none. keep: checkpoints that stay."""
    for name, _ in self._unfinished() - self._left_over:
      files = {path.name for path in (self._folder / name).rglob('*') if path.is_file()} - {'_CHECKPOINT_METADATA'}
      return SEALED if manifest.FILE in files else ARRAYS if files else EMPTY
    # The new one has its name before the old one goes.
    return DELETING if len(saved_steps(self._folder.parent)) > keep else ''

  def _unfinished(self) -> set[tuple[str, int]]:
    found = set()
    for path in self._folder.glob(_UNFINISHED):
      with contextlib.suppress(FileNotFoundError):  # it has just got its name
        found.add((path.name, path.stat().st_ino))
    return found


def _wait_for_a_save(process: subprocess.Popen, saves: _Saves, pass_by: int) -> None:
  """Waits until a save is under way, after so many others of this process."""
  seen, running = 0, False
  end = time.monotonic() + _LONGEST
  while process.poll() is None and time.monotonic() < end:
    was, running = running, saves.under_way()
    seen += running and not was
    if seen > pass_by:
      return
    time.sleep(_POLL)


_STEPPED = 'first step after'


def _check_resumed(expected: int | None, said: str, tally: Tally) -> None:
  """A start that got so far goes on from the newest whole checkpoint, or has none."""
  resumed = re.findall(r'^resumed from step (\d+)$', said, re.MULTILINE)
  began = 'the first step compiles' in said
  if began and expected is None and resumed:
    tally.findings.append(f'a run without a checkpoint resumed from step {resumed[0]}')
  if began and expected is not None and resumed != [str(expected)]:
    tally.findings.append(f'a run with a checkpoint of step {expected} resumed from {resumed or "nothing"}')


def _check_nothing_lost(workdir: pathlib.Path, saved: int | None, tally: Tally) -> None:
  """When a save begins, the one before has ended: of the steps that were logged, fewer than two saves' worth are not safe."""
  lines = metric_lines(workdir)
  every = json.loads((workdir / 'config.json').read_text())['config']['train']['save_every'] if lines else 1
  begun = (lines[-1]['step'] - 1) // every if lines else 0
  if (saved or 0) < (begun - 1) * every:
    tally.findings.append(f'step {lines[-1]["step"]} was logged, but the newest whole checkpoint is of step {saved}')


def _check_whole(workdir: pathlib.Path, whole: int | None, tally: Tally) -> None:
  """A checkpoint has its name when it is whole, and not before: a kill leaves none that is damaged."""
  named = max(saved_steps(workdir), default=None)
  if named != whole:
    tally.findings.append(f'{workdir.name}: the checkpoint of step {named} was left damaged: '
                          f'{manifest.damage(workdir / CHECKPOINTS / str(named))}')
  if (workdir / DAMAGED).exists():
    tally.findings.append(f'{workdir.name}: a checkpoint was found to be damaged')


def log_lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Lines of metrics.jsonl; the last one may be cut off."""
  path, lines = workdir / 'metrics.jsonl', []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      lines.append(json.loads(line))
    except ValueError:
      break
  return lines


def metric_lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Lines of metrics.jsonl, without how fast it was."""
  return [{k: v for k, v in line.items() if k != 'steps_per_second'} for line in log_lines(workdir)]


def differences(whole: pathlib.Path, other: pathlib.Path) -> list[str]:
  """How a finished run differs from one that was never disturbed: the whole state bit for bit, and every line of the log."""
  import jax

  from uni_moe_jax.train.checkpoint import Checkpoints
  found = []
  steps, states = [], []
  for workdir in (whole, other):
    with Checkpoints(workdir, max_to_keep=None) as checkpoints:
      steps.append(checkpoints.latest())
      states.append({jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in
                     jax.tree_util.tree_leaves_with_path(checkpoints.restore_host())})
  if steps[0] != steps[1]:
    found.append(f'{other.name} ended at step {steps[1]} instead of {steps[0]}')
  wrong = [name for name, value in states[0].items() if value.tobytes() != states[1][name].tobytes()]
  if wrong:
    found.append(f'{other.name}: {len(wrong)} of {len(states[0])} arrays differ, {wrong[0]} first')
  if metric_lines(whole) != metric_lines(other):
    found.append(f'{other.name}: metrics.jsonl says something else')
  return found
