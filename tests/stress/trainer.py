"""The training command as the stress suites start it, and the comparison of its runs."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.helpers.processes import ROOT
from uni_moe_jax.io import storage
from uni_moe_jax.train import manifest
from uni_moe_jax.train.metrics_log import TIMINGS
from uni_moe_jax.train.workdir import CHECKPOINTS, saved_steps

CONFIG = ROOT / 'configs/small.py'
TIMEOUT = 600.0  # seconds, of an undisturbed run
_TIMED_OUT = -signal.SIGKILL  # exit code after a timeout

# What the command prints.
RESUMED = r'^resumed from step (\d+)$'
COMPILING = 'the first step compiles'
STEPPED = 'first step after'
DISK_FULL = 'the disk is full'
OTHER_PROCESS_DIED = 'another process of this run has died'


@dataclasses.dataclass
class Trainer:
  """Starts the training command in folders below `folder`.

  Attributes:
    folder: of work directories, compiled programs, logs and the tokenizer.
    bucket: of work directories instead; '' = none.
    fault: name in `injected_faults.ALL`; '' injects none.
    overrides: 'field=value' of the config.
    flags: further flags of launch/train.py.
  """
  folder: pathlib.Path
  fault: str = ''
  overrides: tuple[str, ...] = ()
  flags: tuple[str, ...] = ()
  bucket: str = ''

  def workdir(self, name: str) -> storage.Path:
    """Return the work directory of a run."""
    return storage.path(self.bucket or self.folder) / name

  def compile(self, log: pathlib.Path) -> int:
    """Fill the cache of compiled programs. Return the exit code."""
    return dataclasses.replace(self, flags=('--compile_only',)).run(self.folder / 'compiled', log)[0]

  def command(self, workdir: storage.Path) -> list[str]:
    """Return program and arguments."""
    return [sys.executable, *(['-m', 'tests.stress.injected_faults', self.fault] if self.fault else []),
            str(ROOT / 'launch/train.py'), f'--config={CONFIG}', f'--workdir={workdir}',
            f'--config.data.dir={self.folder}', *(f'--config.{o}' for o in self.overrides), *self.flags]

  def start(self, workdir: storage.Path, log: pathlib.Path) -> subprocess.Popen:
    """Start a process that appends its output to `log`."""
    return start(self.command(workdir), log, environment(self.folder))

  def run(self, workdir: storage.Path, log: pathlib.Path) -> tuple[int, float]:
    """Run the command to its end. Return (exit code, seconds); see `wait`."""
    began = time.monotonic()
    return wait(self.start(workdir, log)), time.monotonic() - began


def start(command: Sequence[str], log: pathlib.Path, env: Mapping[str, str]) -> subprocess.Popen:
  """Start a process in a process group of its own that appends its output to `log`."""
  with log.open('ab') as file:
    return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=env)


def wait(process: subprocess.Popen) -> int:
  """Wait for a process of `start`, and kill its group after `TIMEOUT` seconds. Return the exit code; see `ending`."""
  try:
    return process.wait(TIMEOUT)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def ending(code: int) -> str:
  """Return the words for an exit code in a finding."""
  return f'no end in {TIMEOUT:g} s' if code == _TIMED_OUT else f'exit code {code}'


def environment(folder: pathlib.Path) -> dict[str, str]:
  """Return the environment of a child process: one CPU device, and the cache of compiled programs in `folder`."""
  return {**os.environ, 'PYTHONPATH': f'{ROOT}:{os.environ.get("PYTHONPATH", "")}', 'PYTHONUNBUFFERED': '1',
          'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_backend_optimization_level=0',
          'JAX_COMPILATION_CACHE_DIR': str(folder / 'jax'), 'TF_CPP_MIN_LOG_LEVEL': '2', 'TF_ENABLE_ONEDNN_OPTS': '0'}


def distributed_flags(address: str, num_processes: int, process_id: int) -> tuple[str, ...]:
  """Return the flags of launch/train.py for one of several processes."""
  return f'--coordinator_address={address}', f'--num_processes={num_processes}', f'--process_id={process_id}'


def clear(*paths: storage.Path) -> None:
  """Remove what an earlier run left: folders and files."""
  for path in paths:
    storage.remove_folder(path) if path.is_dir() else path.unlink(missing_ok=True)


def newest_intact(workdir: storage.Path) -> int | None:
  """Return the step from which a run must continue."""
  folder = workdir / CHECKPOINTS
  return next((s for s in reversed(saved_steps(workdir)) if not manifest.damage(folder / str(s))), None)


def metric_lines(workdir: storage.Path) -> list[dict[str, Any]]:
  """Return the lines of metrics.jsonl without the speed; the last one may be cut off."""
  path, lines = workdir / 'metrics.jsonl', []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      lines.append({k: v for k, v in json.loads(line).items() if k not in TIMINGS})
    except ValueError:
      break
  return lines


def differences(undisturbed: pathlib.Path, other: storage.Path) -> list[str]:
  """Compare a finished run with an undisturbed one: the entire state bit for bit, and every line of the log."""
  import jax

  from tests.helpers import saved_run
  from uni_moe_jax.train.checkpoint import Checkpoints
  findings, steps, states = [], [], []
  for workdir in (undisturbed, other):
    with Checkpoints(workdir, max_to_keep=None) as checkpoints:
      steps.append(checkpoints.latest())
      states.append({jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in
                     jax.tree_util.tree_leaves_with_path(saved_run.on_host(checkpoints))})
  if steps[0] != steps[1]:
    findings.append(f'{other.name} ended at step {steps[1]} instead of {steps[0]}')
  different = [name for name, value in states[0].items() if value.tobytes() != states[1][name].tobytes()]
  if different:
    findings.append(f'{other.name}: {len(different)} of {len(states[0])} arrays differ, {different[0]} first')
  if metric_lines(undisturbed) != metric_lines(other):
    findings.append(f'{other.name}: metrics.jsonl differs')
  return findings
