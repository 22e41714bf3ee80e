"""keep_running: what is started again, when, how often, and what becomes of signals. The command is a stand-in."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# Does what the next word of the file `script` says: an exit code, after `save:STEP`s and `drop:STEP`s; `kill`; `wait` (for SIGTERM,
# then 75).
_STAND_IN = '''
import os, pathlib, signal, sys, time
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
  folder.mkdir(parents=True) if what == 'save' else folder.rmdir()
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


def _start(folder, script, *flags, command=None):
  (folder / 'script').write_text(script)
  (folder / 'stand_in.py').write_text(_STAND_IN)
  command = command or [sys.executable, 'stand_in.py', '--workdir=run']
  return subprocess.Popen(
      [sys.executable, str(_ROOT / 'launch/keep_running.py'), *flags, '--', *command], cwd=folder, text=True,
      env={**os.environ, 'PYTHONPATH': str(_ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def _run(folder, script, *flags, **options):
  process = _start(folder, script, *flags, **options)
  out, err = process.communicate(timeout=30)
  starts = (folder / 'log').read_text().splitlines() if (folder / 'log').exists() else []
  return process.returncode, out + err, [float(line.split()[0]) for line in starts]


def _wait_for(path):
  end = time.monotonic() + 20
  while not path.exists():
    assert time.monotonic() < end, path
    time.sleep(.01)


@pytest.mark.parametrize('script, code, starts', [
    ('0', 0, 1),
    ('75 0', 0, 2),
    ('1 kill 0', 0, 3),
    ('2 0', 2, 1),  # a mistake in the command does not go away
    ('1 2 0', 0, 3), ('save:7,75 2 2 0', 0, 4),  # but the command was right: a disk may not be mounted yet
    ('75 2 2 0', 2, 3),
    ('1 1 1 0', 1, 3),  # the limit
    ('kill kill kill 0', 137, 3),
    ('75 75 75 0', 75, 3),  # preempted three times before it could save anything
    ('1 1 save:7,1 1 1 save:9,75 1 0', 0, 8),  # whoever gets further may go on for ever
])
def test_what_is_started_again(tmp_path, script, code, starts):
  got, said, times = _run(tmp_path, script, '--limit=3', '--wait=0')
  assert (got, len(times)) == (code, starts), said


def test_it_says_how_the_command_ended_and_how_far_it_had_come(tmp_path):
  _, said, _ = _run(tmp_path, 'save:7,kill save:9,75 1 1', '--limit=2', '--wait=0')
  lines = re.sub(r'after \d+ s', 'after 0 s', said).splitlines()
  assert 'killed by SIGKILL after 0 s, step 7 saved; starting it again in 0 s (0 of 2 starts in vain).' in lines[0]
  assert 'stopped by a signal after 0 s, step 9 saved' in lines[1]
  assert 'exit code 1 after 0 s, no checkpoint after that of step 9; starting' in lines[2] and '(1 of 2 starts in vain)' in lines[2]
  assert '2 starts in a row brought no newer checkpoint: given up' in lines[3]


def test_a_start_that_falls_back_to_an_older_checkpoint_brought_nothing(tmp_path):
  _, said, _ = _run(tmp_path, 'save:7,save:9,1 drop:9,75 save:8,1 1 1', '--limit=3', '--wait=0')
  assert re.findall(r'(\d) of 3 starts', said) == ['0', '1', '0', '1', '2']
  assert 'stopped by a signal after 0 s, no checkpoint after that of step 7' in said


def test_a_command_without_a_workdir_is_said_to_have_none(tmp_path):
  code, said, starts = _run(tmp_path, '75 75 75', '--limit=2', '--wait=0', command=[sys.executable, 'stand_in.py'])
  assert (code, len(starts)) == (75, 2)
  assert said.count('no --workdir in the command that would say how far it came') == 2


@pytest.mark.skipif(sys.platform != 'linux', reason="it is Linux's prctl")
def test_a_command_whose_keeper_is_killed_is_asked_to_stop(tmp_path):
  process = _start(tmp_path, 'wait 0')
  _wait_for(tmp_path / 'started')
  process.kill()
  _wait_for(tmp_path / 'received')
  process.communicate(timeout=10)
  assert (tmp_path / 'received').read_text() == '1'
  assert len((tmp_path / 'log').read_text().splitlines()) == 1


def test_pauses_double_with_crashes_in_a_row(tmp_path):
  _, said, times = _run(tmp_path, '1 1 1 save:3,1 1 0', '--limit=4', '--wait=.2')
  assert [line.split(' in ')[1].split(' s')[0] for line in said.splitlines()] == ['0.2', '0.4', '0.8', '0.2', '0.2']
  assert times[3] - times[2] >= 0.8


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_command_once_and_nothing_is_started_again(tmp_path, number):
  process = _start(tmp_path, 'wait 0')
  _wait_for(tmp_path / 'started')
  os.killpg(process.pid, number)  # as a terminal does
  process.communicate(timeout=30)
  assert process.returncode == 75
  assert (tmp_path / 'received').read_text() == '1'
  assert len((tmp_path / 'log').read_text().splitlines()) == 1


def test_a_signal_in_a_pause_ends_it(tmp_path):
  process = _start(tmp_path, '1 0', '--wait=60')
  assert 'starting it again in 60 s' in process.stdout.readline()
  process.terminate()
  process.communicate(timeout=10)
  assert process.returncode == 75


@pytest.mark.parametrize('flags, command, said', [
    (['--limit=0'], None, 'limit'), ([], ['/no/program'], "'/no/program' is no program"), ([], [''], 'is no program')])
def test_mistakes_are_one_sentence(tmp_path, flags, command, said):
  code, got, starts = _run(tmp_path, '0', *flags, command=command)
  assert code == 2 and said in got and got.startswith('error: ') and not starts
