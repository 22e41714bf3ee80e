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

from uni_moe_jax import failures
from uni_moe_jax.exit_codes import FINISHED, PREEMPTED
from uni_moe_jax.faults.kills import metric_lines
from uni_moe_jax.train.workdir import CHECKPOINTS, RUN_FILE, saved_steps

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_EVERY = 5.0  # seconds between samples
_WARM_UP = 0.25  # share of the time whose samples do not count
_CONSTANT_SHARE = 0.1  # of the time, before and after, for the same loop on one batch
SLOPE, RATIO = 20.0, 1.05  # MB per hour; real-data step / constant-batch step
_DRIFT = 0.03  # between the medians before and after, with which a ratio of RATIO can still be told from 1
IDLE = 0.5  # load average of a machine on which nothing else runs
_SAVES_BEYOND = 2  # more saves than checkpoints stay, so that some had to be deleted
_LAST_SAVE = 600  # seconds


@dataclasses.dataclass
class Watched:
  """What was seen of a process.

  Attributes:
    code: its exit code.
    seconds, megabytes, load: resident memory and the machine's load average after so long, float [N].
    checkpoints: the most that lay there at once. unfinished: the most that were being written. kept: their steps, in the end.
    step_seconds: of every log line, float [L].
  """
  code: int
  seconds: np.ndarray
  megabytes: np.ndarray
  load: np.ndarray
  checkpoints: int
  unfinished: int
  kept: list[int]
  step_seconds: np.ndarray


def watch(command: Sequence[str], workdir: pathlib.Path, seconds: float, environment: Mapping[str, str]) -> Watched:
  """Runs a training command for so long, from its first log line on, and asks it to stop."""
  process = subprocess.Popen(command, start_new_session=True, env=environment)
  samples, most, unfinished, began = [], 0, 0, None
  try:
    while process.poll() is None:
      if began is None and (workdir / 'metrics.jsonl').exists() and metric_lines(workdir):
        began = time.monotonic()
      if began is not None:
        samples.append((time.monotonic() - began, resident_megabytes(process.pid), os.getloadavg()[0]))
        most = max(most, len(saved_steps(workdir)))
        unfinished = max(unfinished, len(list((workdir / CHECKPOINTS).glob('*.orbax-checkpoint-tmp'))))
        if samples[-1][0] >= seconds:
          process.send_signal(signal.SIGTERM)
          with contextlib.suppress(subprocess.TimeoutExpired):  # then it is killed, which its exit code says
            process.wait(_LAST_SAVE)
          break
      time.sleep(_EVERY)
  finally:
    if process.poll() is None:
      process.kill()
  code = process.wait()
  if len(samples) < 8:
    raise failures.Failure(f'the run in {workdir} ended with exit code {code} before it could be watched.')
  rates = [json.loads(line)['steps_per_second'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()[1:]]
  return Watched(code, *np.array(samples).T, most, unfinished, saved_steps(workdir), 1 / np.array(rates))


def resident_megabytes(pid: int) -> float:
  """Of a process; NaN where it has just ended."""
  try:
    return float(re.search(r'VmRSS:\s+(\d+) kB', pathlib.Path(f'/proc/{pid}/status').read_text())[1]) / 1e3
  except (OSError, TypeError):
    return float('nan')


def slope(seconds: np.ndarray, megabytes: np.ndarray) -> tuple[float, float]:
  """(MB per hour by least squares, after the warm-up; its standard error as if samples were independent)."""
  kept = (seconds >= _WARM_UP * seconds[-1]) & np.isfinite(megabytes)
  hours, sizes = seconds[kept] / 3600, megabytes[kept]
  (rate, _), covariance = np.polyfit(hours, sizes, 1, cov=True)
  return float(rate), float(np.sqrt(covariance[0, 0]))


def arguments_of(config: flags.Flag) -> list[str]:
  """The flags that make a config, however they were written: its file, and every field that the command line sets."""
  overrides = config_flags.get_override_values(config)
  return [f'--{config.name}={config_flags.get_config_filename(config)}',
          *(f'--{config.name}.{field}={value}' for field, value in overrides.items())]


def soak(arguments: Sequence[str], train: ml_collections.ConfigDict, minutes: float, folder: pathlib.Path) -> dict:
  """Trains on one batch, on the data, and on one batch again; returns figures and verdicts, and prints them.

  Args:
    arguments: of launch/train.py, without its --workdir.
    train: config.train.
    minutes: of the run on the data.
    folder: for work directories, and compiled programs.

  Raises:
    Failure: a run cannot be started, or ends before it could be watched.
  """
  script, seen = str(_ROOT / 'launch/train.py'), {}
  # A process that has compiled is slower afterwards: none of those that are compared does.
  environment = {**os.environ, 'PYTHONPATH': str(_ROOT), 'JAX_COMPILATION_CACHE_DIR': str(folder / 'jax')}
  command, load = [sys.executable, script, *arguments, f'--workdir={folder / "compiled"}', '--compile_only'], os.getloadavg()[0]
  compiled = subprocess.run(command, env=environment, check=False)
  if compiled.returncode:
    raise failures.Failure(f'compiling ended with exit code {compiled.returncode}; see above.')
  for name, share in (('one_batch_before', _CONSTANT_SHARE), ('data', 1.), ('one_batch_after', _CONSTANT_SHARE)):
    workdir = folder / name
    shutil.rmtree(workdir, ignore_errors=True)
    start = [script] if name == 'data' else ['-m', 'uni_moe_jax.faults.planted', 'one_batch', script]
    print(f'== {name}: {minutes * share:.1f} minutes', flush=True)
    seen[name] = watch([sys.executable, *start, *arguments, f'--workdir={workdir}'], workdir, minutes * share * 60, environment)
  commit = json.loads((folder / 'data' / RUN_FILE).read_text())['commit']
  return {'commit': commit, 'minutes': minutes, **judged(seen, minutes, train.keep + bool(train.keep_best), train.save_every, load)}


def judged(seen: dict[str, Watched], minutes: float, keep: int, save_every: int, load: float) -> dict:
  """Figures, and a verdict for each: {'verdicts': {sentence: bool}, …}.

  Args:
    seen: of the three runs.
    minutes: that the run on the data was to take.
    keep: checkpoints that may stay.
    save_every: steps.
    load: average of the machine before the first run.
  """
  data = seen['data']
  rate, error = slope(data.seconds, data.megabytes)
  before, after = (seen[f'one_batch_{when}'].step_seconds for when in ('before', 'after'))
  constant = np.median(np.concatenate([before, after]))
  ratio = float(np.median(data.step_seconds) / constant)
  quartiles = np.quantile(data.step_seconds, (.25, .75)) / constant
  drift = float(np.median(after) / np.median(before)) - 1
  enough, newest = (keep + _SAVES_BEYOND) * save_every, max(data.kept, default=0)
  verdicts = {
      f'the load average was {load:.2f} before (at most {IDLE}: nothing else may run)': load <= IDLE,
      f'it was watched for {data.seconds[-1] / 60:.2f} minutes (at least {minutes:g}; else raise config.train.steps)':
          data.seconds[-1] >= 60 * minutes,
      (f'resident memory grows by {rate:.1f} ± {error:.1f} MB/h after warm-up (less than {SLOPE:g}); '
       f'{data.megabytes[-1]:.0f} MB at the end'):
          rate < SLOPE,
      f'real-data step / constant-batch step {ratio:.3f} (at most {RATIO}), quartiles {quartiles[0]:.3f} … {quartiles[1]:.3f}':
          ratio <= RATIO,
      (f'the constant-batch step took {1e3 * np.median(before):.1f} ms before and {1e3 * np.median(after):.1f} ms after '
       f'(within {_DRIFT:.0%})'):
          abs(drift) <= _DRIFT,
      f'its newest checkpoint is of step {newest} (at least {enough}, so that old ones had to go)': newest >= enough,
      # The new one is there before the old one goes.
      f'at most {data.checkpoints} checkpoints lay there at once, {data.unfinished} being written ({keep} stay)':
          data.checkpoints <= keep + 1 and data.unfinished <= 1,
      f'{len(data.kept)} checkpoints are left (at most {keep})': len(data.kept) <= keep,
      f'it ended with exit code {data.code}': data.code in (FINISHED, PREEMPTED)}
  verdicts = {said: bool(good) for said, good in verdicts.items()}  # what NumPy compares is no JSON
  for said, good in verdicts.items():
    print(f'{"PASS" if good else "FAIL"} {said}', flush=True)
  samples = {name: {'seconds': w.seconds.tolist(), 'megabytes': w.megabytes.tolist(), 'load': w.load.tolist()}
             for name, w in seen.items()}
  return {'slope_mb_per_hour': rate, 'slope_error': error, 'ratio': ratio, 'drift': drift, 'checkpoints': data.checkpoints,
          'kept': data.kept, 'code': data.code, 'verdicts': verdicts, 'samples': samples}
