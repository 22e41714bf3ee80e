"""The checks of the preemption suite on synthetic work directories, and kills of stand-ins."""

import json
import random
import subprocess
import sys
import time

import pytest

from tests.stress import preemption, trainer
from tests.stress.preemption import ARRAYS, DELETING, EMPTY, SEALED, Tally, Undisturbed


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
    tmp_path, monkeypatch, program, left_over, in_save, during_saves):
  monkeypatch.setattr(preemption, '_MAX_SKIPPED_SAVES', 1)
  if left_over:
    (tmp_path / 'run/checkpoints/10.orbax-checkpoint-tmp').mkdir(parents=True)
  tally = Tally()
  code = preemption._run_until_killed(_StandIn(tmp_path, program), tmp_path / 'run', tmp_path / 'log', random.Random(0),
                                      in_save, Undisturbed(tmp_path, 1., .04), tally)
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


@pytest.mark.parametrize('files, saved, stage', [
    ((), (10,), EMPTY), (('_CHECKPOINT_METADATA',), (10,), EMPTY),
    (('default/d/x', '_CHECKPOINT_METADATA'), (10,), ARRAYS),
    (('default/d/x', 'manifest.json'), (10,), SEALED), (None, (10, 20), ''), (None, (10, 20, 30), DELETING)])
def test_the_stage_of_a_save_is_seen_in_its_files(tmp_path, files, saved, stage):
  for step in saved:
    _add_checkpoint(tmp_path, step)
  (tmp_path / 'checkpoints/5.orbax-checkpoint-tmp').mkdir()  # of an earlier process
  saves = preemption._Saves(tmp_path)
  for name in ('', *files) if files is not None else ():
    path = tmp_path / 'checkpoints/40.orbax-checkpoint-tmp' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('') if name else path.mkdir()
  assert saves.stage(max_to_keep=2) == stage


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


def test_the_duration_of_a_save_comes_from_orbax(tmp_path):
  for step, (begun, ended) in {10: (5, 8), 20: (20, 21)}.items():
    (tmp_path / f'checkpoints/{step}').mkdir(parents=True)
    metadata = {'init_timestamp_nsecs': begun * 10**9, 'commit_timestamp_nsecs': ended * 10**9}
    (tmp_path / f'checkpoints/{step}/_CHECKPOINT_METADATA').write_text(json.dumps(metadata))
  assert preemption.save_seconds(tmp_path) == 3.
