"""Runs that cannot continue: a full disk, stalled input, a hung step, a process that dies while others wait for it.

Each must end with exit code 1 and one sentence, and the same command must then continue to the same result. Processes
without a common work directory must end with exit code 2.
"""

import dataclasses
import pathlib
import shlex
import subprocess
import time
from collections.abc import Callable

from tests.helpers import processes
from tests.stress import injected_faults
from tests.stress import trainer as trainer_lib
from tests.stress.trainer import Trainer, ending
from uni_moe_jax.train.workdir import CHECKPOINTS, saved_step

_MAX_SURVIVAL = 150.0  # seconds of a process after the death of another
_DISK_KB = 1100  # enough for some checkpoints of configs/small.py and its metrics, too little for all that it writes
# A file system for one process, without root where user namespaces are allowed.
_SMALL_DISK = ('mount -t tmpfs -o size={size}k tmpfs {disk} && cp -a {copy}/. {disk} && {command}; code=$?; '
               'cp -a {disk}/. {copy}; exit $code')


class NotTried(Exception):
  """A test that this machine does not support."""


def hanging(trainer: Trainer, undisturbed: pathlib.Path) -> tuple[list[str], list[str]]:
  """Run trainers that hang. Return (report lines, findings)."""
  report, findings = [], []
  for name, (timeout, words) in injected_faults.HANGS.items():
    workdir, log = trainer.folder / name, trainer.folder / f'{name}.log'
    trainer_lib.clear(workdir, log)
    code, seconds = dataclasses.replace(trainer, fault=name, overrides=(
        *trainer.overrides, f'train.hang_timeout={timeout}', 'train.checkpoint_every=2')).run(workdir, log)
    output = log.read_text(errors='replace')
    report.append(f'{name}: {ending(code)} after {seconds:.0f} s')
    if code != 1:
      findings.append(f'{name}: {ending(code)} instead of exit code 1')
    findings += [f'{name}: does not report {w!r}' for w in (*words, f'config.train.hang_timeout={timeout:g}')
                 if w not in output]
    findings += _continue(trainer, undisturbed, workdir, log)
  return report, findings


def full_disk(trainer: Trainer, undisturbed: pathlib.Path) -> tuple[list[str], list[str]]:
  """Run on a disk that is too small, then on a larger one. Return (report lines, findings). Raises NotTried."""
  if subprocess.run(['unshare', '-rm', 'true'], capture_output=True, check=False).returncode:
    raise NotTried('a full disk: this machine has no user namespaces')
  disk, copy, log = (trainer.folder / f'disk{suffix}' for suffix in ('', '_copy', '.log'))
  trainer_lib.clear(disk, copy)
  for folder in (disk, copy):
    folder.mkdir()
  command = _SMALL_DISK.format(size=_DISK_KB, disk=shlex.quote(str(disk)), copy=shlex.quote(str(copy)),
                               command=shlex.join(trainer.command(disk / 'run')))
  code = trainer_lib.wait(trainer_lib.start(
      ['unshare', '-rm', 'bash', '-c', command], log, trainer_lib.environment(trainer.folder, trainer.optimized)))
  errors, findings = _errors('a full disk', log, trainer_lib.DISK_FULL)
  if code != 1:
    findings.append(f'a full disk: {ending(code)} instead of exit code 1')
  saved = trainer_lib.newest_intact(copy / 'run')
  report = [f'a full disk: {ending(code)}, step {saved} saved; {errors[-1] if errors else ""}']
  if saved is None:
    names = sorted(p.name for p in (copy / 'run' / CHECKPOINTS).glob('*'))
    findings.append(f'a full disk: no checkpoint of {names} is intact')
  return report, findings + _continue(trainer, undisturbed, copy / 'run', log)


def two_undisturbed(trainer: Trainer) -> tuple[pathlib.Path, list[str]]:
  """Train one run in two processes to its end. Return (its work directory, findings)."""
  workdir = trainer.folder / 'two_undisturbed'
  codes = [trainer_lib.wait(p) for p in _start_two_anew(trainer, workdir)]
  message = f'two processes: {" and ".join(map(ending, codes))}, see {_logs(workdir)[0]}'
  return workdir, [message] if any(codes) else []


def dead_process(trainer: Trainer, undisturbed: pathlib.Path) -> tuple[list[str], list[str]]:
  """Send SIGKILL to the second of two processes that train one run, then continue the run in two.

  Args:
    trainer: of the run.
    undisturbed: work directory of `two_undisturbed`.

  Returns:
    (report lines, findings).
  """
  def kill(other: subprocess.Popen, workdir: pathlib.Path) -> list[str]:
    while other.poll() is None and saved_step(workdir) is None:
      time.sleep(.01)
    other.kill()
    other.wait()
    return []
  return _one_of_two_ends(trainer, undisturbed, trainer, 'killed', kill)


def failed_process(trainer: Trainer, undisturbed: pathlib.Path) -> tuple[list[str], list[str]]:
  """The second of two processes fails while the first waits for it; otherwise like `dead_process`."""
  def fail(other: subprocess.Popen, workdir: pathlib.Path) -> list[str]:
    code, output = trainer_lib.wait(other), _logs(workdir)[1].read_text(errors='replace')
    if code == 1 and injected_faults.LOST_DISK in output:
      return []
    return [f'the process that fails: {ending(code)}, prints {output[-200:]!r}']
  return _one_of_two_ends(trainer, undisturbed, dataclasses.replace(trainer, fault='one_process_fails'), 'failed', fail)


def separate_folders(trainer: Trainer, _: pathlib.Path) -> tuple[list[str], list[str]]:
  """Start two processes of one run, each with a work directory of its own. Return (report lines, findings)."""
  folders, address = [trainer.folder / f'separate_{i}' for i in range(2)], processes.free_address()
  logs, began = [folder.with_suffix('.log') for folder in folders], time.monotonic()
  trainer_lib.clear(*folders, *logs)
  running = [dataclasses.replace(trainer, flags=trainer_lib.distributed_flags(address, 2, i)).start(folder, log)
             for i, (folder, log) in enumerate(zip(folders, logs, strict=True))]
  codes = [trainer_lib.wait(process) for process in running]
  findings = [f'separate folders: process {i}: {ending(code)} instead of exit code 2' for i, code in enumerate(codes)
              if code != 2]
  findings += [f for log in logs for f in _errors('separate folders', log, trainer_lib.NOT_SHARED)[1]]
  ended = ' and '.join(map(ending, codes))
  return [f'separate folders: {ended} after {time.monotonic() - began:.0f} s'], findings


def _one_of_two_ends(
    trainer: Trainer, undisturbed: pathlib.Path, faulty: Trainer, how: str,
    end: Callable[[subprocess.Popen, pathlib.Path], list[str]]) -> tuple[list[str], list[str]]:
  """Train a run in two processes of `faulty`, where `end` ends the second. Then continue with two of `trainer`."""
  workdir = trainer.folder / f'two_{how}'
  survivor, other = _start_two_anew(faulty, workdir)
  findings, began = end(other, workdir), time.monotonic()
  code, seconds = trainer_lib.wait(survivor), time.monotonic() - began
  errors, message_findings = _errors(f'one {how}: the other one', _logs(workdir)[0], trainer_lib.OTHER_PROCESS_DIED)
  report = [f'one {how}: the other ended {seconds:.0f} s later, {ending(code)}; {errors[-1] if errors else ""}']
  if code != 1:
    findings.append(f'one {how}: the other one: {ending(code)} instead of exit code 1')
  if seconds > _MAX_SURVIVAL:
    findings.append(f'one {how}: the other one ended {seconds:.0f} s later, at most {_MAX_SURVIVAL:.0f}')
  findings += message_findings
  if any(codes := [trainer_lib.wait(p) for p in _start_two(trainer, workdir)]):
    return report, [*findings, f'one {how}: the same command: {" and ".join(map(ending, codes))}']
  return report, findings + trainer_lib.differences(undisturbed, workdir)


def _errors(what: str, log: pathlib.Path, words: str) -> tuple[list[str], list[str]]:
  """Return (the errors in a log, a finding unless it is exactly one sentence with `words`)."""
  output = log.read_text(errors='replace')
  errors = [line for line in output.splitlines() if line.startswith('error: ')]
  reported = len(errors) == 1 and words in errors[0] and 'Traceback' not in output
  return errors, [] if reported else [f'{what}: does not report it in one sentence, see {log}']


def _start_two_anew(trainer: Trainer, workdir: pathlib.Path) -> list[subprocess.Popen]:
  trainer_lib.clear(workdir, *_logs(workdir))
  return _start_two(trainer, workdir)


def _start_two(trainer: Trainer, workdir: pathlib.Path) -> list[subprocess.Popen]:
  """Start two processes that train one run."""
  address = processes.free_address()
  return [dataclasses.replace(trainer, flags=trainer_lib.distributed_flags(address, 2, i)).start(workdir, log)
          for i, log in enumerate(_logs(workdir))]


def _logs(workdir: pathlib.Path) -> list[pathlib.Path]:
  return [workdir.with_name(f'{workdir.name}_{i}.log') for i in range(2)]


def _continue(trainer: Trainer, undisturbed: pathlib.Path, workdir: pathlib.Path, log: pathlib.Path) -> list[str]:
  """Run the same command without the fault. Return findings."""
  code, _ = trainer.run(workdir, log)
  if code:
    return [f'{workdir.name}: the same command: {ending(code)}']
  return trainer_lib.differences(undisturbed, workdir)
