"""Runs the cells of a sweep, stage by stage, as processes. Imports no JAX.

A finished stage is never repeated. A failed or interrupted one is tried again by the next call.
"""

import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from uni_moe_jax.analysis.sweep.grid import Cell
from uni_moe_jax.utils import signals, storage
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.exit_codes import FINISHED, PREEMPTED
from uni_moe_jax.utils.files import read_json, write_json

SETTINGS = 'settings.json'  # in the work directory of the sweep
LOG = 'stages.json'  # in the work directory of a cell


def claim(folder: storage.Path, settings: dict[str, Any]) -> None:
  """Records the settings of a sweep in its work directory; raises UsageError if it has cells with other settings."""
  path = folder / SETTINGS
  if (old := read_json(path, settings)) != settings:
    changed = ', '.join(f'{k}: {old.get(k)!r} → {v!r}' for k, v in settings.items() if old.get(k) != v)
    raise UsageError(f'{folder} has a sweep with other settings ({changed}); give another --workdir.')
  storage.make_folder(folder)
  write_json(path, settings)


def read_log(folder: storage.Path) -> list[dict[str, Any]]:
  """Every attempt of a cell, in order: [{'stage', 'command', 'exit_code', 'seconds'}]."""
  return read_json(folder / LOG, [])


def is_finished(log: Sequence[dict[str, Any]], stage: str) -> bool:
  """Whether an attempt of a stage succeeded."""
  return any(attempt['stage'] == stage and attempt['exit_code'] == FINISHED for attempt in log)


def run_cells(cells: Sequence[Cell], start: Callable[[Sequence[str]], int]) -> bool:
  """Runs every unfinished stage whose `needs` has finished.

  A failure does not stop the other stages and cells. `start` runs a command and returns its exit code. False: a signal
  stopped a command, and nothing was started after it.
  """
  for number, cell in enumerate(cells, 1):
    log = read_log(cell.folder)
    is_done = all(is_finished(log, stage.name) for stage in cell.stages)
    print(f'{number}/{len(cells)} {cell.folder.name}' + (': done' if is_done else ''), flush=True)
    for stage in cell.stages:
      if is_finished(log, stage.name) or stage.needs and not is_finished(log, stage.needs):
        continue
      began = time.perf_counter()
      code = start(stage.command)
      log.append({'stage': stage.name, 'command': ' '.join(('uni-moe', *stage.command)), 'exit_code': code,
                  'seconds': round(time.perf_counter() - began, 1)})
      storage.make_folder(cell.folder)
      write_json(cell.folder / LOG, log)
      if code == PREEMPTED:
        return False
  return True


def run_command(command: Sequence[str], folder: pathlib.Path) -> int:
  """Runs a launch script of `folder`, such as ('train', '--workdir=…').

  The process gets a session of its own, so that it receives a signal only once, from this process. Returns its exit
  code; 75 if a signal ended it.
  """
  print('$ uni-moe', *command, flush=True)
  received = []
  script = folder / f'{command[0]}.py'
  child = subprocess.Popen([sys.executable, script, *command[1:]], start_new_session=True)
  pass_on = lambda number, _: (received.append(number), child.send_signal(number))
  with signals.handled(pass_on, signal.SIGINT, signal.SIGTERM):
    code = child.wait()
  return PREEMPTED if received and code <= 0 else code
