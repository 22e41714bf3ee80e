"""A long run under observation: memory growth, speed of the data pipeline, deletion of old checkpoints."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from tests.helpers.processes import ROOT
from tests.stress.trainer import clear, log_lines
from uni_moe_jax.train.workdir import CHECKPOINTS, RUN_FILE, saved_steps
from uni_moe_jax.utils.errors import RunError
from uni_moe_jax.utils.exit_codes import FINISHED, PREEMPTED

_SAMPLE_EVERY = 5.0  # seconds
_WARM_UP = 0.25  # fraction of the time whose samples are ignored
_INTERVALS = 15  # of the remaining time
DATA, CONSTANT = 'data', 'constant_batch'
_MIN_TURN = {DATA: 150., CONSTANT: 40.}  # seconds
_MIN_LINES = 4  # a turn has more log lines, of which all but two count
MAX_SLOPE, MAX_RATIO = 20.0, 1.05  # MB per hour; step on the data / step on a constant batch
_MAX_SLOPE_ERROR = MAX_SLOPE / 2  # so that MAX_SLOPE is two errors away from 0
_MAX_RATIO_ERROR = (MAX_RATIO - 1) / 2  # so that MAX_RATIO is two errors away from 1
MAX_IDLE_LOAD = 0.5  # load average of a machine without other work
_EXTRA_SAVES = 2  # more saves than checkpoints are kept, so that some must be deleted
_LAST_SAVE_TIMEOUT = 600  # seconds


@dataclasses.dataclass
class Observation:
  """What was observed of a process that ran in turns.

  Attributes:
    seconds, megabytes, load: run time, resident memory and load average of the machine at each sample, [N].
    after_saves: (seconds, megabytes): resident memory after a save, when no step runs and the heap is trimmed.
    turns: seconds per step of the log lines that count, by turn.
    checkpoints: their maximal number. unfinished: maximal number of those being written. kept: steps of those left.
    code: exit code.
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
  """A training command that is suspended (SIGSTOP) while another has its turn; a context manager.

  `ran`: seconds of run time since the first log line. `observed`: see `Observation`.
  """

  def __init__(self, command: Sequence[str], workdir: pathlib.Path, environment: Mapping[str, str]):
    """Start the command and suspend it at its first log line, before which it compiles.

    Raises:
      RunError: the command ended earlier.
    """
    self.observed, self.ran, self._workdir = Observation(), 0., workdir
    self._process = subprocess.Popen(command, start_new_session=True, env=environment)
    try:
      while not log_lines(workdir):
        if self._has_ended():
          raise RunError(f'the run in {workdir} ended with exit code {self.observed.code} before its first log line.')
        time.sleep(min(_SAMPLE_EVERY, 1.))
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

  def turn(self, min_seconds: float, until: float = float('inf')) -> bool:
    """Let the command run for `min_seconds` and some log lines, or until its total run time is `until`.

    The first two log lines of a turn do not count: one of them includes the pause. Returns False once the command has
    ended.
    """
    old_lines, began, already = len(log_lines(self._workdir)), time.monotonic(), self.ran
    self._process.send_signal(signal.SIGCONT)
    while not self._has_ended():
      self.ran = already + time.monotonic() - began
      self._sample()
      enough = self.ran - already >= min_seconds and len(log_lines(self._workdir)) - old_lines > _MIN_LINES
      if enough or self.ran >= until:
        break
      time.sleep(_SAMPLE_EVERY)
    if not self._has_ended():
      self._process.send_signal(signal.SIGSTOP)
    lines = log_lines(self._workdir)[old_lines + 2:]
    self.observed.turns.append([1 / line['steps_per_second'] for line in lines])
    return not self._has_ended()

  def end(self) -> Observation:
    """Send SIGTERM and wait for the last save; if that takes too long, kill the command, which its exit code shows."""
    if not self._has_ended():
      self._process.send_signal(signal.SIGCONT)
      self._process.send_signal(signal.SIGTERM)
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._process.wait(_LAST_SAVE_TIMEOUT)
    self.__exit__()
    self.observed.code, self.observed.kept = self._process.returncode, saved_steps(self._workdir)
    return self.observed

  def _has_ended(self) -> bool:
    self.observed.code = self._process.poll()
    return self.observed.code is not None

  def _sample(self) -> None:
    o = self.observed
    o.seconds.append(self.ran)
    o.megabytes.append(resident_megabytes(self._process.pid))
    o.load.append(os.getloadavg()[0])
    file = after_saves_file(self._workdir)
    written = file.read_text().split('\n')[:-1] if file.exists() else []
    o.after_saves += [(self.ran, float(size)) for size in written[len(o.after_saves):]]
    o.checkpoints = max(o.checkpoints, len(saved_steps(self._workdir)))
    o.unfinished = max(o.unfinished, len(list((self._workdir / CHECKPOINTS).glob('*.orbax-checkpoint-tmp'))))


def after_saves_file(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Return the file to which a run writes its resident memory after every save."""
  return pathlib.Path(workdir) / 'after_saves.txt'


def resident_megabytes(pid: int) -> float:
  """Return the resident memory of a process; NaN if it has just ended."""
  try:
    return float(re.search(r'VmRSS:\s+(\d+) kB', pathlib.Path(f'/proc/{pid}/status').read_text())[1]) / 1e3
  except (OSError, TypeError):
    return float('nan')


def slope(seconds: np.ndarray, megabytes: np.ndarray, intervals: int | None = None) -> tuple[float, float]:
  """Return (MB per hour after the warm-up; its standard error), by least squares.

  Args:
    seconds, megabytes: samples, [N].
    intervals: fit the upper quartiles of so many intervals of time, because samples during a save, or just after
      buffers were freed, would dominate the error. None fits the samples.
  """
  kept = np.flatnonzero((seconds >= _WARM_UP * seconds[-1]) & np.isfinite(megabytes))
  parts = np.array_split(kept, len(kept) if intervals is None else min(intervals, len(kept)))
  hours, sizes = [seconds[p].mean() / 3600 for p in parts], [np.quantile(megabytes[p], .75) for p in parts]
  (rate, _), covariance = np.polyfit(hours, sizes, 1, cov=True)
  return float(rate), float(np.sqrt(covariance[0, 0]))


def config_arguments(config: flags.Flag) -> list[str]:
  """Return the flags that define a config, however they were written: its file and every override."""
  overrides = config_flags.get_override_values(config)
  return [f'--{config.name}={config_flags.get_config_filename(config)}',
          *(f'--{config.name}.{field}={value}' for field, value in overrides.items())]


def soak(arguments: Sequence[str], train: ml_collections.ConfigDict, minutes: float, folder: pathlib.Path) -> dict:
  """Train on the data, in turns with the same loop on one constant batch. Print verdicts; return them with the figures.

  The speed of a machine drifts by more than the data may cost. So a turn on the data is compared with the turns before
  and after it.

  Args:
    arguments: of launch/train.py, without --workdir.
    train: config.train.
    minutes: run time of the run on the data.
    folder: for work directories and compiled programs.

  Raises:
    RunError: a run did not start, or ended too early.
  """
  script, load = str(ROOT / 'launch/train.py'), os.getloadavg()[0]
  # A process that has compiled is slower afterwards: the compared processes find their programs in the cache.
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_COMPILATION_CACHE_DIR': str(folder / 'jax')}
  command = [sys.executable, script, *arguments, f'--workdir={folder / "compiled"}', '--compile_only']
  compiled = subprocess.run(command, env=environment, check=False)
  if compiled.returncode:
    raise RunError(f'compiling ended with exit code {compiled.returncode}; see above.')
  with contextlib.ExitStack() as stack:
    runs = {}
    for name, wrapper in ((DATA, 'memory_after_saves'), (CONSTANT, 'constant_batch')):
      workdir = folder / name
      clear(workdir)
      command = [sys.executable, '-m', 'tests.stress.injected_faults', wrapper, script, *arguments,
                 f'--workdir={workdir}']
      runs[name] = stack.enter_context(Turns(command, workdir, environment))
    running = runs[CONSTANT].turn(_MIN_TURN[CONSTANT])
    while running and runs[DATA].ran < 60 * minutes:
      running = runs[DATA].turn(_MIN_TURN[DATA], 60 * minutes) and runs[CONSTANT].turn(_MIN_TURN[CONSTANT])
    observed = {name: run.end() for name, run in runs.items()}
  commit = json.loads((folder / DATA / RUN_FILE).read_text())['commit']
  max_checkpoints = train.max_to_keep + bool(train.best_metric)
  return {'commit': commit, 'minutes': minutes, **evaluate(
      observed[DATA], observed[CONSTANT], minutes, max_checkpoints, train.checkpoint_every, load)}


def ratios(data: Sequence[Sequence[float]], constant: Sequence[Sequence[float]]) -> np.ndarray:
  """Return the median step of a data turn / the mean of the medians of the constant turns before and after it.

  Args:
    data: seconds per step of log lines, by turn.
    constant: the same for the constant batch, whose first turn came first.

  Returns:
    float [R]: one for each turn with lines between two with lines.
  """
  return np.array([np.median(turn) / np.mean([np.median(before), np.median(after)])
                   for before, turn, after in zip(constant, data, constant[1:]) if before and turn and after])


def evaluate(data: Observation, constant: Observation, minutes: float, max_checkpoints: int, checkpoint_every: int,
             load: float) -> dict:
  """Return the figures and a verdict for each: {'verdicts': {sentence: bool}, …}.

  Args:
    data, constant: observations of the two runs.
    minutes: planned run time on the data.
    max_checkpoints: how many checkpoints may be kept.
    checkpoint_every: steps between saves.
    load: load average of the machine before the first run.

  Raises:
    RunError: the observations are too few.
  """
  turn_ratios = ratios(data.turns, constant.turns)
  if not len(turn_ratios) or len(data.seconds) < 8 or len(data.after_saves) < 8:
    raise RunError(f'the run on the data (exit code {data.code}) or the one on a constant batch (exit code '
                   f'{constant.code}) ended before they could be compared, or saved too rarely: raise --time_budget or '
                   'config.train.steps, or lower config.train.checkpoint_every.')
  # A leak shows best when only what stays is in memory. Between saves, buffers come and go that are larger than the
  # allowed growth per hour, so that only growth of several times as much shows.
  rate, error = slope(*np.array(data.after_saves).T)
  between, between_error = slope(np.array(data.seconds), np.array(data.megabytes), _INTERVALS)
  low, ratio, high = (float(q) for q in np.quantile(turn_ratios, (.25, .5, .75)))
  # Standard error of the median of normal ratios; their deviation comes from the quartiles, which are robust to
  # outliers.
  ratio_error = float(np.sqrt(np.pi / 2 / len(turn_ratios)) * (high - low) / 1.349)
  min_step, newest = (max_checkpoints + _EXTRA_SAVES) * checkpoint_every, max(data.kept, default=0)
  verdicts = {
      f'load average before the start {load:.2f} (at most {MAX_IDLE_LOAD}: no other work)': load <= MAX_IDLE_LOAD,
      f'observed for {data.seconds[-1] / 60:.2f} minutes (at least {minutes:g}; otherwise raise config.train.steps)':
          data.seconds[-1] >= 60 * minutes,
      (f'resident memory after saves grows by {rate:.1f} ± {error:.1f} MB/h after warm-up (less than {MAX_SLOPE:g}); '
       f'{data.after_saves[-1][1]:.0f} MB at the end'): rate < MAX_SLOPE,
      f'its standard error is at most {_MAX_SLOPE_ERROR:g}': error <= _MAX_SLOPE_ERROR,
      f'its upper quartiles between saves grow by {between:.1f} ± {between_error:.1f} MB/h (not clearly more than '
      f'{MAX_SLOPE:g})': between - 2 * between_error < MAX_SLOPE,
      (f'step on the data / step on a constant batch {ratio:.3f} (at most {MAX_RATIO}), the median of '
       f'{len(turn_ratios)} turns'): ratio <= MAX_RATIO,
      (f'its standard error is {ratio_error:.3f} (at most {_MAX_RATIO_ERROR:.3f}), the quartiles {low:.3f} and '
       f'{high:.3f}'): ratio_error <= _MAX_RATIO_ERROR,
      f'the newest checkpoint is of step {newest} (at least {min_step}, so that old ones had to be deleted)':
          newest >= min_step,
      # A new checkpoint is complete before the old one is deleted.
      f'at most {data.checkpoints} checkpoints existed, {data.unfinished} being written ({max_checkpoints} are kept)':
          data.checkpoints <= max_checkpoints + 1 and data.unfinished <= 1,
      f'{len(data.kept)} checkpoints are left (at most {max_checkpoints})': len(data.kept) <= max_checkpoints,
      f'it ended with exit code {data.code}': data.code in (FINISHED, PREEMPTED)}
  verdicts = {sentence: bool(passed) for sentence, passed in verdicts.items()}  # JSON has no NumPy bool
  for sentence, passed in verdicts.items():
    print(f'{"PASS" if passed else "FAIL"} {sentence}', flush=True)
  return {'slope_mb_per_hour': rate, 'slope_error': error, 'between_saves': between,
          'between_saves_error': between_error, 'ratio': ratio, 'ratio_error': ratio_error,
          'ratios': turn_ratios.tolist(), 'verdicts': verdicts,
          'observed': {DATA: dataclasses.asdict(data), CONSTANT: dataclasses.asdict(constant)}}
