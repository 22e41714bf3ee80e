"""What the suite prints and answers: its subjects are stand-ins."""

import pathlib

import pytest

from uni_moe_jax.faults import kills, stops, suite


@pytest.fixture(name='printed')
def _printed(tmp_path, monkeypatch, capsys):
  """(exit code, what was printed) of subjects whose runs are not started."""
  monkeypatch.setattr(suite._Work, '_whole', lambda work: kills.Undisturbed(pathlib.Path(tmp_path), 1., .1))

  def printed(*subjects):
    return suite.run(subjects, suite.QUICK, 0, tmp_path, keep=True), capsys.readouterr().out

  return printed


def _finds(*findings):
  return lambda *_: kills.Tally(findings=list(findings))


@pytest.mark.parametrize('findings, code', [
    (['killed_0: 2 of 30 arrays differ, .params first', 'a run with a checkpoint of step 10 resumed from nothing',
      'killed_0: the checkpoint of step 10 was left damaged: manifest.json is missing'], 0),
    (['killed_0: 2 of 30 arrays differ, .params first'], 1),  # it is not what 'lost_checkpoints' does
    (['killed_0: exit code 1: AttributeError'], 1), ([], 1)])
def test_a_planted_fault_counts_as_found_by_what_is_said_of_it(printed, monkeypatch, findings, code):
  monkeypatch.setattr(kills, 'series', _finds(*findings))
  monkeypatch.setattr(suite._Work, '_found_without_sums', lambda *_: ['x bit flipped: THE DAMAGED ONE WAS READ'])
  got, said = printed('planted')
  assert got == code and said.count('NOT FOUND') == said.count('was not found') and ('NOT FOUND' in said) == bool(code)
  assert "planted fault 'no_sums': 0 s\n  found: x bit flipped" in said


def test_a_planted_fault_that_kills_did_not_bring_to_light_is_tried_again(printed, monkeypatch):
  seeds = []

  def series(trainer, whole, number, saves, seed):
    seeds.append((trainer.plant, seed))
    return kills.Tally(findings=['3 arrays differ', 'resumed from nothing', 'was left damaged'] if seed else [])

  monkeypatch.setattr(kills, 'series', series)
  monkeypatch.setattr(suite._Work, '_found_without_sums', lambda *_: ['THE DAMAGED ONE WAS READ'])
  assert printed('planted')[0] == 0
  assert seeds == [(name, seed) for name in ('one_bit', 'skipped_batch', 'lost_checkpoints', 'late_manifest') for seed in (0, 1)]


def test_what_was_not_tried_is_not_said_to_be_well(printed, monkeypatch):
  for happen in ('hangs', 'full_disk', 'dead_process', 'failed_process'):
    monkeypatch.setattr(stops, happen, lambda *_: (['one sentence'], []))
  code, said = printed('stops')
  assert code == 0 and 'nothing was lost, read wrongly or left unsaid' in said and 'NOT TRIED' not in said

  def not_tried(*_):
    raise stops.NotTried('a full disk: there is none')

  monkeypatch.setattr(stops, 'full_disk', not_tried)
  code, said = printed('stops')
  assert code == 0 and 'NOT TRIED a full disk: there is none' in said and said.endswith('no findings in what was tried\n')
