"""The kills subject: its judgements by hand, and a few real kills."""

import json
import random
import subprocess
import sys
import time

import pytest

from uni_moe_jax.faults import kills, suite


def _workdir(tmp_path, last_line, saved, monkeypatch):
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps({'step': s + 1}) + '\n' for s in range(last_line)) + '{"step": 9')
  (tmp_path / 'config.json').write_text(json.dumps({'config': {'train': {'save_every': 10}}}))
  tally = kills.Tally()
  kills._check_nothing_lost(tmp_path, saved, tally)
  return tally.findings


@pytest.mark.parametrize('last_line, saved, lost', [
    (0, None, False), (10, None, False),
    (20, None, False),  # the save of step 10 is under way while the steps to 20 run
    (21, None, True),   # that of step 20 has begun, so that of step 10 has ended
    (21, 10, False), (30, 10, False), (31, 10, True), (31, 20, False), (31, 30, False)])
def test_steps_are_lost_when_more_than_the_save_under_way_is_missing(tmp_path, monkeypatch, last_line, saved, lost):
  assert bool(_workdir(tmp_path, last_line, saved, monkeypatch)) == lost


@pytest.mark.parametrize('expected, said, found', [
    (None, 'ready after 1 s; the first step compiles', False),
    (20, 'resumed from step 20\nready after 1 s; the first step compiles', False),
    (20, 'importing', False),  # it was killed before it could say
    (20, 'resumed from step 10\nready after 1 s; the first step compiles', True),
    (20, 'ready after 1 s; the first step compiles', True),
    (None, 'resumed from step 10\nready after 1 s; the first step compiles', True)])
def test_a_start_goes_on_from_the_newest_whole_checkpoint(expected, said, found):
  tally = kills.Tally()
  kills._check_resumed(expected, said, tally)
  assert bool(tally.findings) == found


class _StandIn(kills.Trainer):
  """Runs `plant`, the text of a program, in place of the trainer."""

  def command(self, workdir):
    return [sys.executable, '-c', self.plant, str(workdir / 'checkpoints/10.orbax-checkpoint-tmp')]


_IMPORTS_FOR_EVER = 'import time; time.sleep(60)'
_SAVES_FOR_EVER = """
import pathlib, shutil, sys, time
path = pathlib.Path(sys.argv[1])
if path.exists():
  shutil.rmtree(path)
  time.sleep(.1)
path.mkdir(parents=True)
time.sleep(60)
"""


@pytest.mark.parametrize('program, left_over, save, inside', [
    (_IMPORTS_FOR_EVER, False, False, 0),
    (_IMPORTS_FOR_EVER, True, False, 0),  # the kill before this one was inside a save; this one is not
    (_SAVES_FOR_EVER, False, True, 1), (_SAVES_FOR_EVER, True, True, 1)])
def test_a_kill_is_inside_a_save_of_the_process_that_is_killed(tmp_path, monkeypatch, program, left_over, save, inside):
  monkeypatch.setattr(kills, '_SAVES_LET_PASS', 1)
  if left_over:
    (tmp_path / 'run/checkpoints/10.orbax-checkpoint-tmp').mkdir(parents=True)
  tally = kills.Tally()
  code = kills._until_killed(_StandIn(tmp_path, program), tmp_path / 'run', tmp_path / 'log', random.Random(0), save,
                             kills.Undisturbed(tmp_path, 1., .04), tally)
  assert (code, tally.kills, tally.inside_saves) == (None, 1, inside)


def test_a_run_that_does_not_end_is_killed_with_what_it_started_and_is_a_finding(tmp_path, monkeypatch):
  monkeypatch.setattr(kills, '_LONGEST', 2.)
  # The kill comes before it has a child, which would outlive it: only the run without end is killed with all that it started.
  child = 'import subprocess, time; time.sleep(.5); subprocess.run(["sleep", "61.25"])'
  tally = kills.series(_StandIn(tmp_path, child), kills.Undisturbed(tmp_path / 'whole', .1, .1), kills=1, saves=0, seed=0)
  [finding] = tally.findings
  assert 'no end in 2 s' in finding and (tally.kills, tally.starts) == (1, 2)
  end = time.monotonic() + 10  # the system takes a moment to end what was killed
  while subprocess.run(['pgrep', '-f', 'sleep 61.25'], capture_output=True, check=False).stdout:
    assert time.monotonic() < end
    time.sleep(0.05)


@pytest.mark.parametrize('files, saved, stage', [
    ((), (10,), kills.EMPTY), (('_CHECKPOINT_METADATA',), (10,), kills.EMPTY), (('default/d/x', '_CHECKPOINT_METADATA'), (10,), kills.ARRAYS),
    (('default/d/x', 'manifest.json'), (10,), kills.SEALED), (None, (10, 20), ''), (None, (10, 20, 30), kills.DELETING)])
def test_how_far_a_save_was(tmp_path, files, saved, stage):
  for step in saved:
    (tmp_path / f'checkpoints/{step}').mkdir(parents=True)
  (tmp_path / 'checkpoints/5.orbax-checkpoint-tmp').mkdir()  # of a process before this one
  saves = kills._Saves(tmp_path)
  for name in ('', *files) if files is not None else ():
    path = tmp_path / 'checkpoints/40.orbax-checkpoint-tmp' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('') if name else path.mkdir()
  assert saves.stage(keep=2) == stage


def test_a_checkpoint_that_has_its_name_and_is_not_whole_is_found(tmp_path):
  tally = kills.Tally()
  kills._check_whole(tmp_path, None, tally)
  for step in (10, 20):
    (tmp_path / f'checkpoints/{step}').mkdir(parents=True)
  kills._check_whole(tmp_path, 20, tally)
  assert not tally.findings
  kills._check_whole(tmp_path, 10, tally)
  [finding] = tally.findings
  assert 'step 20 was left damaged: manifest.json is missing' in finding
  (tmp_path / 'damaged').mkdir()
  kills._check_whole(tmp_path, 20, tally)
  assert 'found to be damaged' in tally.findings[1]


def test_how_long_a_save_takes_is_what_orbax_wrote_down(tmp_path):
  for step, (begun, ended) in {10: (5, 8), 20: (20, 21)}.items():
    (tmp_path / f'checkpoints/{step}').mkdir(parents=True)
    said = {'init_timestamp_nsecs': begun * 10**9, 'commit_timestamp_nsecs': ended * 10**9}
    (tmp_path / f'checkpoints/{step}/_CHECKPOINT_METADATA').write_text(json.dumps(said))
  assert kills.save_seconds(tmp_path) == 3.


@pytest.mark.nightly
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path, capsys):
  assert suite.run(('kills',), suite.QUICK, 0, tmp_path, keep=True) == 0, capsys.readouterr().out
  assert ' inside a save (' in capsys.readouterr().out


@pytest.mark.nightly
def test_planted_faults_are_found(tmp_path, capsys):
  assert suite.run(('planted',), suite.QUICK, 0, tmp_path, keep=True) == 0, capsys.readouterr().out
  said = capsys.readouterr().out
  assert "planted fault 'one_bit'" in said and 'NOT FOUND' not in said
