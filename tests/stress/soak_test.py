"""The figures of the soak, computed by hand, and its observation of a stand-in."""

import dataclasses
import json
import os
import sys
import time

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from tests.stress import soak
from tests.stress.trainer import CONFIG
from uni_moe_jax.utils.errors import RunError


def test_the_slope_ignores_the_warm_up():
  seconds = np.arange(0, 7200, 60.)
  sizes = np.where(seconds < 1800, 10 * seconds, 500 + 36 * seconds / 3600)  # 36 MB/h, after the warm-up
  sizes[60] = np.nan
  rate, error = soak.slope(seconds, sizes, 15)
  assert rate == pytest.approx(36, abs=.1) and error < .1
  rate, error = soak.slope(seconds, sizes)
  assert rate == pytest.approx(36, abs=.1) and error < .1


def test_buffers_of_steps_and_saves_do_not_hide_growth():
  rng, seconds = np.random.default_rng(0), np.arange(0, 2400, 5.)
  level = 2800 + 36 * seconds / 3600
  sizes = level - 400 * (rng.random(len(seconds)) < .15) + 90 * (rng.random(len(seconds)) < .03)
  rate, error = soak.slope(seconds, sizes, 15)
  assert abs(rate - 36) < 10 and error < 10
  # The samples themselves are too noisy.
  assert soak.slope(seconds, sizes)[1] > 30


def test_a_turn_is_compared_with_the_turns_around_it():
  constant = [[.1, .1, .4], [.2], [.4, .4], []]  # a machine that gets slower
  data = [[.15, .3, .15], [.36], [], [.4]]
  np.testing.assert_allclose(soak.ratios(data, constant), [.15 / .15, .36 / .3])


def _observation(step, growth=0., stays=0., noise=0., checkpoints=3, code=75, minutes=60., kept=(40, 45)):
  seconds = np.linspace(0, 60 * minutes, 60)
  turns = [[s] * 3 for s in np.broadcast_to(step, 4).tolist()]
  saved = seconds[::3]
  sizes = 300 + stays * saved / 3600 + noise * np.resize([1, -1], len(saved))
  megabytes = (500 + growth * seconds / 3600).tolist()
  after_saves = list(zip(saved.tolist(), sizes.tolist()))
  return soak.Observation(seconds.tolist(), megabytes, [0.] * 60, after_saves, turns, checkpoints, 1, list(kept), code)


@pytest.mark.parametrize('data, load, failed', [
    (_observation(.101), .4, None), (_observation(.101), .6, 'load average before the start 0.60'),
    (_observation(.101, growth=-50.), .4, None),
    (_observation(.101, growth=25.), .4, 'its upper quartiles between saves'),
    (_observation(.101, stays=25.), .4, 'resident memory after saves'),
    (_observation(.101, noise=20.), .4, 'its standard error is at most 10'),
    (_observation(.106), .4, 'step on the data / step'), (_observation([.08, .103, .18, .1]), .4, 'its standard error'),
    (_observation(.101, minutes=59.), .4, 'observed for 59.00 minutes'),
    (_observation(.101, code=0, minutes=59.), .4, 'observed for 59.00 minutes'),
    (_observation(.101, kept=(30, 39)), .4, 'step 39 (at least 40'),
    (_observation(.101, checkpoints=0, kept=()), .4, 'step 0 (at least 40'),
    (_observation(.101, checkpoints=4), .4, 'at most 4 checkpoints'),
    (_observation(.101, kept=(30, 40, 45)), .4, '3 checkpoints are left'),
    (_observation(.101, code=1), .4, 'exit code 1')])
def test_each_figure_has_its_verdict(data, load, failed, capsys):
  figures = soak.evaluate(data, _observation(.1), minutes=60., max_checkpoints=2, checkpoint_every=10, load=load)
  wrong = [sentence for sentence, passed in figures['verdicts'].items() if not passed]
  assert len(wrong) == (failed is not None) and all(failed in sentence for sentence in wrong)
  assert capsys.readouterr().out.count('PASS') == 11 - len(wrong)
  assert len(json.loads(json.dumps(figures))['observed']['data']['load']) == 60


def test_the_error_of_the_ratio_is_that_of_a_median():
  # Ratios 1, 1.01, 1.02: quartiles 1.005 and 1.015, a deviation of .01 / 1.349; √(π / 2 / 3) = 0.7236.
  figures = soak.evaluate(_observation([.1, .101, .102, .1]), _observation(.1), 60., 2, 10, 0.)
  assert figures['ratio'] == pytest.approx(1.01)
  assert figures['ratio_error'] == pytest.approx(.7236 * .01 / 1.349, rel=1e-3)


def test_too_few_turns_are_an_error():
  with pytest.raises(RunError, match=r'\(exit code 75\).*\(exit code 1\) ended before they could be compared'):
    soak.evaluate(_observation(.1), soak.Observation(turns=[[.1]], code=1), 60., 2, 10, 0.)


def test_too_few_saves_are_an_error():
  data = _observation(.1)
  with pytest.raises(RunError, match='saved too rarely: .*lower config.train.checkpoint_every'):
    soak.evaluate(dataclasses.replace(data, after_saves=data.after_saves[:7]), _observation(.1), 60., 2, 10, 0.)
  soak.evaluate(dataclasses.replace(data, after_saves=data.after_saves[:8]), _observation(.1), 60., 2, 10, 0.)


_SMALL = str(CONFIG)


@pytest.mark.parametrize('written', [
    ['--config', _SMALL, '--config.train.steps', '7', '--config.model.video_mean=(.5,.25,.5)',
     '--config.mesh.fsdp=True'],
    [f'--config={_SMALL}', '--config.train.steps=7', '--config.model.video_mean=(.5,.25,.5)', '--config.mesh.fsdp']])
def test_the_runs_get_the_config_for_every_spelling_of_its_flags(written):
  def parsed(arguments):
    argv = ['soak', *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    values(argv)
    return values['config']

  original = parsed(written)
  arguments = soak.config_arguments(original)
  assert all(a.startswith('--config') and '=' in a for a in arguments) and len(arguments) == 4
  got = parsed(arguments).value
  assert got.to_dict() == original.value.to_dict()
  assert (got.train.steps, got.model.video_mean, got.mesh.fsdp) == (7, (.5, .25, .5), True)


_STAND_IN = '''
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / 'checkpoints/4').mkdir(parents=True)
(folder / 'checkpoints/4/commit_success.txt').write_text('committed')
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
last = time.monotonic()
for step in range(int(sys.argv[2])):
  time.sleep(.02)
  now = time.monotonic()
  with open(folder / 'metrics.jsonl', 'a') as file:
    file.write(json.dumps({'step': step, 'steps_per_second': 1 / (now - last)}) + '\\n')
  last = now
  if stop:
    sys.exit(75)
'''


def _stand_in(folder, monkeypatch, steps):
  monkeypatch.setattr(soak, '_SAMPLE_EVERY', .01)
  soak.after_saves_file(folder).write_text('281.5\n281.')  # the second line is incomplete
  return soak.Turns([sys.executable, '-c', _STAND_IN, str(folder), str(steps)], folder, os.environ)


def test_a_run_is_suspended_between_its_turns_and_stopped_at_the_end(tmp_path, monkeypatch):
  with _stand_in(tmp_path, monkeypatch, 5000) as run:
    assert run.turn(.3)
    lines = (tmp_path / 'metrics.jsonl').read_text()
    time.sleep(.5)
    assert (tmp_path / 'metrics.jsonl').read_text() == lines  # suspended
    assert run.turn(.3) and run.turn(9., until=.8)
    observed = run.end()
  assert (observed.code, observed.checkpoints, observed.unfinished, observed.kept) == (75, 1, 0, [4])
  [(when, size)] = observed.after_saves
  assert size == 281.5 and when < .3
  assert len(observed.turns) == 3
  assert all(len(turn) >= 3 and max(turn) < .45 for turn in observed.turns[:2])  # without the pauses
  assert .8 <= observed.seconds[-1] < 5 and observed.seconds == sorted(observed.seconds)
  assert len(observed.seconds) == len(observed.megabytes) > 8
  assert min(observed.megabytes) > 3 and min(observed.load) >= 0


def test_a_turn_ends_with_the_run(tmp_path, monkeypatch):
  with _stand_in(tmp_path, monkeypatch, 10) as run:
    assert not run.turn(60.)
    observed = run.end()
  assert observed.code == 0 and len(observed.turns) == 1


def test_a_run_that_ends_at_once_is_an_error(tmp_path, monkeypatch):
  with pytest.raises(RunError, match='ended with exit code 1 before its first log line'):
    _stand_in(tmp_path, monkeypatch, 'none')
