"""The soak's figures by hand, and how it watches a stand-in."""

import sys

import numpy as np
import pytest

from uni_moe_jax import failures
from uni_moe_jax.faults import soak


def test_slope_is_that_of_a_line_after_the_warm_up():
  seconds = np.arange(0, 7200, 60.)
  sizes = np.where(seconds < 1800, 10 * seconds, 500 + 36 * seconds / 3600)  # 36 MB/h, once it is warm
  sizes[60] = np.nan
  rate, error = soak.slope(seconds, sizes)
  assert rate == pytest.approx(36) and error == pytest.approx(0, abs=1e-6)


def _watched(step, growth=0., checkpoints=3, code=75):
  seconds = np.arange(0, 3600, 60.)
  return soak.Watched(code, seconds, 500 + growth * seconds / 3600, checkpoints, 1, np.full(10, step))


@pytest.mark.parametrize('data, failed', [
    (_watched(.101), None), (_watched(.101, growth=-50.), None), (_watched(.101, growth=25.), 'resident memory'),
    (_watched(.12), 'real-data step'), (_watched(.101, checkpoints=4), 'at most 4 checkpoints'), (_watched(.101, code=1), 'exit code 1')])
def test_each_figure_has_its_verdict(data, failed, capsys):
  seen = {'one_batch_before': _watched(.1), 'data': data, 'one_batch_after': _watched(.1)}
  figures = soak.judged(seen, keep=2)
  wrong = [said for said, good in figures['verdicts'].items() if not good]
  assert len(wrong) == (failed is not None) and all(failed in said for said in wrong)
  assert capsys.readouterr().out.count('PASS') == 4 - len(wrong)


_STAND_IN = '''
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / 'checkpoints/4').mkdir(parents=True)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
for step in range(1, 500):
  with open(folder / 'metrics.jsonl', 'a') as file:
    file.write(json.dumps({'step': step, 'steps_per_second': 1. if step == 1 else 50.}) + '\\n')
  time.sleep(.02)
  if stop:
    sys.exit(75)
'''


def test_a_run_is_watched_from_its_first_line_and_asked_to_stop(tmp_path, monkeypatch):
  monkeypatch.setattr(soak, '_EVERY', .02)
  seen = soak.watch([sys.executable, '-c', _STAND_IN, str(tmp_path)], tmp_path, seconds=1.)
  assert (seen.code, seen.checkpoints, seen.unfinished) == (75, 1, 0)
  assert 8 < len(seen.seconds) and 1 < seen.seconds[-1] < 5 and np.all(seen.megabytes > 3)
  np.testing.assert_allclose(seen.step_seconds, .02)  # the line of the step that compiles does not count


def test_a_run_that_ends_at_once_is_a_failure(tmp_path, monkeypatch):
  monkeypatch.setattr(soak, '_EVERY', .02)
  with pytest.raises(failures.Failure, match='ended with exit code 2 before it could be watched'):
    soak.watch([sys.executable, '-c', 'raise SystemExit(2)'], tmp_path, seconds=1.)
