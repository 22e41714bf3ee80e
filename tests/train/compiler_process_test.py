"""A run whose steps another process compiles."""

import os
import pathlib
import signal
import sys

import jax
import pytest

from tests.helpers import in_process, processes, saved_run, tiny
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.train import compiler_process, loop, workdir
from uni_moe_jax.train.compiler_process import CompilerProcess
from uni_moe_jax.utils import heap

_SCRIPT = processes.ROOT / 'launch/train.py'


def _python(code):
  return [sys.executable, '-S', '-c', code]


def _config():
  c = tiny.config('shape', data_dir=tiny.data_dir())
  c.model.num_layers = 1
  c.train.steps = 2
  return c


def test_waiting_ends_with_the_process(capsys):
  with CompilerProcess(_python('import time; time.sleep(0.5)')) as compiler:
    compiler.wait(lambda: False)
    assert compiler._child.returncode == 0
  assert capsys.readouterr().err == ''


@pytest.mark.parametrize('code, printed', [(1, 'Traceback'), (2, '')])
def test_a_failure_is_shown_but_for_a_mistake_of_the_user_which_this_process_reports(capfd, code, printed):
  with CompilerProcess(_python(f'import sys; sys.stderr.write("Traceback\\n"); sys.exit({code})')) as compiler:
    compiler.wait(lambda: False)
  assert capfd.readouterr().err.splitlines() == [
      *[printed][:bool(printed)], f'the process that compiles ended with exit code {code}; this one compiles instead']


def test_a_failure_is_not_shown_when_the_run_stops(capfd):
  with CompilerProcess(_python('raise SystemExit(75)')) as compiler:
    compiler._child.wait()
    compiler.wait(lambda: True)
  assert capfd.readouterr().err == ''


# Like a command in XLA's compiler: Python's handler of SIGTERM does not run.
_BUSY = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)'


def test_a_stop_ends_the_process_at_once(capfd):
  with CompilerProcess(_python(_BUSY)) as compiler:
    compiler.wait(lambda: capfd.readouterr().out == '1\n')
    assert compiler._child.returncode == -signal.SIGKILL
  assert capfd.readouterr().err == ''


def test_an_error_meanwhile_ends_the_process():
  with pytest.raises(ZeroDivisionError), CompilerProcess(_python('import time; time.sleep(60)')) as compiler:
    1 / 0  # noqa: B018
  assert compiler._child.returncode == -signal.SIGKILL


def test_it_starts_where_jax_can_only_use_the_cpu(monkeypatch, capfd):
  with compiler_process.start(_python('')) as compiler:  # the platform of the tests
    compiler.wait(lambda: False)
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda,cpu')
  assert compiler_process.start(_python('')) is None
  assert 'set JAX_PLATFORMS=cpu; steps are faster with it.\n' in capfd.readouterr().err


def test_without_a_cache_both_processes_use_a_folder_that_is_removed(monkeypatch, capfd):
  printed = 'import os; print(os.environ["JAX_COMPILATION_CACHE_DIR"])'
  folder = os.environ['JAX_COMPILATION_CACHE_DIR']
  with CompilerProcess(_python(printed)) as compiler:
    compiler.wait(lambda: False)
  assert capfd.readouterr().out == f'{folder}\n' and os.environ['JAX_COMPILATION_CACHE_DIR'] == folder
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  with CompilerProcess(_python(printed)) as compiler:
    compiler.wait(lambda: False)
    folder = os.environ['JAX_COMPILATION_CACHE_DIR']
    assert capfd.readouterr().out == f'{folder}\n' and pathlib.Path(folder).is_dir()
  assert 'JAX_COMPILATION_CACHE_DIR' not in os.environ and not pathlib.Path(folder).exists()


class _Compiler:
  """In place of a process: appends `event` to `events` when it is waited for."""

  def __init__(self, events, stops=None):
    self._events, self._stops = events, stops

  def wait(self, stops):
    self._events.append('waited')
    if self._stops is not None:
      self._stops()
      assert stops()


@pytest.fixture(name='stopped')
def _stopped(tmp_path_factory, capsys):
  """A run that was stopped while it waited."""
  workdir, events = tmp_path_factory.mktemp('stopped'), []
  compiler = _Compiler(events, lambda: signal.raise_signal(signal.SIGTERM))
  assert loop.train(_config(), str(workdir), jax.devices()[:1], compiler=compiler) == loop.PREEMPTED
  assert events == ['waited'] and 'stopped at step 0 of 2' in capsys.readouterr().out
  assert not saved_run.lines(workdir)
  return workdir


@pytest.mark.nightly
def test_a_run_that_waits_for_its_steps_ends_like_one_that_compiles_them(stopped, tmp_path):
  events = []
  assert loop.train(_config(), str(stopped), jax.devices()[:1], compiler=_Compiler(events)) == loop.FINISHED
  assert events == ['waited']
  assert loop.train(_config(), str(tmp_path), jax.devices()[:1]) == loop.FINISHED
  assert saved_run.lines(stopped) == saved_run.lines(tmp_path)
  assert [line['step'] for line in saved_run.lines(tmp_path)] == [1, 2]


@pytest.fixture(name='config_flag')
def _config_flag(tmp_path):
  return tiny.write_config(tmp_path / 'c.py', 'shape')


@pytest.fixture(name='started')
def _started(monkeypatch):
  """Commands that would compile, and whether threads share an arena; nothing is compiled, and no step taken."""
  started = []
  monkeypatch.setattr(compiler_process, 'start', started.append)
  monkeypatch.setattr(heap, 'share_arena', lambda: started.append('shared'))
  monkeypatch.setattr(loop, 'train', lambda *_, **options: started.append(options['compiler']) or loop.FINISHED)
  return started


def test_another_process_gets_the_command_of_the_run_and_compiles_only(started, config_flag, tmp_path):
  flags = config_flag, f'--workdir={tmp_path / "run"}'
  assert in_process.run(_SCRIPT, *flags, '--compile_separately') == loop.FINISHED
  command = [sys.executable, str(_SCRIPT), *flags, '--compile_separately', '--compile_only']
  assert started == ['shared', command, None]
  started.clear()
  assert in_process.run(_SCRIPT, *flags) == loop.FINISHED and started == ['shared', None]


def test_a_finished_run_and_one_that_compiles_only_start_no_process(started, config_flag, tmp_path, capfd):
  flags = config_flag, f'--workdir={tmp_path / "run"}', '--compile_separately'
  workdir.claim_workdir(tmp_path / 'run', cli.config_from(config_flag.removeprefix('--config='), []), 'print')
  (tmp_path / 'run/checkpoints/6').mkdir(parents=True)
  (tmp_path / 'run/checkpoints/6/commit_success.txt').write_text('committed')
  assert in_process.run(_SCRIPT, *flags, '--compile_only') == loop.FINISHED
  assert started == [] and 'is finished: nothing to compile' in capfd.readouterr().out  # it would share no arena
  assert in_process.run(_SCRIPT, *flags) == loop.FINISHED and started == ['shared', None]


def test_several_processes_are_refused_before_they_meet(started, config_flag, tmp_path, capfd):
  flags = config_flag, f'--workdir={tmp_path / "run"}', '--compile_separately', '--distributed=auto'
  assert in_process.run(_SCRIPT, *flags) == 2
  assert capfd.readouterr().err == 'error: --compile_separately is for a run of one process; remove it.\n'
  assert started == ['shared'] and not (tmp_path / 'run').exists()


@pytest.mark.nightly
def test_a_run_reads_the_program_that_the_other_process_has_compiled(config_flag, tmp_path):
  cache = tmp_path / 'cache'
  output = processes.run([
      'env', f'JAX_COMPILATION_CACHE_DIR={cache}', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0', sys.executable,
      str(_SCRIPT), config_flag, '--compile_separately', f'--workdir={tmp_path / "run"}'], devices=1)
  assert output.index('compiled after') < output.index('first step after') and 'trained 6 steps' in output
  steps = [file.name for file in cache.iterdir() if file.name.startswith('jit_step-') and file.name.endswith('-cache')]
  assert len(steps) == 1
