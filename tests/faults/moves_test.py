"""The moves subject: its judgements by hand on invented logs, and one short journey."""

import json
import subprocess
import sys

import numpy as np
import pytest

from uni_moe_jax.faults import moves, recorded, suite


def _batch(lead):
  """Eight rows of two fields, laid out with the given leading axes, and an offset of the whole batch."""
  pixels = np.arange(24, dtype=np.uint8).reshape(*lead, 3)
  return {'img': {'pixels': pixels, 'id': np.arange(8, dtype=np.uint32).reshape(lead), 'temporal_offset': np.int64(2)}}


def _hashes(batch):
  return recorded.row_hashes(batch, ('temporal_offset',))


def test_hashes_of_rows_know_no_shards():
  whole = _hashes(_batch((1, 8)))
  assert len(set(whole)) == 8
  assert _hashes(_batch((4, 2))) == whole
  halves = [{'img': {k: v[s] if v.ndim else v for k, v in _batch((2, 4))['img'].items()}} for s in (slice(0, 1), slice(1, 2))]
  assert sorted(h for half in halves for h in _hashes(half)) == whole


@pytest.mark.parametrize('field', ['pixels', 'id', 'temporal_offset'])
def test_hashes_of_rows_know_every_field(field):
  batch = _batch((1, 8))
  changed = np.array(batch['img'][field])
  changed.reshape(-1)[-1] += 1
  batch['img'][field] = changed
  same = set(_hashes(batch)) & set(_hashes(_batch((1, 8))))
  assert len(same) == (0 if field == 'temporal_offset' else 7)  # an offset is every row's


def test_hashes_of_rows_know_the_micro_step():
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
  assert moves.read_rows(tmp_path) == {
      1: (['None'], ['b', 'd']), 2: (['None'], ['a', 'x']), 3: (['book', 'digit'], ['a', 'b'])}


_WHOLE = {1: (['book'], ['a', 'b', 'c', 'c'])}


@pytest.mark.parametrize('other, said', [
    ({1: (['book'], ['a', 'b', 'c', 'c'])}, None),
    ({1: (['book'], ['a', 'b', 'c', 'd'])}, '1 of 4 rows'),
    ({1: (['book'], ['a', 'a', 'c', 'c'])}, '1 of 4 rows'),  # twice, in place of another
    ({1: (['book'], ['a', 'b', 'c'])}, '0 of 3 rows are not those of one device, which has 4'),
    ({1: (['book'], ['a', 'b', 'c', 'c', 'c'])}, '1 of 5 rows'),
    ({}, '0 of 0 rows'),
    ({1: (['book', 'digit'], ['a', 'b', 'c', 'c'])}, "tasks ['book', 'digit'] instead of ['book']")])
def test_other_rows_are_found(other, said):
  found = moves.rows_apart(_WHOLE, other)
  assert (found == {}) if said is None else (list(found) == [1] and said in found[1])


def test_a_step_too_many_is_found():
  assert list(moves.rows_apart(_WHOLE, {**_WHOLE, 2: (['book'], ['a'])})) == [2]


def test_losses_are_compared_step_by_step():
  whole = [{'step': s, 'loss/total': 2., 'loss/book': 1., 'grad_norm': 3.} for s in (1, 2, 3, 4)]
  other = [{**whole[0], 'grad_norm': 4.}, {**whole[1], 'loss/book': 1.25}, {'step': 3, 'loss/total': 2.}]
  assert moves.losses_apart(whole, other) == {1: 0., 2: .25, 3: float('inf'), 4: float('inf')}


def _course(tmp_path, rows_of_two, loss_of_two):
  """Findings of four steps on one device and four on two."""
  journey = moves.Journey({'all_tasks': 4}, (moves.Place(1, 1), moves.Place(1, 2)), ())
  course = moves.Course(tmp_path, 'all_tasks', journey)
  whole, seen = course.workdir('whole'), moves.Seen()
  whole.mkdir()
  lines = [{'step': s, 'loss/total': 2.} for s in range(1, 9)]
  (whole / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  _write(whole, 0, *[(s, None, ['a', 'b']) for s in range(1, 9)])
  rows = {s: (['None'], ['a', 'b']) for s in range(1, 9)} | {6: (['None'], rows_of_two)}
  lines[6] = {'step': 7, 'loss/total': loss_of_two}
  moves._judge(course, rows, lines, seen)
  assert len(seen.said) == 2
  return seen.findings


@pytest.mark.parametrize('rows, loss, found', [
    (['a', 'b'], 2., []), (['a', 'b'], 2 + 9e-6, []),
    (['a', 'c'], 2., ['mixed on 1 × 2, step 6: 1 of 2 rows are not those of one device, which has 2']),
    (['a', 'b'], 2.5, ['mixed on 1 × 2, step 7: a loss is 0.5 away from that of one device'])])
def test_a_leg_is_judged_by_its_rows_and_losses(tmp_path, rows, loss, found):
  assert _course(tmp_path, rows, loss) == found


def test_a_leg_without_a_task_is_found(tmp_path):
  course = moves.Course(tmp_path, 'one_task', moves.Journey({'one_task': 2}, (moves.Place(1, 1), moves.Place(1, 2)), ()))
  course.workdir('whole').mkdir()
  lines = [{'step': s, 'loss/total': 2.} for s in range(1, 5)]
  for tasks, found in (('abba', []), ('abaa', ['sampled on 1 × 2, steps 3…4: none is of b'])):
    seen, rows = moves.Seen(), {i: ([task], ['x']) for i, task in enumerate(tasks, start=1)}
    (course.workdir('whole') / 'rows0.jsonl').unlink(missing_ok=True)
    (course.workdir('whole') / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    _write(course.workdir('whole'), 0, *[(i, task, ['x']) for i, task in enumerate(tasks, start=1)])
    moves._judge(course, rows, lines, seen)
    assert seen.findings == found


def test_who_waits_for_a_process_that_failed_is_ended():
  fails, waits = (subprocess.Popen([sys.executable, '-c', code]) for code in ('raise SystemExit(3)', 'import time; time.sleep(60)'))
  assert moves._wait([fails, waits]) == [3, -9]


@pytest.mark.parametrize('name', recorded.PLANTS)
def test_plants_can_be_planted_and_say_what_must_be_found(name):
  plant, words = recorded.PLANTS[name]
  assert callable(plant) and words


@pytest.mark.nightly
def test_a_moved_run_is_that_of_one_device_and_planted_faults_are_found(tmp_path, capsys):
  assert suite.run(('moves',), suite.QUICK, 0, tmp_path, keep=True) == 0, capsys.readouterr().out
  said = capsys.readouterr().out
  assert '1 × 2: steps 5…8' in said and '2 × 1: steps 9…12' in said
  assert said.count(': found: ') == len(recorded.PLANTS) and 'NOT FOUND' not in said
