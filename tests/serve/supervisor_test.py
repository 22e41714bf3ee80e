"""The worker is replaced when it dies or takes too long, and the requests in it are refused in one sentence."""

import asyncio
import os
import signal
import threading
import time

import pytest

from tests.helpers import fake_worker
from uni_moe_jax.serve import supervisor
from uni_moe_jax.serve.limits import Limits, Refused
from uni_moe_jax.serve.worker import Item
from uni_moe_jax.utils.errors import RunError


def _run(check, folder: str = '', timeout: float = 30) -> None:
  async def main():
    started = supervisor.Supervisor(folder, Limits(timeout=timeout), '', fake_worker.main)
    try:
      await asyncio.wait_for(check(started), 60)
    finally:
      await started.close()
      assert not started.ready
  asyncio.run(main())


async def _send(started, *texts, **options):
  return await started.run('task', 'encode', [Item(text=text) for text in texts], **options)


def test_a_worker_answers_with_parts_and_reports_its_batch_sizes():
  async def check(started):
    parts = []
    await started.start()
    assert await _send(started, 'a', 'b', on_part=parts.append) == ['a', 'b'] and parts == [{0: 'a…', 1: 'b…'}]
    assert started.ready and started.sizes == {('task', 'encode'): 4} and not started.restarts
  _run(check)


@pytest.mark.parametrize('text, message', [('sleep', 'took longer than 2 s'), ('crash', 'stopped while computing')])
def test_a_worker_that_hangs_or_dies_is_replaced(capfd, text, message):
  async def check(started):
    await started.start()
    first = started._process.pid
    with pytest.raises(Refused, match=message) as refused:
      await _send(started, text)
    assert refused.value.status == 503
    assert not started.sizes  # no batch is made for a worker that has not compiled its program yet
    assert await _send(started, 'next') == ['next']
    assert started._process.pid != first and started.restarts == 1
    with pytest.raises(ProcessLookupError):
      os.kill(first, 0)
  _run(check, timeout=2)
  assert 'The worker stopped; starting another.' in capfd.readouterr().err


def test_an_idle_worker_that_dies_is_replaced():
  async def check(started):
    await started.start()
    assert await _send(started, 'a') == ['a']
    os.kill(started._process.pid, signal.SIGKILL)
    while not started.restarts:
      await asyncio.sleep(0.01)
    assert not started.ready and await _send(started, 'a') == ['a'] and started.ready
  _run(check)


def test_the_model_is_known_before_it_is_compiled():
  async def check(started):
    changes = []
    started.on_warm = lambda: changes.append(dict(started.sizes))
    await started.start()
    assert started.facts is not None and not started.ready and not changes
    assert await _send(started, 'a') == ['a'] and started.ready
    assert changes == [{('task', 'encode'): 4}]
  _run(check, 'slow')


def test_a_model_that_does_not_compile_ends_the_service():
  async def check(started):
    await started.start()
    with pytest.raises(RunError, match='no program compiles'):
      await started.failure
    assert not started.ready
  _run(check, 'uncompiled')


def test_a_first_worker_that_dies_while_it_compiles_ends_the_service(capfd):
  async def check(started):
    await started.start()
    with pytest.raises(RunError, match='the worker ended with exit code 3 before it was ready'):
      await started.failure
    assert not started.ready and not started.restarts
  _run(check, 'killed')
  assert not capfd.readouterr().err


def test_requests_that_end_workers_before_one_is_warm_end_the_service_after_some_restarts(monkeypatch):
  monkeypatch.setattr(supervisor, '_MAX_EARLY_RESTARTS', 1)

  async def check(started):
    await started.start()
    for restarts in (0, 1):
      assert not started.failure.done()
      with pytest.raises(Refused):
        await _send(started, 'a')
      assert started.restarts == restarts
    with pytest.raises(RunError, match='exit code 3'):
      await started.failure
  _run(check, 'fragile')


def test_workers_that_die_while_they_compile_are_replaced_more_and_more_slowly_if_one_has_been_warm(tmp_path):
  async def check(started):
    await started.start()
    assert await _send(started, 'a') == ['a']
    os.kill(started._process.pid, signal.SIGKILL)
    while started.restarts < 2 and not started.failure.done():
      await asyncio.sleep(0.01)
    assert started._backoff == 2 and not started.ready and not started.failure.done()
  _run(check, str(tmp_path / 'warm'))


def test_a_service_that_closes_while_it_starts_another_worker_ends_that_too(monkeypatch):
  async def check(started):
    await started.start()
    assert await _send(started, 'a') == ['a']
    start, first, entered, children = started._context.Process.start, started._process.pid, threading.Event(), []

    def start_slowly(process):
      entered.set()
      while not started._closing:
        time.sleep(0.01)
      start(process)
      children.append(process)

    monkeypatch.setattr(started._context.Process, 'start', start_slowly)
    os.kill(first, signal.SIGKILL)
    assert await asyncio.to_thread(entered.wait, 10) and not children
    await started.close()
    assert children[0].pid != first
    children[0].join(10)
    assert children[0].exitcode == -signal.SIGKILL
  _run(check)


def test_a_worker_for_which_the_machine_has_no_process_is_started_later(monkeypatch, capfd):
  async def check(started):
    await started.start()
    assert await _send(started, 'a') == ['a']
    start, failures = started._context.Process.start, [OSError(11, 'no process')]

    def fail_once(process):
      if failures:
        raise failures.pop()
      start(process)

    monkeypatch.setattr(started._context.Process, 'start', fail_once)
    os.kill(started._process.pid, signal.SIGKILL)
    await asyncio.sleep(0)
    while started.restarts < 2:
      await asyncio.sleep(0.01)
    assert await _send(started, 'b') == ['b'] and not failures
  _run(check)
  assert 'no process' in capfd.readouterr().err


def test_a_job_waits_again_if_the_worker_died_before_it_woke():
  async def check(started):
    await started.start()
    assert await _send(started, 'a') == ['a']
    started._idle.clear()
    waiting = asyncio.get_running_loop().create_task(_send(started, 'b'))
    await asyncio.sleep(0)
    started._idle.set()  # loaded,
    started._idle.clear()  # and dead
    await asyncio.sleep(0.05)
    assert not started._jobs
    started._handle(('done', 99, []), asyncio.Future())  # late, of a job that was given up
    assert not started._idle.is_set() and not waiting.done()
    started._idle.set()
    assert await waiting == ['b']
  _run(check)


def test_the_connection_of_a_dead_worker_is_not_closed_while_something_is_sent():
  async def check(started):
    await started.start()
    assert await _send(started, 'a') == ['a']
    old, sent = started._connection, threading.Event()
    started._sender.submit(sent.wait, 10)
    os.kill(started._process.pid, signal.SIGKILL)
    while not started.restarts:
      await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert not old.closed
    sent.set()
    assert await _send(started, 'b') == ['b'] and old.closed
  _run(check)


@pytest.mark.parametrize('folder, message', [('broken', 'the folder is broken'), ('dead', 'ended with exit code 3')])
def test_a_worker_that_cannot_start_ends_the_service(capfd, folder, message):
  async def check(started):
    with pytest.raises(RunError, match=message):
      await started.start()
    await asyncio.to_thread(started._receiver.join)  # it has reported the end
    await asyncio.sleep(0.01)
    assert not started.restarts
  _run(check, folder)
  assert not capfd.readouterr().err
