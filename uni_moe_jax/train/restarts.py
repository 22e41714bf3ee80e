"""Restarts a command until it has finished, with exponential backoff after crashes, up to a limit."""

import signal
import subprocess
import threading
import time
from collections.abc import Sequence

from uni_moe_jax.io import storage
from uni_moe_jax.train.workdir import saved_step
from uni_moe_jax.utils import signals
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.exit_codes import FINISHED, PREEMPTED, USAGE

_MAX_BACKOFF = 600.0  # seconds
_TERMINATED = 128 + signal.SIGTERM  # the command was stopped before it could save


def keep_running(command: Sequence[str], max_restarts: int, backoff: float) -> int:
  """Runs a command until it finishes, is refused, or too many starts in a row make no progress.

  Args:
    command: program and arguments; its --workdir shows its checkpoints. Without one, no start makes progress.
    max_restarts: starts in a row without a newer checkpoint, after which it gives up.
    backoff: seconds before a restart: once this after a preemption or a newer checkpoint, else doubled with every start
      in a row without one.

  Returns:
    An exit code: the command's; 75 if a signal to this process stopped it; 128 + number if a signal killed the command.

  Raises:
    UsageError: the command is no program, and has not run before, or its --workdir is no address.
  """
  workdir, failures, child = _workdir(command), 0, _Child()
  worked = _saved(workdir) is not None  # whether a start has ever passed the checks of its command
  # nohup ignores SIGHUP, so that the run outlives the terminal.
  hangup = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
  with signals.handled(child.pass_on, signal.SIGINT, signal.SIGTERM, *hangup):
    while True:
      started, before = time.monotonic(), _saved(workdir)
      try:
        code = child.run(command)
      except UsageError as e:
        if not worked:
          raise
        _print(str(e))
        code = USAGE
      after = _saved(workdir)
      is_newer = after is not None and (before is None or after > before)
      report = f'{_ending(code)} after {time.monotonic() - started:.0f} s, {_progress(workdir, after, is_newer)}'
      code = code if code >= 0 else 128 - code
      if child.signaled.is_set():  # do not restart: the machine is needed for something else
        return FINISHED if code == FINISHED else PREEMPTED if code in (PREEMPTED, _TERMINATED) else code
      if code == FINISHED:
        return code
      # A command that worked before is refused only while something is missing, such as a disk that is mounted late.
      if code == USAGE and not worked:
        _print(f'{report}: a restart would not help.')
        return code
      worked |= code != USAGE
      failures = 0 if is_newer else failures + 1
      if failures >= max_restarts:
        _print(f'{report}; giving up after {failures} starts in a row without a newer checkpoint.')
        return code
      pause = min(_MAX_BACKOFF, backoff * (1 if code == PREEMPTED else 2 ** max(0, failures - 1)))
      _print(f'{report}; restarting in {pause:g} s ({failures} of {max_restarts} starts without progress).')
      if child.signaled.wait(pause):
        return PREEMPTED


class _Child:
  """Runs one command at a time, in a process group of its own, and terminates it once for every signal."""

  def __init__(self):
    self._process: subprocess.Popen | None = None
    self._passed_on = False
    self.signaled = threading.Event()

  def run(self, command: Sequence[str]) -> int:
    """Exit code of the command; minus the number of the signal that killed it. UsageError if it cannot be started."""
    # In our process group a terminal's Ctrl-C would reach it a second time, which means: stop at once, without saving.
    try:
      self._process = signals.start(command)
    except OSError as e:
      raise UsageError(f'{command[0]!r} is no program that can be started ({e.strerror}); give its name or path after '
                       '--.') from None
    if self.signaled.is_set() and not self._passed_on:  # just before it started
      self._process.terminate()
    return self._process.wait()

  def pass_on(self, *_) -> None:
    self.signaled.set()
    if self._process is not None and self._process.poll() is None:
      self._process.terminate()
      self._passed_on = True


def _workdir(command: Sequence[str]) -> str | None:
  for i, argument in enumerate(command):
    name, equals, value = argument.partition('=')
    if name in ('--workdir', '-workdir'):
      return value if equals else command[i + 1] if i + 1 < len(command) else None
  return None


def _saved(workdir: str | None) -> int | None:
  """The newest checkpoint; None, with a note, if the disk or the store does not answer: the command may still run."""
  try:
    return None if workdir is None else saved_step(workdir)
  except Exception as e:
    remote = storage.is_remote(workdir)
    if isinstance(e, UsageError) or not (remote or isinstance(e, OSError)):
      raise
    _print(f'the checkpoints in {workdir} cannot be listed ({remote and storage.explain(e, workdir) or e}).')
    return None


def _progress(workdir: str | None, after: int | None, is_newer: bool) -> str:
  if workdir is None:
    return 'progress unknown: the command has no --workdir'
  if after is None:
    return 'no checkpoint'
  return f'step {after} saved' if is_newer else f'no checkpoint after that of step {after}'


def _ending(code: int) -> str:
  if code < 0:
    return f'killed by {signal.Signals(-code).name}'
  return 'stopped by a signal' if code == PREEMPTED else f'exit code {code}'


def _print(message: str) -> None:
  print(f'keep_running: {message}', flush=True)
