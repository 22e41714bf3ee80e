"""Starts a command again until it has finished: soon after a preemption, later and later after crashes, with a limit."""

import signal
import subprocess
import threading
import time
from collections.abc import Sequence

from uni_moe_jax.train.workdir import saved_step

FINISHED, USAGE, PREEMPTED = 0, 2, 75
LONGEST_WAIT = 600.0  # seconds
_ENDED_BY_IT = 128 + signal.SIGTERM  # it was asked to stop before it could save


def keep_running(command: Sequence[str], limit: int, wait: float) -> int:
  """Runs a command until it has finished, cannot, or has been started again too often for nothing.

  Args:
    command: program and arguments; its --workdir says where its checkpoints lie.
    limit: starts in a row that brought no newer checkpoint, after which it is given up.
    wait: seconds before it is started again: once this after a preemption or where there is a newer checkpoint, else doubled
      with every start in a row that brought none.

  Returns:
    The exit code: that of the command; 75 where a signal to this process ended it; 128 + number where a signal to the command did.
  """
  workdir, vain = _workdir(command), 0
  with _Child() as child:
    while True:
      began, before = time.monotonic(), _saved(workdir)
      code = child.run(command)
      after = _saved(workdir)
      said = f'{_ending(code)} after {time.monotonic() - began:.0f} s, {"no checkpoint" if after is None else f"step {after} saved"}'
      code = code if code >= 0 else 128 - code
      if child.signalled:  # somebody wants the machine: the next start is theirs
        return FINISHED if code == FINISHED else PREEMPTED if code in (PREEMPTED, _ENDED_BY_IT) else code
      if code in (FINISHED, USAGE):
        if code == USAGE:
          _say(f'{said}: starting it again would not help.')
        return code
      vain = 0 if after is not None and after != before else vain + 1
      if vain >= limit:
        _say(f'{said}; {vain} starts in a row brought no newer checkpoint: given up.')
        return code
      pause = min(LONGEST_WAIT, wait * (1 if code == PREEMPTED else 2 ** max(0, vain - 1)))
      _say(f'{said}; starting it again in {pause:g} s ({vain} of {limit} starts in vain).')
      if child.signalled_within(pause):
        return PREEMPTED


class _Child:
  """Runs one command at a time, in a process group of its own, and asks it to stop once for every signal."""

  def __init__(self):
    self._process: subprocess.Popen | None = None
    self._passed_on = False
    self._signal = threading.Event()

  def __enter__(self) -> '_Child':
    self._old = {s: signal.signal(s, self._pass_on) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    return self

  def __exit__(self, *_) -> None:
    for s, handler in self._old.items():
      signal.signal(s, handler)

  @property
  def signalled(self) -> bool:
    return self._signal.is_set()

  def signalled_within(self, seconds: float) -> bool:
    return self._signal.wait(seconds)

  def run(self, command: Sequence[str]) -> int:
    """Its exit code; minus the number of the signal that killed it."""
    # A terminal's Ctrl-C would reach it a second time otherwise, and the second one means: at once, without saving.
    self._process = subprocess.Popen(command, start_new_session=True)
    if self.signalled and not self._passed_on:  # just before it began
      self._process.terminate()
    return self._process.wait()

  def _pass_on(self, *_) -> None:
    self._signal.set()
    if self._process is not None and self._process.poll() is None:
      self._process.terminate()
      self._passed_on = True


def _workdir(command: Sequence[str]) -> str | None:
  for i, argument in enumerate(command):
    name, given, value = argument.partition('=')
    if name in ('--workdir', '-workdir'):
      return value if given else command[i + 1] if i + 1 < len(command) else None
  return None


def _saved(workdir: str | None) -> int | None:
  return None if workdir is None else saved_step(workdir)


def _ending(code: int) -> str:
  if code < 0:
    return f'killed by {signal.Signals(-code).name}'
  return 'stopped by a signal and saved' if code == PREEMPTED else f'exit code {code}'


def _say(what: str) -> None:
  print(f'keep_running: {what}', flush=True)
