"""SIGKILL at random moments, some of them during a save. A restarted run must end like an undisturbed one."""

import contextlib
import dataclasses
import json
import pathlib
import random
import re
import signal
import subprocess
import time

from tests.stress import trainer as trainer_lib
from tests.stress.trainer import Trainer, ending, metric_lines, newest_intact
from uni_moe_jax.io import storage
from uni_moe_jax.train import manifest
from uni_moe_jax.train.workdir import CHECKPOINTS, DAMAGED, saved_steps, unfinished_folders

_POLL = 0.001  # seconds
_MAX_SKIPPED_SAVES = 4  # before one is hit
_BEYOND = 1.2  # a kill during a save is drawn from 1.2 times its duration, to hit what follows it too
_UNFINISHED = '*.orbax-checkpoint-tmp'


@dataclasses.dataclass
class Tally:
  """Result of a series of kills.

  Attributes:
    kills: their number. during_saves: those that hit a save. before_steps: those that hit a process before its first
      step.
    starts: of the command. finished: runs that reached their last step.
    findings: sentences about what went wrong.
  """
  kills: int = 0
  during_saves: int = 0
  before_steps: int = 0
  starts: int = 0
  finished: int = 0
  findings: list[str] = dataclasses.field(default_factory=list)

  def __str__(self) -> str:
    return (f'{self.kills} kills, {self.before_steps} before the first step, {self.during_saves} during a save; '
            f'{self.starts} starts, {self.finished} finished runs; {self.findings}')


@dataclasses.dataclass(frozen=True)
class Undisturbed:
  """A run without faults: its work directory, its duration and that of its slowest save."""
  workdir: pathlib.Path
  seconds: float
  save_seconds: float


def series(trainer: Trainer, undisturbed: Undisturbed, num_kills: int, num_saves: int, seed: int) -> Tally:
  """Kill runs until there were `num_kills` kills, `num_saves` of them during a save. Every run is then finished.

  Args:
    trainer: starts the runs.
    undisturbed: the same run without faults.
    num_kills, num_saves: see above.
    seed: of the random moments.
  """
  rng, tally = random.Random(seed), Tally()
  while tally.kills < num_kills or tally.during_saves < num_saves:
    name = f'killed_{tally.finished}{trainer.fault}'
    workdir, log = trainer.workdir(name), trainer.folder / f'{name}.log'
    trainer_lib.clear(workdir, log)
    expected, code = None, None
    while code is None:
      done = tally.kills >= num_kills and tally.during_saves >= num_saves
      saves_missing = num_saves - tally.during_saves
      in_save = saves_missing > 0 and (num_kills - tally.kills <= saves_missing or rng.random() < .5)
      old_size = log.stat().st_size if log.exists() else 0
      code = _run_until_killed(trainer, workdir, log, rng, None if done else in_save, undisturbed, tally)
      tally.starts += 1
      output = log.read_text(errors='replace')[old_size:]
      _check_resumed(expected, output, tally)
      expected = newest_intact(workdir)
      if code is None:
        tally.before_steps += trainer_lib.STEPPED not in output
        _check_nothing_lost(workdir, expected, tally)
        _check_intact(workdir, expected, tally)
    tally.finished += 1
    if code != 0:
      tally.findings.append(f'{workdir.name}: {ending(code)}: {log.read_text(errors="replace")[-300:]}')
      break
    tally.findings += trainer_lib.differences(undisturbed.workdir, workdir)
    if tally.findings:
      break
    trainer_lib.clear(workdir)
  return tally


def undisturbed_run(trainer: Trainer, name: str) -> Undisturbed:
  """Train to the end, without faults."""
  workdir, log = trainer.workdir(name), trainer.folder / f'{name}.log'
  code, seconds = trainer.run(workdir, log)
  assert code == 0, f'{ending(code)}: {log.read_text(errors="replace")[-300:]}'
  metadata = [json.loads(path.read_text()) for path in (workdir / CHECKPOINTS).glob('*/_CHECKPOINT_METADATA')]
  saves = [m['commit_timestamp_nsecs'] - m['init_timestamp_nsecs'] for m in metadata]
  return Undisturbed(workdir, seconds, max(saves) / 1e9)


def _run_until_killed(trainer: Trainer, workdir: storage.Path, log: pathlib.Path, rng: random.Random,
                      in_save: bool | None, undisturbed: Undisturbed, tally: Tally) -> int | None:
  """Start a run and kill it during a save, at a random moment or not at all (None). Return its exit code or None."""
  saves = _Saves(workdir)
  process = trainer.start(workdir, log)
  if in_save is None:
    return trainer_lib.wait(process)
  if in_save:
    _wait_for_save(process, saves, rng.randrange(_MAX_SKIPPED_SAVES))
  end = time.monotonic() + rng.uniform(0, _BEYOND * undisturbed.save_seconds if in_save else undisturbed.seconds)
  while time.monotonic() < end and process.poll() is None:
    saves.is_running()
    time.sleep(_POLL)
  if process.poll() is not None:
    return process.returncode
  process.kill()
  if process.wait() != -signal.SIGKILL:  # it ended by itself at the same moment
    return process.returncode
  tally.kills += 1
  tally.during_saves += saves.is_running()
  return None


class _Saves:
  """Detects saves of the current process. Unfinished saves of earlier processes remain until its first save."""

  def __init__(self, workdir: storage.Path):
    self._folder = workdir / CHECKPOINTS
    self._left_over = self._unfinished()

  def is_running(self) -> bool:
    """Whether a save is running. Call it often: a new file may get the inode of a deleted one."""
    now = self._unfinished()
    self._left_over &= now
    return bool(now - self._left_over)

  def _unfinished(self) -> set[tuple[str, int]]:
    names = set()
    for path in (*self._folder.glob(_UNFINISHED), *unfinished_folders(self._folder.parent)):
      with contextlib.suppress(FileNotFoundError):  # it was renamed in this moment
        names.add((path.name, 0 if storage.is_remote(path) else path.stat().st_ino))
    return names


def _wait_for_save(process: subprocess.Popen, saves: _Saves, num_skipped: int) -> None:
  """Wait until a save is running, after `num_skipped` others of this process."""
  count, running = 0, False
  end = time.monotonic() + trainer_lib.TIMEOUT
  while process.poll() is None and time.monotonic() < end:
    was_running, running = running, saves.is_running()
    count += running and not was_running
    if count > num_skipped:
      return
    time.sleep(_POLL)


def _check_resumed(expected: int | None, output: str, tally: Tally) -> None:
  """A start that reaches its first step resumes from the newest intact checkpoint, if there is one."""
  resumed = re.findall(trainer_lib.RESUMED, output, re.MULTILINE)
  if trainer_lib.COMPILING not in output:
    return
  if expected is None and resumed:
    tally.findings.append(f'a run without a checkpoint resumed from step {resumed[0]}')
  if expected is not None and resumed != [str(expected)]:
    tally.findings.append(f'a run with a checkpoint of step {expected} resumed from {resumed or "nothing"}')


def _check_nothing_lost(workdir: storage.Path, saved: int | None, tally: Tally) -> None:
  """A save begins after the previous one ended: less than two save intervals of the logged steps may be unsaved."""
  lines = metric_lines(workdir)
  if not lines:
    return
  every = json.loads((workdir / 'config.json').read_text())['config']['train']['checkpoint_every']
  begun_saves = (lines[-1]['step'] - 1) // every
  if (saved or 0) < (begun_saves - 1) * every:
    tally.findings.append(f'step {lines[-1]["step"]} was logged, but the newest intact checkpoint is of step {saved}')


def _check_intact(workdir: storage.Path, newest: int | None, tally: Tally) -> None:
  """A checkpoint gets its name when it is complete: no kill leaves a damaged one."""
  named = max(saved_steps(workdir), default=None)
  if named != newest:
    tally.findings.append(f'{workdir.name}: the checkpoint of step {named} was left damaged: '
                          f'{manifest.damage(workdir / CHECKPOINTS / str(named))}')
  if (workdir / DAMAGED).exists():
    tally.findings.append(f'{workdir.name}: a checkpoint was moved away as damaged')
