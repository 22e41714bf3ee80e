"""Hang detection ends a phase that hangs with a report, and nothing else."""

import re
import subprocess
import sys
import threading
import time

import pytest

from uni_moe_jax.train.hang_detection import BATCH, EVALUATE, RESTORE, SAVE, START, STEP, HangDetector

_HANGS = '''
import time
from uni_moe_jax.train import hang_detection

def read_from_an_unresponsive_disk():
  time.sleep(60)

with hang_detection.HangDetector({timeout}) as detector:
  for step in range(3):
    with detector.phase(hang_detection.BATCH, step):
      time.sleep(.05)
  with detector.phase(hang_detection.{phase}):
    read_from_an_unresponsive_disk()
'''


@pytest.mark.parametrize('phase, timeout, messages', [
    ('BATCH, 7', .4, (r'error: waiting for the batch of step 7 has taken \d+ s; the limit is '
                      r'config\.train\.hang_timeout=0\.4\.', 'Check the disk or network of the data')),
    ('STEP, 7', .4, ('waiting for the result of step 7', 'logs of the other processes')),
    ('START', .1, (r'error: starting has taken \d+ s; the limit is 6 times config\.train\.hang_timeout=0\.1\.',
                   'disk or network of the data and the work directory'))])
def test_a_hanging_phase_ends_the_process_with_phase_duration_advice_and_stack(phase, timeout, messages):
  program = _HANGS.format(timeout=timeout, phase=phase)
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=30)
  assert done.returncode == 1
  for message in (*messages, 'in read_from_an_unresponsive_disk'):
    assert re.search(message, done.stderr)


def _reports(timeout, body):
  """Exit codes after the hangs that are reported while `body(detector)` runs."""
  codes = []
  with HangDetector(timeout, end=codes.append) as detector:
    body(detector)
  return codes


def _is_reported(timeout, *phase, **options):
  reported = threading.Event()
  with HangDetector(timeout, end=lambda code: reported.set(), **options) as detector, detector.phase(*phase):
    return reported.wait(20)


def _sleep_in(seconds, *phase):
  def body(detector):
    with detector.phase(*phase):
      time.sleep(seconds)
  return body


def test_each_phase_has_the_whole_timeout():
  def short_phases(detector):
    for step in range(10):
      _sleep_in(.05, STEP, step)(detector)

  assert _reports(.3, short_phases) == []
  assert _is_reported(.3, STEP, 1)  # the positive control


def test_starting_and_restoring_and_an_evaluator_may_take_six_times_as_long():
  assert _is_reported(.1, START)
  for phase in (START, RESTORE, EVALUATE):
    assert _reports(.2, _sleep_in(.6, phase)) == []


def test_outside_of_phases_and_without_a_timeout_nothing_is_watched():
  assert _reports(.2, lambda _: time.sleep(.5)) == []
  assert _reports(0, _sleep_in(.5, STEP, 1)) == []


_SUSPENDED = '''
import os, signal, subprocess, time
from uni_moe_jax.train import hang_detection

with hang_detection.HangDetector(1) as detector, detector.phase(hang_detection.STEP, 1):
  subprocess.Popen(['sh', '-c', f'sleep 2; kill -CONT {os.getpid()}'])
  os.kill(os.getpid(), signal.SIGSTOP)
  time.sleep(.2)
'''


def test_a_process_that_was_suspended_does_not_hang():
  done = subprocess.run([sys.executable, '-c', _SUSPENDED], capture_output=True, text=True, timeout=30)
  assert (done.returncode, done.stderr) == (0, '')


def test_a_long_wait_for_a_bucket_is_noted_with_its_address_and_then_less_and_less_often(capfd):
  with HangDetector(60, {SAVE: 'gs://bucket/run'}, note_after=.1) as detector:
    for phase, seconds in ((SAVE, .05), (BATCH, .3), (SAVE, .9)):
      with detector.phase(phase, 7):
        time.sleep(seconds)
  lines = capfd.readouterr().err.splitlines()
  assert 1 <= len(lines) <= 4 and all(line.startswith('waiting for gs://bucket/run: saving of step 7 has taken ')
                                      for line in lines)


def test_the_report_names_the_bucket(capfd):
  assert _is_reported(.2, SAVE, 7, buckets={SAVE: 'gs://bucket/run'})
  assert 'saving of step 7 has taken 0 s (waiting for gs://bucket/run); the limit is config' in capfd.readouterr().err
