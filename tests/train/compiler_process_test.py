"""A run whose steps another process compiles."""

import signal
import sys

import jax
import pytest

from tests.helpers import saved_run, tiny
from uni_moe_jax.train import compiler_process, loop
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train import step as step_lib
from uni_moe_jax.train.compiler_process import CompilerProcess
from uni_moe_jax.utils import heap
from uni_moe_jax.utils.errors import UsageError


def _python(code):
  return [sys.executable, '-S', '-c', code]


def _config():
  c = tiny.config('shape', data_dir=tiny.data_dir())
  c.model.num_layers = 1
  c.train.steps = 2
  return c


def test_waiting_ends_with_the_process_and_reports_its_failure(capsys):
  with CompilerProcess(_python('import time; time.sleep(0.5)')) as compiler:
    compiler.wait(lambda: False)
    assert compiler._child.returncode == 0
  assert capsys.readouterr().err == ''
  with CompilerProcess(_python('raise SystemExit(3)')) as compiler:
    compiler.wait(lambda: False)
  assert capsys.readouterr().err == 'the process that compiles ended with exit code 3; this one compiles instead\n'


def test_a_stop_ends_the_process(capsys):
  with CompilerProcess(_python('import time; time.sleep(60)')) as compiler:
    compiler.wait(lambda: True)
    assert compiler._child.returncode == -signal.SIGTERM
  assert capsys.readouterr().err == ''


def test_an_error_meanwhile_ends_the_process():
  with pytest.raises(ZeroDivisionError), CompilerProcess(_python('import time; time.sleep(60)')) as compiler:
    1 / 0  # noqa: B018
  assert compiler._child.returncode == -signal.SIGTERM


def test_it_starts_where_jax_has_a_cache_and_no_accelerator(monkeypatch):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '/some/folder')
  monkeypatch.setattr(heap, 'only_cpu', lambda: True)
  with compiler_process.start(_python('')) as compiler:
    compiler.wait(lambda: False)
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  with pytest.raises(UsageError, match='--compile_separately: set the environment variable JAX_COMPILATION_CACHE_DIR'):
    compiler_process.start(_python(''))
  monkeypatch.setattr(heap, 'only_cpu', lambda: False)
  assert compiler_process.start(_python('')) is None


@pytest.mark.parametrize('platforms, only_cpu', [('cpu', True), ('cuda,cpu', False), ('tpu', False)])
def test_the_platforms_of_jax_say_whether_there_may_be_an_accelerator(monkeypatch, platforms, only_cpu):
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  assert heap.only_cpu() == only_cpu


class _Compiler:
  """In place of a process: appends `event` to `events` when it is waited for."""

  def __init__(self, events, stops=None):
    self._events, self._stops = events, stops

  def wait(self, stops):
    self._events.append('waited')
    if self._stops is not None:
      self._stops()
      assert stops()


def test_the_first_step_is_traced_once_before_the_run_waits(tmp_path, monkeypatch):
  events, train_step, take = [], step_lib.train_step, loop._Trainer._take
  monkeypatch.setattr(step_lib, 'train_step', lambda *a, **k: events.append('traced') or train_step(*a, **k))
  monkeypatch.setattr(loop._Trainer, '_take', lambda *a: events.append('step') or take(*a))
  compiler = _Compiler(events)
  assert loop.train(_config(), str(tmp_path / 'separately'), jax.devices()[:1], compiler=compiler) == loop.FINISHED
  assert events == ['traced', 'waited', 'step', 'step']
  events.clear()
  assert loop.train(_config(), str(tmp_path / 'alone'), jax.devices()[:1]) == loop.FINISHED
  assert events == ['step', 'traced', 'step']
  assert saved_run.lines(tmp_path / 'separately') == saved_run.lines(tmp_path / 'alone')


def test_a_stop_while_the_run_waits_takes_no_step(tmp_path, capsys):
  events = []
  compiler = _Compiler(events, lambda: signal.raise_signal(signal.SIGTERM))
  assert loop.train(_config(), str(tmp_path), jax.devices()[:1], compiler=compiler) == loop.PREEMPTED
  assert events == ['waited'] and 'stopped at step 0 of 2' in capsys.readouterr().out
  assert not saved_run.lines(tmp_path)
  assert loop.train(_config(), str(tmp_path), jax.devices()[:1]) == loop.FINISHED  # the positive control
  assert [line['step'] for line in saved_run.lines(tmp_path)] == [1, 2]


def test_the_program_of_the_process_is_that_of_the_run(tmp_path):
  """What `compile_steps` lowers, from shapes of the state, is what the loop lowers, from the state."""
  run = train_run.build(_config(), jax.devices()[:1])
  task, batch = next(run.mixture().iterate(0, 1))
  step, arguments = run.step_fn(task), (run.put_batch(batch), run.target_sets())
  texts = [step.lower(state, *arguments).as_text() for state in (run.abstract_state(), run.init())]
  assert texts[0] == texts[1]
