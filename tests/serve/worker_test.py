"""What the worker reports while it compiles, with a model of one program that returns or raises at once."""

import errno
import multiprocessing
import threading

import pytest

from uni_moe_jax.serve import worker as worker_lib
from uni_moe_jax.serve.limits import Limits


class _Model:
  """Raises an error if there is one."""

  def __init__(self, error: Exception | None):
    self._error = error

  def run(self, *_, **__):
    if self._error:
      raise self._error


@pytest.fixture(name='worker')
def _worker(monkeypatch):
  """Returns a worker with one program, and the front's end of its pipe."""
  monkeypatch.setattr(worker_lib.os, '_exit', lambda code: (_ for _ in ()).throw(SystemExit(code)))

  def make(error=None):
    ours, theirs = multiprocessing.Pipe()
    worker = object.__new__(worker_lib._Worker)
    worker._connection, worker._lock, worker._limits = theirs, threading.Lock(), Limits(max_batch=1)
    worker._model, worker._programs, worker._blank = _Model(error), [('shape', 'classify')], lambda *_: {}
    return worker, ours
  return make


def test_a_worker_reports_each_program_and_then_that_all_are_compiled(worker):
  made, front = worker()
  made._warm_all()
  assert [front.recv(), front.recv()] == [('warm', 'shape', 'classify', 1), ('ready',)]


@pytest.mark.parametrize('error, reason', [
    (OSError(errno.ENOSPC, 'No space left on device'), 'No space left on device'),
    (PermissionError(errno.EACCES, 'Permission denied', 'classify.mlir'), "Permission denied: 'classify.mlir'"),
    (ValueError('no such program'), 'no such program')])
def test_an_error_of_compilation_is_reported_with_its_reason(worker, error, reason):
  made, front = worker(error)
  made._warm_all()
  [what, message] = front.recv()
  assert what == 'failed' and reason in message


def test_a_worker_whose_front_has_ended_ends_quietly(worker):
  made, front = worker()
  front.close()
  with pytest.raises(SystemExit) as ended:
    made._warm_all()
  assert ended.value.code == 0
