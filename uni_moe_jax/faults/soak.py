"""A run that is watched for a long time: does its memory grow, does the data keep up with the step, are old checkpoints deleted?"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from uni_moe_jax.faults.kills import log_lines
from uni_moe_jax.train.workdir import CHECKPOINTS, RUN_FILE, saved_steps
from uni_moe_jax.utils.errors import RunError
from uni_moe_jax.utils.exit_codes import FINISHED, PREEMPTED

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_EVERY = 5.0  # seconds between samples
_WARM_UP = 0.25  # share of the time whose samples do not count
_STRETCHES = 15  # of the time afterwards
DATA, ONE_BATCH = 'data', 'one_batch'
_TURN = {DATA: 150., ONE_BATCH: 40.}  # seconds, at least
_LINES = 3  # that count, of a turn, at least
SLOPE, RATIO = 20.0, 1.05  # MB per hour; real-data step / constant-batch step
_SLOPE_ERROR = SLOPE / 2  # at most, of the memory that stays: SLOPE lies two of them from 0
_ERROR = (RATIO - 1) / 2  # of the median of the turns' ratios, at most: RATIO lies two of them from 1
IDLE = 0.5  # load average of a machine on which nothing else runs
_SAVES_BEYOND = 2  # more saves than checkpoints stay, so that some had to be deleted
_LAST_SAVE = 600  # seconds


@dataclasses.dataclass
class Watched:
  """What was seen of a process that ran in turns.

  Attributes:
    seconds, megabytes, load: that it had run, resident memory and the machine's load average then, each [N].
    after_saves: (seconds, megabytes) of resident memory when a save has ended, no step runs and free pages went back to the system.
    turns: seconds per step of the log lines that count, by turn.
    checkpoints: the most that lay there at once. unfinished: the most that were being written. kept: their steps, in the end.
    code: its exit code.
  """
  seconds: list[float] = dataclasses.field(default_factory=list)
  megabytes: list[float] = dataclasses.field(default_factory=list)
  load: list[float] = dataclasses.field(default_factory=list)
  after_saves: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  turns: list[list[float]] = dataclasses.field(default_factory=list)
  checkpoints: int = 0
  unfinished: int = 0
  kept: list[int] = dataclasses.field(default_factory=list)
  code: int | None = None


class Turns:
  """A training command that is stopped (SIGSTOP) while another has its turn; a context manager.

  `ran`: seconds that it has had, since its first log line. `seen`: what was seen of it.
  """

  def __init__(self, command: Sequence[str], workdir: pathlib.Path, environment: Mapping[str, str]):
    """Starts it, and stops it at its first log line, before which it compiles.

    Raises:
      RunError: it ended before.
    """
    self.seen, self.ran, self._workdir = Watched(), 0., workdir
    self._process = subprocess.Popen(command, start_new_session=True, env=environment)
    try:
      while not log_lines(workdir):
        if self._ended():
          raise RunError(f'the run in {workdir} ended with exit code {self.seen.code} before it could be watched.')
        time.sleep(min(_EVERY, 1.))
      self._process.send_signal(signal.SIGSTOP)
    except BaseException:
      self._process.kill()
      raise

  def __enter__(self) -> 'Turns':
    return self

  def __exit__(self, *_) -> None:
    if self._process.poll() is None:
      self._process.kill()
    self._process.wait()

  def turn(self, least: float, until: float = float('inf')) -> bool:
    """Lets it run for `least` seconds and some log lines, or until it has run for so long in all; False once it has ended.

    Its first line does not count: the pause lies in it.
    """
    before, began, already = len(log_lines(self._workdir)), time.monotonic(), self.ran
    self._process.send_signal(signal.SIGCONT)
    while not self._ended():
      self.ran = already + time.monotonic() - began
      self._sample()
      if self.ran >= until or self.ran - already >= least and len(log_lines(self._workdir)) - before > _LINES:
        break
      time.sleep(_EVERY)
    if not self._ended():
      self._process.send_signal(signal.SIGSTOP)
    self.seen.turns.append([1 / line['steps_per_second'] for line in log_lines(self._workdir)[before + 1:]])
    return not self._ended()

  def end(self) -> Watched:
    """Asks it to stop, and waits for its last save; one that takes too long is killed, which its exit code says."""
    if not self._ended():
      self._process.send_signal(signal.SIGCONT)
      self._process.send_signal(signal.SIGTERM)
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._process.wait(_LAST_SAVE)
    self.__exit__()
    self.seen.code, self.seen.kept = self._process.returncode, saved_steps(self._workdir)
    return self.seen

  def _ended(self) -> bool:
    self.seen.code = self._process.poll()
    return self.seen.code is not None

  def _sample(self) -> None:
    seen = self.seen
    seen.seconds.append(self.ran)
    seen.megabytes.append(resident_megabytes(self._process.pid))
    seen.load.append(os.getloadavg()[0])
    file = after_saves_file(self._workdir)
    written = file.read_text().split('\n')[:-1] if file.exists() else []
    seen.after_saves += [(self.ran, float(size)) for size in written[len(seen.after_saves):]]
    seen.checkpoints = max(seen.checkpoints, len(saved_steps(self._workdir)))
    seen.unfinished = max(seen.unfinished, len(list((self._workdir / CHECKPOINTS).glob('*.orbax-checkpoint-tmp'))))


def after_saves_file(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Where a run that is watched writes its resident memory after every save."""
  return pathlib.Path(workdir) / 'after_saves.txt'


def resident_megabytes(pid: int) -> float:
  """Of a process; NaN where it has just ended."""
  try:
    return float(re.search(r'VmRSS:\s+(\d+) kB', pathlib.Path(f'/proc/{pid}/status').read_text())[1]) / 1e3
  except (OSError, TypeError):
    return float('nan')


def slope(seconds: np.ndarray, megabytes: np.ndarray, stretches: int | None = None) -> tuple[float, float]:
  """(MB per hour after the warm-up; its standard error), by least squares.

  stretches: through the upper quartiles of so many stretches of time: samples that catch a process while it saves, or with its buffers
  just given back, would be most of the error. None: through the samples.
  """
  kept = np.flatnonzero((seconds >= _WARM_UP * seconds[-1]) & np.isfinite(megabytes))
  parts = np.array_split(kept, len(kept) if stretches is None else min(stretches, len(kept)))
  hours, sizes = [seconds[p].mean() / 3600 for p in parts], [np.quantile(megabytes[p], .75) for p in parts]
  (rate, _), covariance = np.polyfit(hours, sizes, 1, cov=True)
  return float(rate), float(np.sqrt(covariance[0, 0]))


def arguments_of(config: flags.Flag) -> list[str]:
  """The flags that make a config, however they were written: its file, and every field that the command line sets."""
  overrides = config_flags.get_override_values(config)
  return [f'--{config.name}={config_flags.get_config_filename(config)}',
          *(f'--{config.name}.{field}={value}' for field, value in overrides.items())]


def soak(arguments: Sequence[str], train: ml_collections.ConfigDict, minutes: float, folder: pathlib.Path) -> dict:
  """Trains on the data, in turns with the same loop on one batch; returns figures and verdicts, and prints them.

  The speed of a machine drifts by more than data may cost. So a turn on the data is compared with the turns before and after it.

  Args:
    arguments: of launch/train.py, without its --workdir.
    train: config.train.
    minutes: that the run on the data has, its turns taken together.
    folder: for work directories, and compiled programs.

  Raises:
    RunError: a run cannot be started, or ends before it could be watched.
  """
  script, load = str(_ROOT / 'launch/train.py'), os.getloadavg()[0]
  # A process that has compiled is slower afterwards: none of those that are compared does.
  environment = {**os.environ, 'PYTHONPATH': str(_ROOT), 'JAX_COMPILATION_CACHE_DIR': str(folder / 'jax')}
  command = [sys.executable, script, *arguments, f'--workdir={folder / "compiled"}', '--compile_only']
  compiled = subprocess.run(command, env=environment, check=False)
  if compiled.returncode:
    raise RunError(f'compiling ended with exit code {compiled.returncode}; see above.')
  with contextlib.ExitStack() as running:
    run = {}
    for name, plant in ((DATA, 'after_saves'), (ONE_BATCH, 'one_batch')):
      workdir = folder / name
      shutil.rmtree(workdir, ignore_errors=True)
      run[name] = running.enter_context(Turns(
          [sys.executable, '-m', 'uni_moe_jax.faults.planted', plant, script, *arguments, f'--workdir={workdir}'], workdir, environment))
    go_on = run[ONE_BATCH].turn(_TURN[ONE_BATCH])
    while go_on and run[DATA].ran < 60 * minutes:
      go_on = run[DATA].turn(_TURN[DATA], 60 * minutes) and run[ONE_BATCH].turn(_TURN[ONE_BATCH])
    seen = {name: process.end() for name, process in run.items()}
  commit = json.loads((folder / DATA / RUN_FILE).read_text())['commit']
  return {'commit': commit, 'minutes': minutes,
          **judged(seen[DATA], seen[ONE_BATCH], minutes, train.max_to_keep + bool(train.best_metric), train.checkpoint_every, load)}


def ratios(data: Sequence[Sequence[float]], one_batch: Sequence[Sequence[float]]) -> np.ndarray:
  """Median step of every turn on the data / mean of the medians of the turns on one batch before and after it.

  Args:
    data: seconds per step of log lines, by turn.
    one_batch: the same; its first turn came before the first on the data.

  Returns:
    float [R]: one for each turn that has lines, between two that have some.
  """
  return np.array([np.median(turn) / np.mean([np.median(before), np.median(after)])
                   for before, turn, after in zip(one_batch, data, one_batch[1:]) if before and turn and after])


def judged(data: Watched, one_batch: Watched, minutes: float, keep: int, save_every: int, load: float) -> dict:
  """Figures, and a verdict for each: {'verdicts': {sentence: bool}, …}.

  Args:
    data, one_batch: what was seen of the two runs.
    minutes: that the run on the data was to take.
    keep: checkpoints that may stay.
    save_every: steps.
    load: average of the machine before the first run.

  Raises:
    RunError: they were not watched for long enough to tell anything.
  """
  found = ratios(data.turns, one_batch.turns)
  if not len(found) or len(data.seconds) < 8 or len(data.after_saves) < 8:
    raise RunError(f'the run on the data (exit code {data.code}) or the one on one batch (exit code {one_batch.code}) ended '
                           'before they could be compared, or saved too rarely: raise --minutes or config.train.steps, or lower '
                           'config.train.checkpoint_every.')
  # What stays is seen best when nothing else is there; between saves, buffers come and go that are larger than what may be added in
  # an hour, so that their growth can only be told from none where it is several times as much.
  rate, error = slope(*np.array(data.after_saves).T)
  between, doubt = slope(np.array(data.seconds), np.array(data.megabytes), _STRETCHES)
  low, ratio, high = (float(q) for q in np.quantile(found, (.25, .5, .75)))
  # Of a median, were the ratios normal; their deviation from the quartiles, which single turns do not move.
  uncertain = float(np.sqrt(np.pi / 2 / len(found)) * (high - low) / 1.349)
  enough, newest = (keep + _SAVES_BEYOND) * save_every, max(data.kept, default=0)
  verdicts = {
      f'the load average was {load:.2f} before (at most {IDLE}: nothing else may run)': load <= IDLE,
      f'it was watched for {data.seconds[-1] / 60:.2f} minutes (at least {minutes:g}; else raise config.train.steps)':
          data.seconds[-1] >= 60 * minutes,
      (f'resident memory after saves grows by {rate:.1f} ± {error:.1f} MB/h after warm-up (less than {SLOPE:g}); '
       f'{data.after_saves[-1][1]:.0f} MB at the end'):
          rate < SLOPE,
      f'its standard error is at most {_SLOPE_ERROR:g}': error <= _SLOPE_ERROR,
      f'its upper quartiles between saves grow by {between:.1f} ± {doubt:.1f} MB/h (not surely more than {SLOPE:g})':
          between - 2 * doubt < SLOPE,
      f'real-data step / constant-batch step {ratio:.3f} (at most {RATIO}), the median of {len(found)} turns': ratio <= RATIO,
      f'its standard error is {uncertain:.3f} (at most {_ERROR:.3f}), the quartiles {low:.3f} and {high:.3f}': uncertain <= _ERROR,
      f'its newest checkpoint is of step {newest} (at least {enough}, so that old ones had to go)': newest >= enough,
      # The new one is there before the old one goes.
      f'at most {data.checkpoints} checkpoints lay there at once, {data.unfinished} being written ({keep} stay)':
          data.checkpoints <= keep + 1 and data.unfinished <= 1,
      f'{len(data.kept)} checkpoints are left (at most {keep})': len(data.kept) <= keep,
      f'it ended with exit code {data.code}': data.code in (FINISHED, PREEMPTED)}
  verdicts = {said: bool(good) for said, good in verdicts.items()}  # what NumPy compares is no JSON
  for said, good in verdicts.items():
    print(f'{"PASS" if good else "FAIL"} {said}', flush=True)
  return {'slope_mb_per_hour': rate, 'slope_error': error, 'between_saves': between, 'between_saves_error': doubt,
          'ratio': ratio, 'ratio_error': uncertain, 'ratios': found.tolist(),
          'verdicts': verdicts, 'seen': {DATA: dataclasses.asdict(data), ONE_BATCH: dataclasses.asdict(one_batch)}}
