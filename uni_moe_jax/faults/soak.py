"""A run that is watched for a long time: does its memory grow, does the data keep up with the step, are old checkpoints deleted?"""

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
from collections.abc import Sequence

import numpy as np

from uni_moe_jax import failures
from uni_moe_jax.faults.kills import metric_lines
from uni_moe_jax.train.workdir import CHECKPOINTS, saved_steps

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_EVERY = 5.0  # seconds between samples
_WARM_UP = 0.25  # share of the time whose samples do not count
_CONSTANT_SHARE = 0.1  # of the time, before and after, for the same loop on one batch
FINISHED, PREEMPTED = 0, 75
SLOPE, RATIO = 20.0, 1.05  # MB per hour; real-data step / constant-batch step


@dataclasses.dataclass
class Watched:
  """What was seen of a process.

  Attributes:
    code: its exit code.
    seconds, megabytes: resident memory after so long, float [N].
    checkpoints: the most that lay there at once. unfinished: the most that were being written.
    step_seconds: of every log line, float [L].
  """
  code: int
  seconds: np.ndarray
  megabytes: np.ndarray
  checkpoints: int
  unfinished: int
  step_seconds: np.ndarray


def watch(command: Sequence[str], workdir: pathlib.Path, seconds: float) -> Watched:
  """Runs a training command for so long, from its first log line on, and asks it to stop."""
  process = subprocess.Popen(command, start_new_session=True, env={**os.environ, 'PYTHONPATH': str(_ROOT)})
  times, sizes, most, unfinished, began = [], [], 0, 0, None
  try:
    while process.poll() is None:
      if began is None and (workdir / 'metrics.jsonl').exists() and metric_lines(workdir):
        began = time.monotonic()
      if began is not None:
        times.append(time.monotonic() - began)
        sizes.append(resident_megabytes(process.pid))
        most = max(most, len(saved_steps(workdir)))
        unfinished = max(unfinished, len(list((workdir / CHECKPOINTS).glob('*.orbax-checkpoint-tmp'))))
        if times[-1] > seconds:
          process.send_signal(signal.SIGTERM)
          process.wait(600)
          break
      time.sleep(_EVERY)
  finally:
    if process.poll() is None:
      process.kill()
  if began is None or len(times) < 8:
    raise failures.Failure(f'the run in {workdir} ended with exit code {process.returncode} before it could be watched.')
  rates = [json.loads(line)['steps_per_second'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()[1:]]
  return Watched(process.wait(), np.array(times), np.array(sizes), most, unfinished, 1 / np.array(rates))


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


def soak(arguments: Sequence[str], keep: int, minutes: float, folder: pathlib.Path) -> dict:
  """Trains on one batch, on the data, and on one batch again; returns figures and verdicts, and prints them.

  Args:
    arguments: of launch/train.py, without its --workdir.
    keep: checkpoints that may stay: config.train.keep, and one more where the best is kept.
    minutes: of the run on the data.
    folder: for work directories.
  """
  script, seen = str(_ROOT / 'launch/train.py'), {}
  for name, share in (('one_batch_before', _CONSTANT_SHARE), ('data', 1.), ('one_batch_after', _CONSTANT_SHARE)):
    workdir = folder / name
    shutil.rmtree(workdir, ignore_errors=True)
    start = [script] if name == 'data' else ['-m', 'uni_moe_jax.faults.planted', 'one_batch', script]
    print(f'== {name}: {minutes * share:.1f} minutes', flush=True)
    seen[name] = watch([sys.executable, *start, *arguments, f'--workdir={workdir}'], workdir, minutes * share * 60)
  return judged(seen, keep)


def judged(seen: dict[str, Watched], keep: int) -> dict:
  """Figures, and a verdict for each: {'verdicts': {sentence: bool}, …}."""
  data = seen['data']
  rate, error = slope(data.seconds, data.megabytes)
  constant = np.concatenate([seen['one_batch_before'].step_seconds, seen['one_batch_after'].step_seconds])
  ratio = float(np.median(data.step_seconds) / np.median(constant))
  quartiles = np.quantile(data.step_seconds, (.25, .75)) / np.median(constant)
  verdicts = {
      f'resident memory grows by {rate:.1f} ± {error:.1f} MB/h after warm-up (less than {SLOPE:g}); {data.megabytes[-1]:.0f} MB at the end':
          rate < SLOPE,
      f'real-data step / constant-batch step {ratio:.3f} (at most {RATIO}), quartiles {quartiles[0]:.3f} … {quartiles[1]:.3f}':
          ratio <= RATIO,
      # The new one is there before the old one goes.
      f'at most {data.checkpoints} checkpoints lay there at once, {data.unfinished} being written ({keep} stay)':
          data.checkpoints <= keep + 1 and data.unfinished <= 1,
      f'it ended with exit code {data.code}': data.code in (FINISHED, PREEMPTED)}
  for said, good in verdicts.items():
    print(f'{"PASS" if good else "FAIL"} {said}', flush=True)
  return {'slope_mb_per_hour': rate, 'slope_error': error, 'ratio': ratio, 'checkpoints': data.checkpoints, 'code': data.code,
          'samples': len(data.seconds), 'verdicts': verdicts}
