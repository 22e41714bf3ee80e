"""Runs that cannot go on: a full disk, input that stalls, a step that hangs. Each says so, and the same command continues."""

import dataclasses
import pathlib
import shlex
import shutil
import subprocess

from uni_moe_jax.faults import kills, planted
from uni_moe_jax.train.workdir import CHECKPOINTS

_WATCHDOG = 2.0  # seconds
# Room for some checkpoints of configs/small.py beside its metrics, and not for all that it writes.
_KILOBYTES = 1100
# A file system of its own for one process, which needs no rights where user namespaces are allowed.
_SMALL_DISK = 'mount -t tmpfs -o size={size}k tmpfs {place} && cp -a {kept}/. {place} && {command}; code=$?; cp -a {place}/. {kept}; exit $code'


class NotTried(Exception):
  """What cannot be tried on this machine, and why."""


def hangs(trainer: kills.Trainer, whole: pathlib.Path) -> tuple[list[str], list[str]]:
  """Trainers that hang: (what was seen, findings)."""
  seen, findings = [], []
  for name, sayings in planted.HANGS.items():
    workdir, log = trainer.folder / name, trainer.folder / f'{name}.log'
    shutil.rmtree(workdir, ignore_errors=True)
    log.unlink(missing_ok=True)
    hanging = dataclasses.replace(trainer, plant=name, overrides=(
        *trainer.overrides, f'train.watchdog={_WATCHDOG}', 'train.save_every=2'))
    code, seconds = hanging.run(workdir, log)
    said = log.read_text(errors='replace')
    seen.append(f'{name}: {kills.ending(code)} after {seconds:.0f} s')
    findings += [f'{name}: {kills.ending(code)} instead of exit code 1'] if code != 1 else []
    findings += [f'{name}: does not say {s!r}' for s in (*sayings, 'config.train.watchdog=2') if s not in said]
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
  code = kills.code_of(kills.start(['unshare', '-rm', 'bash', '-c', command], log, trainer.folder))
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


def _goes_on(trainer: kills.Trainer, whole: pathlib.Path, workdir: pathlib.Path, log: pathlib.Path) -> list[str]:
  """Findings about the same command, when what stopped it is over."""
  code, _ = trainer.run(workdir, log)
  return [f'{workdir.name}: the same command: {kills.ending(code)}'] if code else kills.differences(whole, workdir)
