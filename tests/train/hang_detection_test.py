"""The hang_detection ends a phase that hangs, says which and where, and nothing else."""

import subprocess
import sys
import time

from uni_moe_jax.train import hang_detection

_HANGS = '''
import time
from uni_moe_jax.train import hang_detection

def a_disk_that_does_not_answer():
  time.sleep(60)

with hang_detection.HangDetector({limit}) as dog:
  for step in range(3):
    with dog.phase(hang_detection.BATCH, step):
      time.sleep(.05)
  with dog.phase(hang_detection.{phase}{step}):
    a_disk_that_does_not_answer()
'''


def _run(phase, step=', 7', limit=.4):
  program = _HANGS.format(limit=limit, phase=phase, step=step)
  return subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=30)


def test_a_hanging_batch_ends_the_process_with_the_phase_the_seconds_and_the_stack():
  done = _run('BATCH')
  assert done.returncode == 1
  assert 'error: waiting for the batch of step 7 has taken 0 s, and config.train.hang_timeout=0.4 is the limit' in done.stderr
  assert 'where the data lies' in done.stderr and 'in a_disk_that_does_not_answer' in done.stderr


def test_a_hanging_step_points_at_devices_and_other_processes():
  assert 'waiting for the result of step 7' in (said := _run('STEP').stderr) and 'logs of the other processes' in said


def test_a_hanging_start_is_told_with_its_longer_limit():
  said = _run('START', step='', limit=.1).stderr
  assert 'error: starting has taken 1 s, and 6 times config.train.hang_timeout=0.1 is the limit' in said
  assert 'where the data and the work directory lie' in said and 'in a_disk_that_does_not_answer' in said


def _watched(limit, body, monkeypatch):
  """Exit codes that a hang_detection gave while `body(dog)` ran."""
  codes = []
  monkeypatch.setattr(hang_detection.HangDetector, '_complain', lambda dog, *_: codes.append(1))
  with hang_detection.HangDetector(limit) as dog:
    body(dog)
  return codes


def _wait_in_phase(dog):
  with dog.phase(hang_detection.STEP, 1):
    time.sleep(.5)


def test_each_phase_has_the_whole_limit(monkeypatch):
  def short_ones(dog):
    for step in range(10):
      with dog.phase(hang_detection.STEP, step):
        time.sleep(.05)

  assert _watched(.3, short_ones, monkeypatch) == []
  assert _watched(.3, _wait_in_phase, monkeypatch) == [1]  # the positive control


def test_a_start_may_take_six_times_as_long(monkeypatch):
  def start(seconds):
    def body(dog):
      with dog.phase(hang_detection.START):
        time.sleep(seconds)
    return body

  assert _watched(.2, start(.6), monkeypatch) == []
  assert _watched(.1, start(1.2), monkeypatch) == [1]


def test_outside_of_phases_and_without_a_limit_nothing_is_watched(monkeypatch):
  assert _watched(.2, lambda _: time.sleep(.5), monkeypatch) == []
  assert _watched(0, _wait_in_phase, monkeypatch) == []


def test_a_process_that_was_stopped_and_goes_on_did_not_hang(monkeypatch):
  plain, leap = time.monotonic, [0.]
  monkeypatch.setattr(hang_detection.time, 'monotonic', lambda: plain() + leap[0])

  def sleep_of_the_machine(dog):
    with dog.phase(hang_detection.STEP, 1):
      time.sleep(.1)
      leap[0] = 1000.
      time.sleep(.1)

  assert _watched(.6, sleep_of_the_machine, monkeypatch) == []
