"""Stages that are skipped, retried, or kept back by a failure or a signal."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.helpers import processes, stand_in
from uni_moe_jax.analysis.sweep import runner
from uni_moe_jax.analysis.sweep.grid import Cell, Stage

_STAGES = (Stage('a', ('a',)), Stage('train', ('t', '--x')), Stage('b', ('b',), 'train'))


def _cell(folder, seed=0):
  return Cell(folder / f'cell-{seed}', 'cell', '', seed, _STAGES)


def _run(*cells, **codes):
  """(whether no signal stopped the cells, the commands that were started); codes: the exit codes that are not 0."""
  started = []

  def start(command, _):
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


def test_a_page_is_written_again_after_another_stage_and_not_without_one(tmp_path):
  train, evaluate = Stage('train', ('t',)), Stage('evaluate', ('e',), 'train')
  page = Stage('page', ('p',), 'train', shows_all=True)
  short, cell = (_cell(tmp_path)._replace(stages=stages) for stages in ((train, page), (train, evaluate, page)))
  assert _run(short) == (True, ['t', 'p'])
  assert _run(short) == (True, [])
  assert _run(cell, p=75) == (False, ['e', 'p'])
  assert _run(cell) == (True, ['p'])  # the page of the call before was interrupted
  assert _run(cell) == (True, [])


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
  runner.claim(tmp_path / 'new', {'run': 'a', 'step': 200}, [])
  runner.claim(tmp_path / 'new', {'run': 'a', 'step': 200}, [])
  with pytest.raises(ValueError, match='other settings .*step: 200 → 400.*another --workdir'):
    runner.claim(tmp_path / 'new', {'run': 'a', 'step': 400}, [])  # the run has trained further


def test_a_later_call_adds_cells_and_none_is_lost(tmp_path):
  first, second, third = (_cell(tmp_path, seed) for seed in range(3))
  assert runner.claim(tmp_path, {}, [first, second]) == [first, second]
  # The first two are known without their commands.
  assert runner.claim(tmp_path, {}, [third]) == [first._replace(stages=()), second._replace(stages=()), third]
  assert runner.claim(tmp_path, {}, [second]) == [
      first._replace(stages=()), second, third._replace(stages=())]


def test_a_cell_keeps_its_fields(tmp_path):
  cell = _cell(tmp_path)._replace(fields=('train.steps=9',))
  runner.claim(tmp_path, {}, [cell])
  with pytest.raises(ValueError, match=r'cell-0: train.steps=9 → train.steps=8\); give another --workdir'):
    runner.claim(tmp_path, {}, [cell._replace(fields=('train.steps=8',))])
  with pytest.raises(ValueError, match='cell-0: train.steps=9 → as the config'):
    runner.claim(tmp_path, {}, [_cell(tmp_path)])


# Runs two stages of a cell; `b.py` of the first call waits for a signal. Its scripts log their names.
_SWEEP = '''
import pathlib, sys
from uni_moe_jax.analysis.sweep import runner
from uni_moe_jax.analysis.sweep.grid import Cell, Stage
folder = pathlib.Path(sys.argv[1])
cell = Cell(folder / 'cell', 'cell', '', 0, (Stage('a', ('a',)), Stage('b', ('b',))))
sys.exit(not runner.run_cells([cell], runner.starter(folder)))
'''
_SCRIPT = '''
import pathlib, signal, sys, time
folder = pathlib.Path(__file__).parent
with open(folder / 'log', 'a') as log:
  log.write(pathlib.Path(__file__).stem)
if __file__.endswith('b.py') and not (folder / 'started').exists():
  received = []
  signal.signal(signal.SIGTERM, lambda *_: received.append(1))
  (folder / 'started').touch()
  while not received:
    time.sleep(.01)
  while not (folder / 'saved').exists():
    time.sleep(.01)
  with open(folder / 'log', 'a') as log:
    log.write('!')
'''


@pytest.mark.skipif(sys.platform != 'linux', reason="a child ends with its parent by Linux's prctl")
def test_after_sigkill_a_sweep_waits_for_the_stage_that_was_running_and_repeats_it_alone(tmp_path):
  for name in 'ab':
    (tmp_path / f'{name}.py').write_text(_SCRIPT)
  command = [sys.executable, '-c', _SWEEP, tmp_path]
  env = {**os.environ, 'PYTHONPATH': str(processes.ROOT)}
  killed = subprocess.Popen(command, env=env)
  stand_in.wait_for(tmp_path / 'started', killed, seconds=60)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as again:
    first = again.stdout.readline()  # before the stage that was running ends
    (tmp_path / 'saved').touch()
    again.communicate(timeout=60)
  assert 'waiting for another process that works on' in first and again.returncode == 0
  assert (tmp_path / 'log').read_text() == 'ab!b'  # the second b began when the first had ended
  assert [(t['stage'], t['exit_code']) for t in runner.read_log(tmp_path / 'cell')] == [('a', 0), ('b', 0)]
