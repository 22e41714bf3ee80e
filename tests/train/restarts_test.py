"""keep_running: what is restarted, when, how often, and how signals are handled. The command is a stand-in."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import stand_in
from tests.helpers.processes import ROOT

# Executes the next word of the file `script`: an exit code, after `save:STEP`s and `drop:STEP`s; `kill`; `wait` (for
# SIGTERM, then exit code 75).
_STAND_IN = '''
import os, pathlib, shutil, signal, sys, time
words = pathlib.Path('script').read_text().split()
pathlib.Path('script').write_text(' '.join(words[1:]))
with open('log', 'a') as log:
  log.write(f'{time.monotonic()} {words[0]}\\n')
received = []
signal.signal(signal.SIGTERM, lambda *_: received.append(1))
*saves, last = words[0].split(',')
for save in saves:
  what, _, step = save.partition(':')
  folder = pathlib.Path('run/checkpoints', step)
  if what == 'save':
    folder.mkdir(parents=True)
    (folder / 'commit_success.txt').write_text('committed')
  else:
    shutil.rmtree(folder)
if last == 'kill':
  os.kill(os.getpid(), signal.SIGKILL)
if last == 'wait':
  pathlib.Path('started').touch()
  end = time.monotonic() + 20
  while not received and time.monotonic() < end:
    time.sleep(.01)
  time.sleep(.1)  # a second signal would be seen
  pathlib.Path('received').write_text(str(len(received)))
  sys.exit(75)
sys.exit(int(last))
'''


def _start(folder, script, *flags, command=None, before=()):
  (folder / 'script').write_text(script)
  (folder / 'stand_in.py').write_text(_STAND_IN)
  command = command or [sys.executable, 'stand_in.py', '--workdir=run']
  return subprocess.Popen(
      [*before, sys.executable, str(ROOT / 'launch/keep_running.py'), *flags, '--', *command], cwd=folder, text=True,
      env={**os.environ, 'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      start_new_session=True,  # and no nohup of these tests, which ignores SIGHUP
      preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))


def _run(folder, script, *flags, **options):
  process = _start(folder, script, *flags, **options)
  out, err = process.communicate(timeout=30)
  starts = (folder / 'log').read_text().splitlines() if (folder / 'log').exists() else []
  return process.returncode, out + err, [float(line.split()[0]) for line in starts]


@pytest.mark.parametrize('script, code, starts', [
    ('0', 0, 1),
    ('75 0', 0, 2),
    ('1 kill 0', 0, 3),
    ('2 0', 2, 1),  # a mistake in the command is final
    ('1 2 0', 0, 3), ('save:7,75 2 2 0', 0, 4),  # but this command worked: a disk may not be mounted yet
    ('75 2 2 0', 2, 3),
    ('1 1 1 0', 1, 3),  # the limit
    ('kill kill kill 0', 137, 3),
    ('75 75 75 0', 75, 3),  # preempted three times before it could save anything
    ('1 1 save:7,1 1 1 save:9,75 1 0', 0, 8),  # with progress, restarts are unlimited
])
def test_which_commands_are_restarted(tmp_path, script, code, starts):
  exit_code, output, times = _run(tmp_path, script, '--max_restarts=3', '--backoff=0')
  assert (exit_code, len(times)) == (code, starts), output


def test_each_restart_reports_how_the_command_ended_and_its_progress(tmp_path):
  _, output, _ = _run(tmp_path, 'save:7,kill save:9,75 1 1', '--max_restarts=2', '--backoff=0')
  lines = re.sub(r'after \d+ s,', 'after 0 s,', output).splitlines()
  assert 'killed by SIGKILL after 0 s, step 7 saved; restarting in 0 s (0 of 2 starts without progress).' in lines[0]
  assert 'stopped by a signal after 0 s, step 9 saved' in lines[1]
  assert 'exit code 1 after 0 s, no checkpoint after that of step 9; restarting' in lines[2]
  assert '(1 of 2 starts without progress)' in lines[2]
  assert 'giving up after 2 starts in a row without a newer checkpoint' in lines[3]


def test_a_start_that_falls_back_to_an_older_checkpoint_makes_no_progress(tmp_path):
  _, output, _ = _run(tmp_path, 'save:7,save:9,1 drop:9,75 save:8,1 1 1', '--max_restarts=3', '--backoff=0')
  assert re.findall(r'(\d) of 3 starts', output) == ['0', '1', '0', '1', '2']
  assert re.search(r'stopped by a signal after \d+ s, no checkpoint after that of step 7', output)


def test_a_disk_that_cannot_be_listed_is_noted_and_does_not_end_the_restarts(tmp_path):
  command = [sys.executable, 'stand_in.py', f'--workdir={"x" * 300}']
  code, output, starts = _run(tmp_path, '1 0', '--max_restarts=3', '--backoff=0', command=command)
  assert (code, len(starts)) == (0, 2), output
  assert 'keep_running: the checkpoints in xxx' in output and 'File name too long' in output
  assert 'exit code 1 after ' in output and 'restarting in 0 s (1 of 3 starts without progress)' in output


def test_a_program_that_is_gone_after_it_has_worked_is_started_again_up_to_the_limit(tmp_path):
  program = tmp_path / 'program'
  program.write_text('#!/bin/sh\nrm "$0"\nexit 1\n')
  program.chmod(0o755)
  code, output, _ = _run(tmp_path, '', '--max_restarts=3', '--backoff=0', command=[str(program)])
  assert code == 2 and output.count(f"'{program}' is no program that can be started (No such file or directory)") == 2
  assert 'giving up after 3 starts' in output and 'error: ' not in output


def test_without_a_workdir_progress_is_unknown(tmp_path):
  command = [sys.executable, 'stand_in.py']
  code, output, starts = _run(tmp_path, '75 75 75', '--max_restarts=2', '--backoff=0', command=command)
  assert (code, len(starts)) == (75, 2)
  assert output.count('progress unknown: the command has no --workdir') == 2


@pytest.mark.skipif(sys.platform != 'linux', reason="it is Linux's prctl")
def test_the_command_is_terminated_when_keep_running_is_killed(tmp_path):
  process = _start(tmp_path, 'wait 0')
  stand_in.wait_for(tmp_path / 'started')
  process.kill()
  stand_in.wait_for(tmp_path / 'received')
  process.communicate(timeout=10)
  assert (tmp_path / 'received').read_text() == '1'
  assert len((tmp_path / 'log').read_text().splitlines()) == 1


def test_pauses_double_with_crashes_in_a_row(tmp_path):
  _, output, times = _run(tmp_path, '1 1 1 save:3,1 1 0', '--max_restarts=4', '--backoff=.2')
  assert [line.split(' in ')[1].split(' s')[0] for line in output.splitlines()] == ['0.2', '0.4', '0.8', '0.2', '0.2']
  assert times[3] - times[2] >= 0.8


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_command_once_and_prevents_a_restart(tmp_path, number):
  process = _start(tmp_path, 'wait 0')
  stand_in.wait_for(tmp_path / 'started')
  os.killpg(process.pid, number)  # as a terminal does
  process.communicate(timeout=30)
  assert process.returncode == 75
  assert (tmp_path / 'received').read_text() == '1'
  assert len((tmp_path / 'log').read_text().splitlines()) == 1


@pytest.mark.parametrize('number, stops', [(signal.SIGHUP, False), (signal.SIGTERM, True)])
def test_after_nohup_the_end_of_the_terminal_stops_nothing_but_sigterm_does(tmp_path, number, stops):
  process = _start(tmp_path, 'wait 0', before=('nohup',))
  stand_in.wait_for(tmp_path / 'started')
  os.killpg(process.pid, number)
  if not stops:
    time.sleep(.3)  # in which the command would be stopped
    assert process.poll() is None and not (tmp_path / 'received').exists()
    process.terminate()
  process.communicate(timeout=30)
  assert process.returncode == 75 and (tmp_path / 'received').read_text() == '1'


def test_a_signal_ends_a_pause(tmp_path):
  process = _start(tmp_path, '1 0', '--backoff=60')
  assert 'restarting in 60 s' in process.stdout.readline()
  process.terminate()
  process.communicate(timeout=10)
  assert process.returncode == 75


@pytest.mark.parametrize('flags, command, message', [
    (['--max_restarts=0'], None, 'max_restarts'), ([], ['/no/program'], "'/no/program' is no program"),
    ([], [''], 'is no program')])
def test_mistakes_are_one_sentence(tmp_path, flags, command, message):
  code, errors, starts = _run(tmp_path, '0', *flags, command=command)
  assert code == 2 and message in errors and errors.startswith('error: ') and not starts
