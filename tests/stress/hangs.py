"""Runs that cannot continue: a full disk, stalled input, a hung step, a process that dies while others wait for it.

Each must end with exit code 1 and one sentence, and the same command must then continue to the same result. Functions
return findings.
"""

import dataclasses
import pathlib
import shlex
import subprocess
import time

from tests.helpers import processes
from tests.stress import injected_faults
from tests.stress import trainer as trainer_lib
from tests.stress.trainer import Trainer, ending
from uni_moe_jax.train.workdir import saved_step

_DISK_KB = 1100  # enough for some checkpoints of configs/small.py and its metrics, too little for all that it writes
# A file system for one process, without root where user namespaces are allowed.
_SMALL_DISK = ('mount -t tmpfs -o size={size}k tmpfs {disk} && cp -a {copy}/. {disk} && {command}; code=$?; '
               'cp -a {disk}/. {copy}; exit $code')


def has_namespaces() -> bool:
  """Whether this machine has user namespaces, which `full_disk` needs."""
  return not subprocess.run(['unshare', '-rm', 'true'], capture_output=True, check=False).returncode


def hanging(trainer: Trainer, undisturbed: pathlib.Path, fault: str) -> list[str]:
  """Run a trainer that hangs."""
  timeout, words = injected_faults.HANGS[fault]
  workdir, log = trainer.folder / fault, trainer.folder / f'{fault}.log'
  code, _ = dataclasses.replace(trainer, fault=fault, overrides=(
      *trainer.overrides, f'train.hang_timeout={timeout}', 'train.checkpoint_every=2')).run(workdir, log)
  output = log.read_text(errors='replace')
  findings = [f'{fault}: does not report {w!r}' for w in (*words, f'config.train.hang_timeout={timeout:g}')
              if w not in output]
  return findings + _wrong_code(fault, code) + _continue(trainer, undisturbed, workdir, log)


def full_disk(trainer: Trainer, undisturbed: pathlib.Path) -> list[str]:
  """Run on a disk that is too small, then on a larger one."""
  disk, copy, log = (trainer.folder / f'disk{suffix}' for suffix in ('', '_copy', '.log'))
  for folder in (disk, copy):
    folder.mkdir()
  command = _SMALL_DISK.format(size=_DISK_KB, disk=shlex.quote(str(disk)), copy=shlex.quote(str(copy)),
                               command=shlex.join(trainer.command(disk / 'run')))
  code = trainer_lib.wait(trainer_lib.start(
      ['unshare', '-rm', 'bash', '-c', command], log, trainer_lib.environment(trainer.folder)))
  findings = _wrong_code('a full disk', code) + _not_one_sentence('a full disk', log, trainer_lib.DISK_FULL)
  if trainer_lib.newest_intact(copy / 'run') is None:
    findings.append('a full disk: no checkpoint is intact')
  return findings + _continue(trainer, undisturbed, copy / 'run', log)


def two_undisturbed(trainer: Trainer) -> pathlib.Path:
  """Train one run in two processes to its end. Return its work directory."""
  workdir = trainer.folder / 'two_undisturbed'
  codes = [trainer_lib.wait(p) for p in _start_two(trainer, workdir)]
  assert codes == [0, 0], f'two processes: {" and ".join(map(ending, codes))}, see {_logs(workdir)[0]}'
  return workdir


def dead_process(trainer: Trainer, undisturbed: pathlib.Path, max_survival: float = 150.0) -> list[str]:
  """Send SIGKILL to the second of two processes that train one run, then continue the run in two.

  Args:
    trainer: of the run.
    undisturbed: work directory of `two_undisturbed`.
    max_survival: seconds of the first process after the death of the second.
  """
  workdir = trainer.folder / 'two_killed'
  survivor, other = _start_two(trainer, workdir)
  while other.poll() is None and saved_step(workdir) is None:
    time.sleep(.01)
  other.kill()
  other.wait()
  began = time.monotonic()
  code, seconds = trainer_lib.wait(survivor), time.monotonic() - began
  findings = _wrong_code('the other process', code)
  findings += _not_one_sentence('the other process', _logs(workdir)[0], trainer_lib.OTHER_PROCESS_DIED)
  if seconds > max_survival:
    findings.append(f'the other process ended {seconds:.0f} s later, at most {max_survival:.0f}')
  if any(codes := [trainer_lib.wait(p) for p in _start_two(trainer, workdir)]):
    return [*findings, f'the same command: {" and ".join(map(ending, codes))}']
  return findings + trainer_lib.differences(undisturbed, workdir)


def _wrong_code(what: str, code: int) -> list[str]:
  return [] if code == 1 else [f'{what}: {ending(code)} instead of exit code 1']


def _not_one_sentence(what: str, log: pathlib.Path, words: str) -> list[str]:
  """A finding unless the log has exactly one error, a sentence with `words`."""
  output = log.read_text(errors='replace')
  errors = [line for line in output.splitlines() if line.startswith('error: ')]
  reported = len(errors) == 1 and words in errors[0] and 'Traceback' not in output
  return [] if reported else [f'{what}: does not report it in one sentence, see {log}']


def _start_two(trainer: Trainer, workdir: pathlib.Path) -> list[subprocess.Popen]:
  """Start two processes that train one run."""
  address = processes.free_address()
  return [dataclasses.replace(trainer, flags=trainer_lib.distributed_flags(address, 2, i)).start(workdir, log)
          for i, log in enumerate(_logs(workdir))]


def _logs(workdir: pathlib.Path) -> list[pathlib.Path]:
  return [workdir.with_name(f'{workdir.name}_{i}.log') for i in range(2)]


def _continue(trainer: Trainer, undisturbed: pathlib.Path, workdir: pathlib.Path, log: pathlib.Path) -> list[str]:
  """Run the same command without the fault."""
  code, _ = trainer.run(workdir, log)
  if code:
    return [f'{workdir.name}: the same command: {ending(code)}']
  return trainer_lib.differences(undisturbed, workdir)
