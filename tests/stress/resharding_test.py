"""The checks of the resharding suite on synthetic logs."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.stress import recorded_batches, resharding
from tests.stress.resharding import Topology


def _batch(leading_shape):
  """Eight rows of two fields with the given leading axes, and an offset of the whole batch."""
  pixels = np.arange(24, dtype=np.uint8).reshape(*leading_shape, 3)
  ids = np.arange(8, dtype=np.uint32).reshape(leading_shape)
  return {'img': {'pixels': pixels, 'id': ids, 'temporal_offset': np.int64(2)}}


def _hashes(batch):
  return recorded_batches.row_hashes(batch, ('temporal_offset',))


def test_row_hashes_do_not_depend_on_shards():
  hashes = _hashes(_batch((1, 8)))
  assert len(set(hashes)) == 8
  assert _hashes(_batch((4, 2))) == hashes
  halves = [{'img': {k: v[s] if v.ndim else v for k, v in _batch((2, 4))['img'].items()}}
            for s in (slice(0, 1), slice(1, 2))]
  assert sorted(h for half in halves for h in _hashes(half)) == hashes


@pytest.mark.parametrize('field', ['pixels', 'id', 'temporal_offset'])
def test_row_hashes_depend_on_every_field(field):
  batch = _batch((1, 8))
  changed = np.array(batch['img'][field])
  changed.reshape(-1)[-1] += 1
  batch['img'][field] = changed
  same = set(_hashes(batch)) & set(_hashes(_batch((1, 8))))
  assert len(same) == (0 if field == 'temporal_offset' else 7)  # every row has the offset


def test_row_hashes_depend_on_the_micro_step():
  batch = _batch((2, 1, 4))
  batch['img']['temporal_offset'] = np.array([2, 2])
  swapped = {'img': {k: v[::-1] for k, v in batch['img'].items()}}
  assert not set(_hashes(batch)) & set(_hashes(swapped))


def _write(workdir, process, *lines):
  with (workdir / f'rows{process}.jsonl').open('a') as file:
    file.writelines(json.dumps({'step': step, 'task': task, 'rows': rows}) + '\n' for step, task, rows in lines)


def test_rows_of_all_processes_are_joined(tmp_path):
  _write(tmp_path, 0, (1, None, ['b', 'd']), (2, None, ['x']), (3, 'book', ['a']))
  _write(tmp_path, 1, (2, None, ['a']), (3, 'digit', ['b']))
  assert resharding.read_rows(tmp_path) == {
      1: (['None'], ['b', 'd']), 2: (['None'], ['a', 'x']), 3: (['book', 'digit'], ['a', 'b'])}


_REFERENCE = {1: (['book'], ['a', 'b', 'c', 'c'])}


@pytest.mark.parametrize('other, message', [
    ({1: (['book'], ['a', 'b', 'c', 'c'])}, None),
    ({1: (['book'], ['a', 'b', 'c', 'd'])}, '1 of 4 rows'),
    ({1: (['book'], ['a', 'a', 'c', 'c'])}, '1 of 4 rows'),  # twice, instead of another
    ({1: (['book'], ['a', 'b', 'c'])}, '0 of 3 rows differ from those of one device, which has 4'),
    ({1: (['book'], ['a', 'b', 'c', 'c', 'c'])}, '1 of 5 rows'),
    ({}, '0 of 0 rows'),
    ({1: (['book', 'digit'], ['a', 'b', 'c', 'c'])}, "tasks ['book', 'digit'] instead of ['book']")])
def test_different_rows_are_detected(other, message):
  differences = resharding.row_differences(_REFERENCE, other)
  assert (differences == {}) if message is None else (list(differences) == [1] and message in differences[1])


def test_an_additional_step_is_detected():
  assert list(resharding.row_differences(_REFERENCE, {**_REFERENCE, 2: (['book'], ['a'])})) == [2]


def test_losses_are_compared_step_by_step():
  reference = [{'step': s, 'loss/total': 2., 'loss/book': 1., 'grad_norm': 3.} for s in (1, 2, 3, 4)]
  other = [{**reference[0], 'grad_norm': 4.}, {**reference[1], 'loss/book': 1.25}, {'step': 3, 'loss/total': 2.}]
  assert resharding.loss_differences(reference, other) == {1: 0., 2: .25, 3: float('inf'), 4: float('inf')}


def _findings(folder, arg, leg_steps, reference_rows, rows, lines):
  """Return report and findings of a run with one leg on one device and one on two."""
  run = resharding.Run(folder, arg, resharding.Schedule({arg: leg_steps}, (Topology(1, 1), Topology(1, 2)), ()))
  reference, result = run.workdir('reference'), resharding.Result()
  reference.mkdir()
  reference_lines = [{'step': s, 'loss/total': 2.} for s in range(1, 2 * leg_steps + 1)]
  (reference / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in reference_lines))
  _write(reference, 0, *reference_rows)
  resharding._check(run, rows, lines or reference_lines, result)
  assert len(result.report) == 2
  return result.findings


@pytest.mark.parametrize('rows, loss, findings', [
    (['a', 'b'], 2., []), (['a', 'b'], 2 + 9e-6, []),
    (['a', 'c'], 2., ['all_tasks on 1 × 2, step 6: 1 of 2 rows differ from those of one device, which has 2']),
    (['a', 'b'], 2.5, ['all_tasks on 1 × 2, step 7: a loss differs by 0.5 from that of one device'])])
def test_rows_and_losses_of_a_leg_are_checked(tmp_path, rows, loss, findings):
  all_rows = {s: (['None'], ['a', 'b']) for s in range(1, 9)} | {6: (['None'], rows)}
  lines = [{'step': s, 'loss/total': loss if s == 7 else 2.} for s in range(1, 9)]
  assert _findings(tmp_path, 'all_tasks', 4, [(s, None, ['a', 'b']) for s in range(1, 9)], all_rows, lines) == findings


@pytest.mark.parametrize('tasks, findings', [('abba', []), ('abaa', ['one_task on 1 × 2, steps 3…4: none is of b'])])
def test_a_leg_without_a_task_is_detected(tmp_path, tasks, findings):
  reference_rows = [(i, task, ['x']) for i, task in enumerate(tasks, start=1)]
  rows = {i: ([task], ['x']) for i, task in enumerate(tasks, start=1)}
  assert _findings(tmp_path, 'one_task', 2, reference_rows, rows, None) == findings


def test_a_process_that_waits_for_a_failed_one_is_killed():
  fails, waits = (subprocess.Popen([sys.executable, '-c', code])
                  for code in ('raise SystemExit(3)', 'import time; time.sleep(60)'))
  assert resharding._wait([fails, waits]) == [3, -9]
