"""When a process dies, the others end at once with one sentence. Real runs: tests/stress/hangs_test.py."""

import contextlib
import subprocess
import sys

import jax
import pytest

from uni_moe_jax.parallel import multihost

_RESET = 'UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:20352: Connection reset by peer'


@pytest.fixture(name='two_processes')
def _two_processes(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)


def _exit_codes(error: BaseException) -> list[int]:
  """Exit codes with which a process ends that raises an error."""
  codes = []
  with multihost.exit_with_peers(codes.append):
    raise error
  return codes


def _caused_by(cause: BaseException) -> BaseException:
  error = RuntimeError('a save failed')
  error.__cause__ = cause
  return error


@pytest.mark.parametrize('error, message', [
    (ValueError(_RESET), _RESET), (_caused_by(ValueError(_RESET)), _RESET),
    (RuntimeError('INTERNAL: NCCL operation failed: remote process exited'), 'INTERNAL: NCCL operation failed'),
    (RuntimeError('DEADLINE_EXCEEDED: Barrier timed out'), 'DEADLINE_EXCEEDED: Barrier timed out'),
    (RuntimeError('UNAVAILABLE: Task 1 heartbeat timeout'), 'UNAVAILABLE: Task 1 heartbeat timeout')])
def test_an_error_about_a_lost_peer_ends_the_process_with_one_sentence(two_processes, capsys, error, message):
  assert _exit_codes(error) == [1]
  report = capsys.readouterr().err
  assert report.count('\n') == 1 and message in report
  assert report.startswith('error: another process of this run has died or cannot be reached')
  assert 'the same command' in report


@pytest.mark.parametrize('reason, is_lost', [
    ('remote process exited or there was a network error', True), ('Connection closed by remote peer', True),
    ('communicator was aborted', True), ('operation timed out', True),
    ("unhandled cuda error. Last NCCL warning(error) log entry 'Cuda failure 2 out of memory'", False),
    ('unhandled system error', False), ('invalid usage', False)])
def test_an_error_of_nccl_is_a_lost_process_only_where_it_is_about_one(two_processes, capsys, reason, is_lost):
  error = RuntimeError(f'INTERNAL: NCCL operation ncclAllReduce() failed: {reason}')
  with contextlib.nullcontext() if is_lost else pytest.raises(RuntimeError, match='NCCL operation'):
    assert _exit_codes(error) == [1]
  assert ('another process of this run has died' in capsys.readouterr().err) == is_lost


_ClientOSError = type('ClientOSError', (OSError,), {})  # of aiohttp, by which gcsfs and s3fs reach a bucket


@pytest.mark.parametrize('error, is_of_store', [
    (_ClientOSError(104, 'Connection reset by peer'), True),
    (ValueError('UNAVAILABLE: CURL error: Error reading "gs://bucket/run/checkpoints/2/default/manifest.ocdbt"'), True),
    (ValueError(_RESET), False)])
def test_a_store_that_does_not_answer_is_no_lost_process(two_processes, capsys, error, is_of_store):
  with pytest.raises(type(error)) if is_of_store else contextlib.nullcontext():
    assert _exit_codes(error) == [1]
  assert ('another process of this run has died' in capsys.readouterr().err) == (not is_of_store)


_FAILS = """
import atexit
import jax
from uni_moe_jax.parallel import multihost
from uni_moe_jax.utils.errors import RunError, UsageError
atexit.register(lambda: print('barrier'))  # stands for JAX's shutdown barrier
jax.process_count = lambda: {processes}
try:
  with multihost.exit_with_peers():
    raise {error}
except (RunError, UsageError):
  print('reported')
"""


@pytest.mark.parametrize('processes, error, code, out', [
    (2, 'RunError("Connection reset")', 1, 'reported\n'), (2, 'KeyError("image")', 1, ''),
    (1, 'RunError("Connection reset")', 0, 'reported\nbarrier\n'),
    (2, 'UsageError("Connection reset")', 0, 'reported\nbarrier\n')])  # in all processes
def test_a_process_that_fails_reports_the_error_and_skips_the_shutdown_barrier(processes, error, code, out):
  program = _FAILS.format(processes=processes, error=error)
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (code, out)
  assert ('KeyError' in done.stderr) == ('KeyError' in error)


def test_a_single_process_agrees_with_itself():
  assert multihost.broadcast_from_primary(True) is True and multihost.broadcast_from_primary(False) is False
  assert multihost.sums_over_processes([3, 2**40]) == [3, 2**40]
