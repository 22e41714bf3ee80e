"""Each suite of the benchmark runs in a process of its own, which ends with the command."""

import signal
import subprocess
import sys
import time
from unittest import mock

import pytest

from tests.helpers import processes, tiny
from uni_moe_jax.tools.bench import settings, suite_process, suites
from uni_moe_jax.utils.errors import RunError, UsageError

_SIZES = settings.Sizes(
    rounds=1, num_layers=1, width=16, num_heads=2, mlp_dim=16, image_size=16, patch_size=8, experts=2, small_batch=2,
    names=20, name_tokens=4, vocabulary=30, words=3, gemm=16, steps=1, reduced=True)


def _measure(suite: str):
  config = tiny.config('shape', data_dir=tiny.data_dir())
  return suite_process.measure(suite, _SIZES, config, 'float32')


@pytest.mark.slow
def test_a_suite_runs_in_another_process_and_its_rows_come_back():
  with mock.patch.dict(suites.SUITE_FUNCTIONS, clear=True):  # so it could not run here
    header, (rate, *rows) = _measure('decoding')
  assert header['dtype of products'] == 'float32' and rate.name == 'GEMM 16 x 16 x 16'
  assert rows and {row.suite for row in rows} == {'decoding'} and all(row.figure.value > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize('suite, error, message', [
    ('gpu', UsageError, '--suites=gpu needs an NVIDIA GPU'),
    ('unknown', RunError, 'the process of --suites=unknown ended with code 1; its output is above.')])
def test_errors_of_a_suite_are_those_of_the_command(capfd, suite, error, message):
  with pytest.raises(error, match=message):
    _measure(suite)
  assert ("KeyError: 'unknown'" in capfd.readouterr().err) == (error is RunError)


_MEASURES = """
from uni_moe_jax.tools.bench import settings, suite_process
suite_process.measure('decoding', settings.FULL, None, 'float32')
"""


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGINT])
def test_a_suite_ends_with_the_command_however_that_ends(number):
  with subprocess.Popen([sys.executable, '-c', _MEASURES], cwd=processes.ROOT, stderr=subprocess.PIPE, text=True,
                        start_new_session=True) as command:
    while not (command.stderr.read(1)):  # the suite's name, when JAX is imported
      assert command.poll() is None
    started = processes.children(command.pid)
    assert started
    command.send_signal(number)
    try:
      command.wait(30)
    finally:
      command.kill()
  end = time.monotonic() + 30
  while any(map(processes.is_running, started)) and time.monotonic() < end:
    time.sleep(0.1)
  assert not any(map(processes.is_running, started))
