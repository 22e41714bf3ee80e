"""Where a process of a run dies, the others end at once, with one sentence and exit code 1. Real ones: tests/faults/stops_test.py."""

import atexit
import subprocess
import sys

import jax
import pytest

from uni_moe_jax.parallel import multihost
from uni_moe_jax.utils.errors import UsageError

_RESET = 'UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:20352: Connection reset by peer'


def _ended(error: BaseException) -> list[int]:
  """Exit codes with which a process ended that raised an error."""
  codes = []
  with multihost.ends_with_the_others(codes.append):
    raise error
  return codes


@pytest.mark.parametrize('error', [
    ValueError(_RESET), RuntimeError('INTERNAL: NCCL operation failed: remote process exited'),
    RuntimeError('DEADLINE_EXCEEDED: Barrier timed out'), RuntimeError('UNAVAILABLE: Task 1 heartbeat timeout')])
def test_an_error_of_the_others_ends_the_process_with_one_sentence(monkeypatch, capsys, error):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  assert _ended(error) == [1]
  said = capsys.readouterr().err
  assert said.count('\n') == 1 and str(error) in said
  assert said.startswith('error: another process of this run has died or cannot be reached') and 'the same command' in said


def test_what_an_error_came_from_counts(monkeypatch, capsys):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  error = RuntimeError('a save failed')
  error.__cause__ = ValueError(_RESET)
  assert _ended(error) == [1] and _RESET in capsys.readouterr().err


@pytest.mark.parametrize('processes, error', [
    (1, ValueError(_RESET)), (1, KeyError('image')), (2, UsageError('config.train.steps=0 must be at least 1.'))])
def test_what_one_process_or_all_of_them_find_goes_on_its_way(monkeypatch, processes, error):
  monkeypatch.setattr(jax, 'process_count', lambda: processes)
  monkeypatch.setattr(atexit, 'register', lambda *_: pytest.fail('the process takes a short way out'))
  with pytest.raises(type(error)):
    _ended(error)


_FAILS_ALONE = """
import atexit, os, sys
import jax
from uni_moe_jax.parallel import multihost
from uni_moe_jax.utils.errors import RunError
atexit.register(lambda: print('farewell'))  # as JAX has it, which waits for the others
jax.process_count = lambda: {processes}
try:
  with multihost.ends_with_the_others():
    raise {error}
except RunError:
  print('said')
"""


@pytest.mark.parametrize('processes, error, code, out', [
    (2, 'RunError("Connection reset")', 1, 'said\n'), (2, 'KeyError("image")', 1, ''),
    (1, 'RunError("Connection reset")', 0, 'said\nfarewell\n')])
def test_a_process_that_fails_alone_tells_why_and_leaves_without_farewell(processes, error, code, out):
  done = subprocess.run([sys.executable, '-c', _FAILS_ALONE.format(processes=processes, error=error)], capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (code, out)
  assert ('KeyError' in done.stderr) == ('KeyError' in error)


def test_one_process_says_what_it_says():
  assert multihost.broadcast_from_primary(True) is True and multihost.broadcast_from_primary(False) is False
  assert multihost.total(3) == 3
