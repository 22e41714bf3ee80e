"""Runs that cannot go on: a full disk, input that stalls, a step that hangs, a process that dies while another needs it.

Each says so, and the same command continues.
"""

import dataclasses
import pathlib
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable

from uni_moe_jax.faults import kills, planted
from uni_moe_jax.train.workdir import CHECKPOINTS, saved_step

_SURVIVES = 150.0  # seconds, at most, without the other process
# Room for some checkpoints of configs/small.py beside its metrics, and not for all that it writes.
_KILOBYTES = 1100
# A file system of its own for one process, which needs no rights where user namespaces are allowed.
_SMALL_DISK = ('mount -t tmpfs -o size={size}k tmpfs {place} && cp -a {kept}/. {place} && {command}; code=$?; '
               'cp -a {place}/. {kept}; exit $code')


class NotTried(Exception):
  """What cannot be tried on this machine, and why."""


def hangs(trainer: kills.Trainer, whole: pathlib.Path) -> tuple[list[str], list[str]]:
  """Trainers that hang: (what was seen, findings)."""
  seen, findings = [], []
  for name, (limit, sayings) in planted.HANGS.items():
    workdir, log = trainer.folder / name, trainer.folder / f'{name}.log'
    shutil.rmtree(workdir, ignore_errors=True)
    log.unlink(missing_ok=True)
    hanging = dataclasses.replace(trainer, plant=name, overrides=(
        *trainer.overrides, f'train.hang_timeout={limit}', 'train.checkpoint_every=2'))
    code, seconds = hanging.run(workdir, log)
    said = log.read_text(errors='replace')
    seen.append(f'{name}: {kills.ending(code)} after {seconds:.0f} s')
    findings += [f'{name}: {kills.ending(code)} instead of exit code 1'] if code != 1 else []
    findings += [f'{name}: does not say {s!r}' for s in (*sayings, f'config.train.hang_timeout={limit:g}') if s not in said]
    findings += _goes_on(trainer, whole, workdir, log)
  return seen, findings


def full_disk(trainer: kills.Trainer, whole: pathlib.Path) -> tuple[list[str], list[str]]:
  """A run whose disk is too small, then the same on one that is not: (what was seen, findings). Raises NotTried."""
  if subprocess.run(['unshare', '-rm', 'true'], capture_output=True, check=False).returncode:
    raise NotTried('a full disk: this machine has no user namespaces')
  place, kept, log = (trainer.folder / f'disk{suffix}' for suffix in ('', '_kept', '.log'))
  for folder in (place, kept):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
  command = _SMALL_DISK.format(size=_KILOBYTES, place=shlex.quote(str(place)), kept=shlex.quote(str(kept)),
                               command=shlex.join(trainer.command(place / 'run')))
  code = kills.code_of(kills.start(
      ['unshare', '-rm', 'bash', '-c', command], log, kills.environment(trainer.folder, trainer.optimised)))
  said = log.read_text(errors='replace')
  complaints = [line for line in said.splitlines() if line.startswith('error: ')]
  findings = [] if code == 1 else [f'a full disk: {kills.ending(code)} instead of exit code 1']
  if len(complaints) != 1 or 'the disk is full' not in complaints[0] or 'Traceback' in said:
    findings.append(f'a full disk: does not say so in one sentence, see {log}')
  safe = kills.newest_whole(kept / 'run')
  seen = [f'a full disk: {kills.ending(code)}, step {safe} safe; {complaints[-1] if complaints else ""}']
  if safe is None:
    findings.append(f'a full disk: no checkpoint of {sorted(p.name for p in (kept / "run" / CHECKPOINTS).glob("*"))} is whole')
  return seen, findings + _goes_on(trainer, whole, kept / 'run', log)


def two_undisturbed(trainer: kills.Trainer) -> tuple[pathlib.Path, list[str]]:
  """Two processes train one run to its end: (its work directory, findings)."""
  workdir = trainer.folder / 'two_whole'
  codes = [kills.code_of(p) for p in _two_anew(trainer, workdir)]
  return workdir, [f'two processes: {" and ".join(map(kills.ending, codes))}, see {_logs(workdir)[0]}'] if any(codes) else []


def dead_process(trainer: kills.Trainer, whole: pathlib.Path) -> tuple[list[str], list[str]]:
  """SIGKILL for the second of two processes that train one run, which then goes on in two, to the end of those of `whole`, see
  `two_undisturbed`: (what was seen, findings)."""
  def kill(other: subprocess.Popen, workdir: pathlib.Path) -> list[str]:
    while other.poll() is None and saved_step(workdir) is None:
      time.sleep(.01)
    other.kill()
    other.wait()
    return []
  return _one_of_two(trainer, whole, trainer, 'killed', kill)


def failed_process(trainer: kills.Trainer, whole: pathlib.Path) -> tuple[list[str], list[str]]:
  """The second of two processes cannot go on, and the first waits for it; as `dead_process`."""
  def fail(other: subprocess.Popen, workdir: pathlib.Path) -> list[str]:
    code, said = kills.code_of(other), _logs(workdir)[1].read_text(errors='replace')
    return [] if code == 1 and planted.ALONE in said else [f'the process that fails: {kills.ending(code)}, says {said[-200:]!r}']
  return _one_of_two(trainer, whole, dataclasses.replace(trainer, plant='fails_alone'), 'failed', fail)


def _one_of_two(
    trainer: kills.Trainer, whole: pathlib.Path, ended: kills.Trainer, how: str,
    end: Callable[[subprocess.Popen, pathlib.Path], list[str]]) -> tuple[list[str], list[str]]:
  """Two processes of `ended` train one run, of which `end` sees the second to its end: its findings; then two of `trainer` go on."""
  workdir = trainer.folder / f'two_{how}'
  survivor, other = _two_anew(ended, workdir)
  findings, began = end(other, workdir), time.monotonic()
  code, seconds = kills.code_of(survivor), time.monotonic() - began
  said = _logs(workdir)[0].read_text(errors='replace')
  complaints = [line for line in said.splitlines() if line.startswith('error: ')]
  seen = [f'one {how}: the other ended {seconds:.0f} s later, {kills.ending(code)}; {complaints[-1] if complaints else ""}']
  if code != 1:
    findings.append(f'one {how}: the other one: {kills.ending(code)} instead of exit code 1')
  if seconds > _SURVIVES:
    findings.append(f'one {how}: the other one ended {seconds:.0f} s later, at most {_SURVIVES:.0f}')
  if len(complaints) != 1 or 'another process of this run has died' not in complaints[0] or 'Traceback' in said:
    findings.append(f'one {how}: the other one does not say so in one sentence, see {_logs(workdir)[0]}')
  if any(codes := [kills.code_of(p) for p in _two(trainer, workdir)]):
    return seen, [*findings, f'one {how}: the same command: {" and ".join(map(kills.ending, codes))}']
  return seen, findings + kills.differences(whole, workdir)


def _two_anew(trainer: kills.Trainer, workdir: pathlib.Path) -> list[subprocess.Popen]:
  """As `_two`, where nothing of an earlier run is left."""
  shutil.rmtree(workdir, ignore_errors=True)
  for log in _logs(workdir):
    log.unlink(missing_ok=True)
  return _two(trainer, workdir)


def _two(trainer: kills.Trainer, workdir: pathlib.Path) -> list[subprocess.Popen]:
  """Starts two processes that train one run."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  flags = f'--coordinator_address={address}', '--num_processes=2'
  return [dataclasses.replace(trainer, flags=(*flags, f'--process_id={i}')).start(workdir, log)
          for i, log in enumerate(_logs(workdir))]


def _logs(workdir: pathlib.Path) -> list[pathlib.Path]:
  return [workdir.with_name(f'{workdir.name}_{i}.log') for i in range(2)]


def _goes_on(trainer: kills.Trainer, whole: pathlib.Path, workdir: pathlib.Path, log: pathlib.Path) -> list[str]:
  """Findings about the same command, when what stopped it is over."""
  code, _ = trainer.run(workdir, log)
  return [f'{workdir.name}: the same command: {kills.ending(code)}'] if code else kills.differences(whole, workdir)
