"""Stages of a comparison: their commands, what is skipped, and what a failure or a signal keeps from running."""

import json

from uni_moe_jax.analysis import compare_stages
from uni_moe_jax.analysis.compare_stages import Stage

_STAGES = (Stage('a', ('launch/a.py',)), Stage('train', ('launch/t.py', '--x')), Stage('b', ('launch/b.py',), 'train'))


class _Starter:
  """Stands in for processes: answers with the codes that were set, and notes what it was asked."""

  def __init__(self, **codes):
    self.codes, self.asked = codes, []

  def __call__(self, command):
    name = command[0].removeprefix('launch/').removesuffix('.py')
    self.asked.append(name)
    return self.codes.get(name, 0)


def test_a_router_is_what_a_person_would_type():
  found = {s.name: s for s in compare_stages.stages('token', 'configs/ablation.py', 'out', 8, ['train.steps=3'], dense=False)}
  named, where = ('--config=configs/ablation.py:token', '--config.train.steps=3'), '--workdir=out/token'
  assert list(found) == ['interference before', 'compile', 'train', 'evaluate', 'interference after', 'experts', 'report']
  assert found['interference before'].command == ('launch/interference.py', '--init', *named, where, '--batches=8')
  assert found['compile'].command == (*found['train'].command, '--compile_only') == (
      'launch/train.py', *named, where, '--compile_only')
  assert found['interference after'].command == ('launch/interference.py', where, '--batches=8')
  assert [s.name for s in found.values() if s.needs] == ['evaluate', 'interference after', 'experts', 'report']
  dense = [s.name for s in compare_stages.stages('dense', 'c.py', 'out', 8, [], dense=True)]
  assert dense == [name for name in found if name != 'experts']


def test_what_finished_is_not_done_again(tmp_path):
  start = _Starter()
  assert compare_stages.run(tmp_path, 'r', _STAGES, start) and compare_stages.run(tmp_path, 'r', _STAGES, start)
  assert start.asked == ['a', 't', 'b']
  log = json.loads((tmp_path / 'r' / compare_stages.LOG).read_text())
  assert [(t['stage'], t['command'], t['code']) for t in log] == [
      ('a', 'python launch/a.py', 0), ('train', 'python launch/t.py --x', 0), ('b', 'python launch/b.py', 0)]
  assert all(t['seconds'] >= 0 for t in log) and compare_stages.log_of(tmp_path, 'r') == log


def test_a_failure_keeps_back_what_needs_it_and_is_tried_again(tmp_path):
  failing = _Starter(a=1, t=3)
  assert compare_stages.run(tmp_path, 'r', _STAGES, failing)
  assert failing.asked == ['a', 't']
  repaired = _Starter()
  assert compare_stages.run(tmp_path, 'r', _STAGES, repaired)
  assert repaired.asked == ['a', 't', 'b']
  assert [t['code'] for t in compare_stages.log_of(tmp_path, 'r')] == [1, 3, 0, 0, 0]


def test_a_signal_ends_all_of_it_and_the_next_call_goes_on_there(tmp_path):
  stopped = _Starter(t=75)
  assert not compare_stages.run(tmp_path, 'r', _STAGES, stopped)
  assert stopped.asked == ['a', 't']
  after = _Starter()
  assert compare_stages.run(tmp_path, 'r', _STAGES, after) and after.asked == ['t', 'b']
  assert not compare_stages.finished([{'stage': 'train', 'code': 75}], 'train')
