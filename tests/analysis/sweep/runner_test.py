"""Stages that are skipped, retried, or kept back by a failure or a signal."""

import json

import pytest

from uni_moe_jax.analysis.sweep import runner
from uni_moe_jax.analysis.sweep.grid import Cell, Stage

_STAGES = (Stage('a', ('a',)), Stage('train', ('t', '--x')), Stage('b', ('b',), 'train'))


def _cell(folder, seed=0):
  return Cell(folder / f'cell-{seed}', 'cell', '', seed, _STAGES)


def _run(*cells, **codes):
  """(whether no signal stopped the cells, the commands that were started); codes: the exit codes that are not 0."""
  started = []

  def start(command):
    started.append(command[0])
    return codes.get(started[-1], 0)

  return runner.run_cells(cells, start), started


def test_finished_stages_are_not_repeated(tmp_path, capsys):
  assert _run(_cell(tmp_path)) == (True, ['a', 't', 'b'])
  assert _run(_cell(tmp_path)) == (True, [])
  assert capsys.readouterr().out == '1/1 cell-0\n1/1 cell-0: done\n'
  log = json.loads((tmp_path / 'cell-0' / runner.LOG).read_text())
  assert [(t['stage'], t['command'], t['exit_code']) for t in log] == [
      ('a', 'uni-moe a', 0), ('train', 'uni-moe t --x', 0), ('b', 'uni-moe b', 0)]
  assert all(t['seconds'] >= 0 for t in log) and runner.read_log(tmp_path / 'cell-0') == log


def test_a_failure_skips_what_needs_it_and_is_retried(tmp_path):
  assert _run(_cell(tmp_path), a=1, t=3) == (True, ['a', 't'])
  assert _run(_cell(tmp_path)) == (True, ['a', 't', 'b'])
  assert [t['exit_code'] for t in runner.read_log(tmp_path / 'cell-0')] == [1, 3, 0, 0, 0]


def test_a_signal_stops_all_cells_and_the_next_call_continues_there(tmp_path):
  cells = [_cell(tmp_path), _cell(tmp_path, 1)]
  assert _run(*cells, t=75) == (False, ['a', 't'])
  assert _run(*cells) == (True, ['t', 'b', 'a', 't', 'b'])
  assert not runner.is_finished([{'stage': 'train', 'exit_code': 75}], 'train')


def test_a_work_directory_belongs_to_one_sweep(tmp_path):
  runner.claim(tmp_path / 'new', {'run': 'a', 'step': 200})
  runner.claim(tmp_path / 'new', {'run': 'a', 'step': 200})
  with pytest.raises(ValueError, match='other settings .*step: 200 → 400.*another --workdir'):
    runner.claim(tmp_path / 'new', {'run': 'a', 'step': 400})  # the run has trained further
