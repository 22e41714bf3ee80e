"""An environment is made once per list of packages; a package that cannot be installed is one sentence."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
import venv

import pytest

from tests.helpers import processes, stand_in
from uni_moe_jax.cli import environments
from uni_moe_jax.io import locks
from uni_moe_jax.utils.errors import RunError


@pytest.fixture(name='commands')
def _commands(tmp_path, monkeypatch):
  """Commands that were run, in place of running them; one that contains 'broken' fails."""
  run = []
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setattr(venv, 'create', lambda folder, with_pip: run.append(['venv', folder]))
  monkeypatch.setattr(subprocess, 'run', lambda command, **_: run.append(command) or types.SimpleNamespace(
      returncode=int('broken' in command)))
  return run


def test_an_environment_is_made_once(commands, tmp_path, capsys):
  interpreter = environments.python('tool', 'Tool', '1 GB', ['a==1', 'b'], ['--no-deps', 'c'])
  folder = pathlib.Path(interpreter).parents[1]
  assert folder.parent == tmp_path / '.cache/uni_moe_jax/tool'
  assert commands[0] == ['venv', folder] and [c[-2:] for c in commands[1:]] == [['a==1', 'b'], ['--no-deps', 'c']]
  assert capsys.readouterr().out == f'making an environment for Tool in {folder} (about 1 GB)\n'
  assert environments.python('tool', 'Tool', '1 GB', ['a==1', 'b'], ['--no-deps', 'c']) == interpreter
  assert len(commands) == 3
  assert environments.python('tool', 'Tool', '1 GB', ['a==2']) != interpreter  # other packages


def test_a_complete_environment_needs_no_lock_and_one_that_is_made_does(commands):
  folder = pathlib.Path(environments.python('tool', 'Tool', '1 GB', ['a==1'])).parents[1]
  with contextlib.ExitStack() as stack:
    assert locks.lock(folder, stack) is None
    assert environments.python('tool', 'Tool', '1 GB', ['a==1']) == str(folder / 'bin/python')
    (folder / 'complete').unlink()
    with pytest.raises(RunError, match='is being made by another process'):
      environments.python('tool', 'Tool', '1 GB', ['a==1'])


def test_a_package_that_cannot_be_installed_is_one_sentence_and_the_next_attempt_starts_anew(commands):
  for _ in range(2):
    with pytest.raises(RunError, match=r'for Tool could not be made in .*, see above; check that pip can'):
      environments.python('tool', 'Tool', '1 GB', ['broken'])
  assert len(commands) == 4


@pytest.mark.parametrize('number, code', [
    (signal.SIGTERM, 75), (signal.SIGINT, 1), (signal.SIGKILL, -9)])  # timeit ends with 1 itself
def test_a_signal_ends_the_program_too(tmp_path, number, code):
  # Whether it imports nothing from the current folder.
  written = 'f"{os.getpid()} {sys.flags.safe_path} " + os.environ["JAX_PLATFORMS"]'
  setup = f'import os, sys, time; open({str(tmp_path / "started")!r}, "w").write({written})'
  script = f"""
import os, sys, warnings
from uni_moe_jax.cli import environments
os.register_at_fork(before=lambda: warnings.warn('os.fork() was called. …', RuntimeWarning))  # as JAX does
sys.exit(environments.run(sys.executable, 'timeit', '-n1', '-r1', '-s', {setup!r}, 'time.sleep(60)'))"""
  started = subprocess.Popen([sys.executable, '-c', script], env={
      **os.environ, 'PYTHONPATH': str(processes.ROOT), 'JAX_PLATFORMS': 'cuda'}, stderr=subprocess.PIPE, text=True)
  stand_in.wait_for(tmp_path / 'started', started, seconds=60)
  while not (text := (tmp_path / 'started').read_text()):
    time.sleep(.01)
  pid, is_safe, platforms = text.split()
  assert (is_safe, platforms) == ('True', 'cpu')
  started.send_signal(number)
  assert started.wait(30) == code
  end = time.monotonic() + (5 if number == signal.SIGKILL else 0)  # to which the program is not waited for
  while (is_running := processes.is_running(int(pid))) and time.monotonic() < end:
    time.sleep(.01)
  assert not is_running and 'fork' not in started.stderr.read()
