"""The kills subject: its judgements by hand, and a few real kills."""

import json

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


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened_and_planted_faults_are_found(tmp_path, capsys):
  assert suite.run(('kills', 'stops', 'planted'), suite.QUICK, 0, tmp_path, keep=True) == 0, capsys.readouterr().out
  said = capsys.readouterr().out
  assert 'of them inside a save' in said and 'hung_step: exit code 1' in said
  assert "planted fault 'one_bit'" in said and 'NOT FOUND' not in said
