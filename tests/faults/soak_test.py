"""The soak's figures by hand, and how it watches a stand-in."""

import json
import os
import pathlib
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from uni_moe_jax import failures
from uni_moe_jax.faults import soak


def test_slope_is_that_of_a_line_after_the_warm_up():
  seconds = np.arange(0, 7200, 60.)
  sizes = np.where(seconds < 1800, 10 * seconds, 500 + 36 * seconds / 3600)  # 36 MB/h, once it is warm
  sizes[60] = np.nan
  rate, error = soak.slope(seconds, sizes)
  assert rate == pytest.approx(36) and error == pytest.approx(0, abs=1e-6)


def _watched(step, growth=0., checkpoints=3, code=75, minutes=60., kept=(40, 45)):
  seconds = np.linspace(0, 60 * minutes, 60)
  return soak.Watched(code, seconds, 500 + growth * seconds / 3600, 0 * seconds, checkpoints, 1, list(kept), np.full(10, step))


@pytest.mark.parametrize('data, after, load, failed', [
    (_watched(.101), .1, .4, None), (_watched(.101), .1, .6, 'the load average was 0.60'),
    (_watched(.101, growth=-50.), .1, .4, None), (_watched(.101, growth=25.), .1, .4, 'resident memory'),
    (_watched(.12), .1, .4, 'real-data step'), (_watched(.101), .104, .4, 'before and 104.0 ms after'),
    (_watched(.101, minutes=59.), .1, .4, 'watched for 59.00 minutes'),
    (_watched(.101, code=0, minutes=59.), .1, .4, 'watched for 59.00 minutes'),
    (_watched(.101, kept=(30, 39)), .1, .4, 'step 39 (at least 40'),
    (_watched(.101, checkpoints=0, kept=()), .1, .4, 'step 0 (at least 40'),
    (_watched(.101, checkpoints=4), .1, .4, 'at most 4 checkpoints'), (_watched(.101, kept=(30, 40, 45)), .1, .4, '3 checkpoints are left'),
    (_watched(.101, code=1), .1, .4, 'exit code 1')])
def test_each_figure_has_its_verdict(data, after, load, failed, capsys):
  seen = {'one_batch_before': _watched(.1), 'data': data, 'one_batch_after': _watched(after)}
  figures = soak.judged(seen, minutes=60., keep=2, save_every=10, load=load)
  wrong = [said for said, good in figures['verdicts'].items() if not good]
  assert len(wrong) == (failed is not None) and all(failed in said for said in wrong)
  assert capsys.readouterr().out.count('PASS') == 9 - len(wrong)
  assert len(json.loads(json.dumps(figures))['samples']['data']['load']) == 60


_SMALL = str(pathlib.Path(__file__).resolve().parents[2] / 'configs/small.py')


@pytest.mark.parametrize('written', [
    ['--config', _SMALL, '--config.train.steps', '7', '--config.model.video_mean=(.5,.25,.5)', '--config.mesh.fsdp=True'],
    [f'--config={_SMALL}', '--config.train.steps=7', '--config.model.video_mean=(.5,.25,.5)', '--config.mesh.fsdp']])
def test_the_runs_get_the_config_however_its_flags_are_written(written):
  def parsed(arguments):
    argv = ['soak', *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    values(argv)
    return values['config']

  asked = parsed(written)
  passed_on = soak.arguments_of(asked)
  assert all(a.startswith('--config') and '=' in a for a in passed_on) and len(passed_on) == 4
  got = parsed(passed_on).value
  assert got.to_dict() == asked.value.to_dict()
  assert (got.train.steps, got.model.video_mean, got.mesh.fsdp) == (7, (.5, .25, .5), True)


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
  seen = soak.watch([sys.executable, '-c', _STAND_IN, str(tmp_path)], tmp_path, seconds=1., environment=os.environ)
  assert (seen.code, seen.checkpoints, seen.unfinished, seen.kept) == (75, 1, 0, [4])
  assert 8 < len(seen.seconds) and 1 < seen.seconds[-1] < 5 and np.all(seen.megabytes > 3) and np.all(seen.load >= 0)
  np.testing.assert_allclose(seen.step_seconds, .02)  # the line of the step that compiles does not count


def test_a_run_that_ends_at_once_is_a_failure(tmp_path, monkeypatch):
  monkeypatch.setattr(soak, '_EVERY', .02)
  with pytest.raises(failures.Failure, match='ended with exit code 2 before it could be watched'):
    soak.watch([sys.executable, '-c', 'raise SystemExit(2)'], tmp_path, seconds=1., environment=os.environ)
