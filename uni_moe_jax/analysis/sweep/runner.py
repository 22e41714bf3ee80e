"""Runs the cells of a sweep, stage by stage, as processes. Imports no JAX.

A finished stage is not repeated, except one that shows the others, after these. A failed or interrupted one is tried
again by the next call. If this process is killed, the command that it runs stops too, and until then no other sweep
runs a stage of that cell.
"""

import contextlib
import fcntl
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from uni_moe_jax.analysis.sweep.grid import Cell, Stage
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import read_json, write_json
from uni_moe_jax.utils import signals
from uni_moe_jax.utils.errors import UsageError, first_few
from uni_moe_jax.utils.exit_codes import FINISHED, PREEMPTED

SETTINGS = 'settings.json'  # in the work directory of the sweep
LOG = 'stages.json'  # in the work directory of a cell
_LOCK = '.sweep'  # in the work directory of a cell, and in that of the sweep while it is claimed


def claim(folder: storage.Path, settings: dict[str, Any], cells: Sequence[Cell]) -> list[Cell]:
  """Records the settings and cells of a sweep in its work directory.

  Returns:
    All cells that the work directory has, those of earlier calls first.

  Raises:
    UsageError: it has cells with other settings, or one of these cells with other fields.
  """
  storage.make_folder(folder)
  with _locked(folder):
    return _claim(folder, settings, cells)


def _claim(folder: storage.Path, settings: dict[str, Any], cells: Sequence[Cell]) -> list[Cell]:
  path = folder / SETTINGS
  old = read_json(path, settings)
  earlier = old.pop('cells', {})
  changed = [f'{k}: {old.get(k)!r} → {v!r}' for k, v in settings.items() if old.get(k) != v]
  for c in cells:
    before = earlier.setdefault(c.folder.name, {
        'variant': c.variant, 'task': c.task, 'seed': c.seed, 'run': c.run, 'fields': list(c.fields)})['fields']
    if before != list(c.fields):
      changed.append(f'{c.folder.name}: ' + ' → '.join(', '.join(x) or 'as the config' for x in (before, c.fields)))
  if changed:
    raise UsageError(f'{folder} has a sweep with other settings ({first_few(changed)}); give another --workdir.')
  write_json(path, {**settings, 'cells': earlier})
  given = {c.folder.name: c for c in cells}
  return [given.get(name) or Cell(folder / name, c['variant'], c['task'], c['seed'], (), tuple(c['fields']), c['run'])
          for name, c in earlier.items()]


def read_log(folder: storage.Path) -> list[dict[str, Any]]:
  """Every attempt of a cell, in order: [{'stage', 'command', 'exit_code', 'seconds'}]."""
  return read_json(folder / LOG, [])


def is_finished(log: Sequence[dict[str, Any]], stage: str) -> bool:
  """Whether an attempt of a stage succeeded."""
  return any(attempt['stage'] == stage and attempt['exit_code'] == FINISHED for attempt in log)


def _is_current(log: Sequence[dict[str, Any]], stage: Stage) -> bool:
  """Whether a stage need not run: it has succeeded, and if it shows the others, none of them has since."""
  succeeded = [attempt['stage'] for attempt in log if attempt['exit_code'] == FINISHED]
  return stage.name in (succeeded[-1:] if stage.shows_all else succeeded)


def run_cells(cells: Sequence[Cell], start: Callable[[Sequence[str], Sequence[int]], int]) -> bool:
  """Runs every stage that is not current and whose `needs` has finished.

  A failure does not stop the other stages and cells. `start` runs a command, which inherits file descriptors, and
  returns its exit code. False: a signal stopped a command, and nothing was started after it.
  """
  for number, cell in enumerate(cells, 1):
    storage.make_folder(cell.folder)
    with _locked(cell.folder) as inherited:
      log = read_log(cell.folder)
      is_done = all(_is_current(log, stage) for stage in cell.stages)
      print(f'{number}/{len(cells)} {cell.folder.name}' + (': done' if is_done else ''), flush=True)
      for stage in cell.stages:
        if _is_current(log, stage) or stage.needs and not is_finished(log, stage.needs):
          continue
        began = time.perf_counter()
        code = start(stage.command, inherited)
        log.append({'stage': stage.name, 'command': ' '.join(('uni-moe', *stage.command)), 'exit_code': code,
                    'seconds': round(time.perf_counter() - began, 1)})
        write_json(cell.folder / LOG, log)
        if code == PREEMPTED:
          return False
  return True


@contextlib.contextmanager
def _locked(folder: storage.Path) -> Iterator[tuple[int, ...]]:
  """Waits until no other sweep, and no command that one has left, works on a cell; not in a bucket.

  Yields the descriptors with which a command keeps the lock, also if this process is killed.
  """
  if storage.is_remote(folder):
    yield ()
    return
  with open(folder / _LOCK, 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'waiting for another process that works on {folder}', flush=True)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
      pass
    yield (file.fileno(),)


def starter(folder: pathlib.Path) -> Callable[[Sequence[str], Sequence[int]], int]:
  """A `start` for `run_cells` that runs launch scripts of `folder`, such as ('train', '--workdir=…').

  The process gets a session of its own, so that it receives a signal only once, from this process; SIGTERM, if this
  process dies. The exit code is 75 if a signal ended it.
  """
  def start(command: Sequence[str], inherited: Sequence[int]) -> int:
    print('$ uni-moe', *command, flush=True)
    return signals.wait(signals.start(
        [sys.executable, folder / f'{command[0]}.py', *command[1:]], pass_fds=inherited))

  return start
