"""Killed runs end like undisturbed ones; the checks detect injected faults and faulty work directories."""

import dataclasses
import json
import random
import subprocess
import sys
import time

import pytest

from tests.stress import injected_faults, preemption, trainer
from tests.stress.preemption import Tally, Undisturbed

_TRIES = 3  # to detect an injected fault: kills may come too early


@pytest.mark.parametrize('fault', ['', 'no_folder_renames'])
def test_killed_runs_lose_nothing_and_end_like_an_undisturbed_one(digits_trainer, undisturbed, stress, fault):
  killed = dataclasses.replace(digits_trainer, fault=fault)
  tally = preemption.series(killed, undisturbed, 3 * stress, num_saves=stress, seed=0)
  assert not tally.findings, tally


@pytest.mark.parametrize('scheme', ['gcs', 's3'])
def test_killed_runs_in_a_bucket_end_like_an_undisturbed_one_on_a_disk(
    digits_trainer, undisturbed, stress, scheme, request):
  address = request.getfixturevalue(scheme).address
  killed = dataclasses.replace(digits_trainer, bucket=f'{address}/stress', fault='fast_heartbeats')
  save_seconds = preemption.undisturbed_run(killed, 'undisturbed').save_seconds
  other = dataclasses.replace(undisturbed, save_seconds=save_seconds)
  tally = preemption.series(killed, other, 3 * stress, num_saves=stress, seed=0)
  assert not tally.findings, tally


@pytest.mark.parametrize('fault, words', injected_faults.DETECTED.items())
def test_an_injected_fault_is_detected_by_the_words_of_the_right_finding(digits_trainer, undisturbed, fault, words):
  faulty, findings = dataclasses.replace(digits_trainer, fault=fault), []
  for seed in range(_TRIES):
    findings += preemption.series(faulty, undisturbed, num_kills=1, num_saves=1, seed=seed).findings
    if any(words in finding for finding in findings):
      return
  pytest.fail(f'{fault} was missed: {findings}')


@pytest.mark.parametrize('last_line, saved, lost', [
    (0, None, False), (10, None, False),
    (20, None, False),  # the save of step 10 is running during the steps to 20
    (21, None, True),   # that of step 20 has begun, so that of step 10 has ended
    (21, 10, False), (30, 10, False), (31, 10, True), (31, 20, False), (31, 30, False)])
def test_steps_are_lost_if_more_than_the_running_save_is_missing(tmp_path, last_line, saved, lost):
  lines = ''.join(json.dumps({'step': s + 1}) + '\n' for s in range(last_line))
  (tmp_path / 'metrics.jsonl').write_text(lines + '{"step": 9')
  (tmp_path / 'config.json').write_text(json.dumps({'config': {'train': {'checkpoint_every': 10}}}))
  tally = Tally()
  preemption._check_nothing_lost(tmp_path, saved, tally)
  assert bool(tally.findings) == lost


@pytest.mark.parametrize('expected, output, is_finding', [
    (None, 'ready after 1 s; the first step compiles', False),
    (20, 'resumed from step 20\nready after 1 s; the first step compiles', False),
    (20, 'importing', False),  # killed before it could print
    (20, 'resumed from step 10\nready after 1 s; the first step compiles', True),
    (20, 'ready after 1 s; the first step compiles', True),
    (None, 'resumed from step 10\nready after 1 s; the first step compiles', True)])
def test_a_start_must_resume_from_the_newest_intact_checkpoint(expected, output, is_finding):
  tally = Tally()
  preemption._check_resumed(expected, output, tally)
  assert bool(tally.findings) == is_finding


class _StandIn(trainer.Trainer):
  """Runs `fault`, the source of a program, instead of the trainer."""

  def command(self, workdir):
    return [sys.executable, '-c', self.fault, str(workdir / 'checkpoints/10.orbax-checkpoint-tmp')]


_IMPORTS_FOREVER = 'import time; time.sleep(60)'
_SAVES_FOREVER = """
import pathlib, sys, time
path = pathlib.Path(sys.argv[1])
if path.exists():
  path.rename(path.with_name('old'))  # a new folder could get the inode of one that is removed
path.mkdir(parents=True)
time.sleep(60)
"""


@pytest.mark.parametrize('program, left_over, in_save, during_saves', [
    (_IMPORTS_FOREVER, False, False, 0),
    (_IMPORTS_FOREVER, True, False, 0),  # the previous kill was during a save, this one is not
    (_SAVES_FOREVER, False, True, 1), (_SAVES_FOREVER, True, True, 1)])
def test_a_kill_counts_as_during_a_save_only_for_a_save_of_the_killed_process(
    tmp_path, program, left_over, in_save, during_saves):
  if left_over:
    (tmp_path / 'run/checkpoints/10.orbax-checkpoint-tmp').mkdir(parents=True)
  tally = Tally()
  code = preemption._run_until_killed(_StandIn(tmp_path, program), tmp_path / 'run', tmp_path / 'log',
                                      random.Random(2), in_save, Undisturbed(tmp_path, 1., .04), tally)
  assert (code, tally.kills, tally.during_saves) == (None, 1, during_saves)


def test_a_run_without_end_is_killed_with_its_children_and_is_a_finding(tmp_path, monkeypatch):
  monkeypatch.setattr(trainer, 'TIMEOUT', 2.)
  # The kill comes before it has a child, which would survive: only the timeout kills the whole group.
  child = 'import subprocess, time; time.sleep(.5); subprocess.run(["sleep", "61.25"])'
  undisturbed = Undisturbed(tmp_path / 'undisturbed', .1, .1)
  tally = preemption.series(_StandIn(tmp_path, child), undisturbed, num_kills=1, num_saves=0, seed=0)
  [finding] = tally.findings
  assert 'no end in 2 s' in finding and (tally.kills, tally.starts) == (1, 2)
  end = time.monotonic() + 10  # killed processes take a moment to end
  while subprocess.run(['pgrep', '-f', 'sleep 61.25'], capture_output=True, check=False).stdout:
    assert time.monotonic() < end
    time.sleep(0.05)


def _add_checkpoint(folder, step):
  """Add a checkpoint that is committed and has no manifest."""
  path = folder / f'checkpoints/{step}/commit_success.txt'
  path.parent.mkdir(parents=True)
  path.write_text('committed')


def test_a_named_checkpoint_that_is_damaged_is_a_finding(tmp_path):
  tally = Tally()
  preemption._check_intact(tmp_path, None, tally)
  for step in (10, 20):
    _add_checkpoint(tmp_path, step)
  preemption._check_intact(tmp_path, 20, tally)
  assert not tally.findings
  preemption._check_intact(tmp_path, 10, tally)
  [finding] = tally.findings
  assert 'step 20 was left damaged: manifest.json is missing' in finding
  (tmp_path / 'damaged').mkdir()
  preemption._check_intact(tmp_path, 20, tally)
  assert 'moved away as damaged' in tally.findings[1]
