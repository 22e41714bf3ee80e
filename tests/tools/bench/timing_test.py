"""Statistics of rounds, the order of interleaved rounds, and rounds that other processes disturb."""

import pathlib
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from uni_moe_jax.tools.bench import timing


@pytest.mark.parametrize('samples, quartiles', [
    # Sorted: 1 2 3 4 10. Quartiles are at positions 1 and 3 of 0…4. The outlier moves none of them.
    ([3, 1, 10, 2, 4], (2, 3, 4)),
    # Quartiles between samples are interpolated: positions 0.75, 1.5 and 2.25 of 0…3.
    ([0, 4, 8, 16], (3, 6, 10)),
    # A single measurement has no spread.
    ([5.0], (None, 5.0, None)),
])
def test_median_and_quartiles_by_hand(samples, quartiles):
  estimate = timing.estimate(np.array(samples))
  assert (estimate.low, estimate.value, estimate.high) == quartiles


@pytest.mark.parametrize('numerator, denominator, quartiles', [
    # A machine that slows down does not change a round's ratio.
    ([3, 6, 12, 24], [1, 2, 4, 8], (3, 3, 3)),
    # Rounds' own ratios: 4, 2, 1, 8/3, 1 → sorted 1 1 2 8/3 4.
    ([4, 4, 2, 8, 3], [1, 2, 2, 3, 3], (1, 2, 8 / 3)),
    # Rounds' own ratios: 1/3, 3, 6. The medians, 6 and 3, would give 2.
    ([1, 9, 6], [3, 3, 1], (5 / 3, 3, 4.5)),
    # A rate is high if seconds are few. 12 items in 1, 2, 3, 4, 6 s: 12, 6, 4, 3, 2 per second.
    (12, [1, 2, 3, 4, 6], (3, 4, 6)),
])
def test_a_ratio_is_the_median_of_the_rounds_own_ratios(numerator, denominator, quartiles):
  rounds = timing.Rounds({'a': np.array(numerator), 'b': np.array(denominator)})
  figure = rounds.figure(rounds['a'] / rounds['b'])
  assert (figure.low, figure.value, figure.high) == pytest.approx(quartiles)


class _Clock:
  """Advances by the given seconds of each call."""

  def __init__(self):
    self.now, self.log = 0.0, []

  def call(self, name: str, seconds: float):
    def run():
      self.log.append(name)
      self.now += seconds
      return jnp.zeros(())
    return run


def test_every_call_runs_once_first_and_then_once_per_round_in_rotating_order():
  clock = _Clock()
  calls = {name: clock.call(name, s) for name, s in (('a', 2), ('b', 5), ('c', 1))}
  seconds = timing.interleaved(calls, 4, clock=lambda: clock.now, other_cores=lambda: 0)
  assert ''.join(clock.log) == 'abc' 'abc' 'bca' 'cab' 'abc'
  assert {name: s.tolist() for name, s in seconds.seconds.items()} == {'a': [2] * 4, 'b': [5] * 4, 'c': [1] * 4}


def test_each_call_gets_its_own_seconds_without_the_first_run_and_without_its_preparation():
  clock = _Clock()
  calls, before = {'a': clock.call('a', 2), 'b': clock.call('b', 5)}, {'b': clock.call('p', 100)}
  seconds = timing.interleaved(calls, 2, before=before, clock=lambda: clock.now, other_cores=lambda: 0)
  assert ''.join(clock.log) == 'apb' 'apb' 'pba'
  np.testing.assert_array_equal(seconds['a'], [2, 2])
  np.testing.assert_array_equal(seconds['b'], [5, 5])


def _disturbed(cores: list[float], rounds: int) -> tuple[str, timing.Rounds]:
  """(order of calls, rounds) of calls a and b that take 1, 2, 3, … s, beside others with these cores per round."""
  clock, seconds = _Clock(), iter(range(100))
  calls = {name: lambda name=name: clock.call(name, next(seconds))() for name in 'ab'}
  others = iter([x for c in cores for x in (0, c)])  # one call starts a round, one ends it
  result = timing.interleaved(calls, rounds, clock=lambda: clock.now, other_cores=lambda: next(others))
  return ''.join(clock.log), result


def test_a_disturbed_round_is_measured_again_for_every_candidate():
  order, rounds = _disturbed([0, 0.5, 0.1, 0, 0.05], 4)
  assert order == 'ab' 'ab' 'ba' 'ab' 'ba' 'ab'
  # Seconds count up from 0: the first two are of the uncounted run, 4 and 5 of the disturbed round.
  assert (rounds['a'].tolist(), rounds['b'].tolist()) == ([2, 6, 9, 10], [3, 7, 8, 11])
  figure = rounds.figure(rounds['a'])
  assert (figure.discarded, figure.judged) == (1, True)


def test_with_too_few_quiet_rounds_all_are_used_and_none_is_judged():
  _, rounds = _disturbed([1] * 5 + [0] * 3, 4)  # three quiet rounds of the eight that are allowed
  assert (len(rounds['a']), rounds.discarded, rounds.judged) == (3, 5, True)
  _, rounds = _disturbed([1] * 6 + [0] * 2, 4)
  assert (len(rounds['a']), rounds.discarded, rounds.judged) == (8, 6, False)


def test_own_work_is_not_that_of_others_and_ticks_are_cores():
  reads, times = iter([(10.0, 1.0), (14.0, 2.5), (14.5, 3.0)]), iter([0.0, 5.0, 6.0])
  others = timing.OtherProcesses(lambda: next(reads), lambda: next(times))
  assert others() == pytest.approx((4 - 1.5) / 5)
  assert others() == 0
  assert timing.OtherProcesses(lambda: None)() == 0  # a system that does not tell


def test_a_thread_that_ends_while_its_children_are_read_has_none(monkeypatch):
  def ended(path, *_args, **_kwargs):
    read.append(path)
    raise FileNotFoundError(2, 'No such file or directory', str(path))

  read, threads = [], [pathlib.Path('/proc/self/task/1/children'), pathlib.Path('/proc/self/task/2/children')]
  monkeypatch.setattr(pathlib.Path, 'glob', lambda *_: iter(threads))
  monkeypatch.setattr(pathlib.Path, 'read_text', ended)
  assert timing._seconds_of_live_children() == 0 and read == threads


_SPIN = 'import time\nend = time.perf_counter() + 2\nwhile time.perf_counter() < end: pass'


@pytest.mark.skipif(timing._cpu_seconds() is None, reason='this system does not tell the CPU time of all processes')
def test_another_process_that_computes_is_seen_and_a_child_is_not_another():
  cores = timing.OtherProcesses()
  # The shell ends, and the process that computes is nobody's child.
  subprocess.run(['sh', '-c', '"$0" -c "$1" &', sys.executable, _SPIN], check=True)
  time.sleep(1.5)
  assert cores() > 0.3
  time.sleep(1)
  child, (_, before) = subprocess.Popen([sys.executable, '-c', _SPIN]), timing._cpu_seconds()
  time.sleep(1.5)
  assert timing._cpu_seconds()[1] - before > 0.5
  child.wait()
  assert timing._cpu_seconds()[1] - before > 0.5
