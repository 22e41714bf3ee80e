"""Tasks run in processes that do not run their program again, and that leave no hang behind."""

import contextlib
import functools
import os
import subprocess
import sys
import types

import pytest

from tests.helpers import processes
from uni_moe_jax.utils import workers
from uni_moe_jax.utils.errors import RunError

# It has no `if __name__ == '__main__'`, as is usual in scripts and never in a notebook.
_PROGRAM = '''
import functools, os
from uni_moe_jax.utils import workers
print('program', os.getpid(), flush=True)
# By one call each: several processes write to this pipe, and `print` may write a line in parts.
task = functools.partial(eval, "(o := __import__('os')).write(1, f'task {o.getpid()}{o.linesep}'.encode()) and 1")
workers.run([task] * 6, 6, None, 2)
'''


def test_a_program_without_a_guard_runs_once_and_its_tasks_elsewhere(tmp_path):
  (tmp_path / 'program.py').write_text(_PROGRAM)
  [(code, output)] = processes.together([sys.executable, str(tmp_path / 'program.py')], timeout=60)
  assert code == 0, output
  what, pids = zip(*map(str.split, output.splitlines()), strict=True)
  assert what == ('program', *['task'] * 6)
  assert len({*pids[1:]}) == 2 and pids[0] not in pids[1:]


def test_files_of_the_current_folder_are_no_modules_of_a_worker(tmp_path):
  (tmp_path / 'pickle.py').write_text('raise SystemExit("a file of the user")')
  with contextlib.chdir(tmp_path):
    assert subprocess.run([sys.executable, '-m', 'pickle'], capture_output=True, check=False).returncode  # it would be
    workers.run([functools.partial(int, '1')] * 2, 2, None, 2)


@pytest.mark.parametrize('num_workers', [1, 2])
def test_an_error_of_a_task_is_raised_and_ends_all(num_workers):
  others = processes.children('self')
  with pytest.raises(ValueError, match="invalid literal for int.*'three'") as raised:
    workers.run([functools.partial(int, text) for text in ('1', '2', 'three', '4', '5')], 5, None, num_workers)
  # Where it was raised in another process is a note.
  assert [note.count('Traceback') for note in getattr(raised.value, '__notes__', [])] == [1] * (num_workers - 1)
  assert processes.children('self') <= others


def test_a_process_that_ends_is_an_error_and_no_hang():
  others = processes.children('self')
  with pytest.raises(RunError, match='a worker process ended with exit code 3 .* fewer processes, --num_workers'):
    workers.run([functools.partial(os._exit, 3)] * 2, 2, None, 2)
  assert processes.children('self') <= others


def test_progress_has_rows_per_second_and_the_time_left(monkeypatch, capsys):
  times = iter([0., 5., 20.])
  monkeypatch.setattr(workers, 'time', types.SimpleNamespace(monotonic=lambda: next(times)))
  workers.run([lambda: 1000, lambda: 500], 4, 'read', 1)
  assert capsys.readouterr().out == 'read 1,500 rows, 75 rows/s, part 2 of 4, 0.3 min left\n'


_SLEEPS = '''
import functools
from uni_moe_jax.utils import workers
task = functools.partial(eval, "print('started', flush=True) or __import__('time').sleep(100)")
workers.run([task] * 3, 3, None, 2)
'''


def test_workers_end_when_their_process_is_killed(tmp_path):
  (tmp_path / 'program.py').write_text(_SLEEPS)
  process = subprocess.Popen([sys.executable, str(tmp_path / 'program.py')], stdout=subprocess.PIPE,
                             env=processes.environment(1))
  assert [process.stdout.readline() for _ in range(2)] == [b'started\n'] * 2
  process.kill()
  process.communicate(timeout=60)  # its output ends when the last process that has the pipe ends
