"""Evaluation during training: it changes nothing, measures what a checkpoint has, and chooses the best one."""

import contextlib
import json
import shutil
import signal

import chex
import jax
import numpy as np
import pytest

from tests.helpers import saved_run, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.eval import predictor, suite
from uni_moe_jax.eval.metrics import Score
from uni_moe_jax.train import loop, validation
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.metrics_log import TIMINGS
from uni_moe_jax.train.workdir import saved_steps
from uni_moe_jax.utils.errors import UsageError

_METRIC = 'eval/masked/perplexity'


def _config(**train):
  c = tiny.config('text', data_dir=tiny.data_dir())
  c.model.num_layers, c.seed = 1, 2  # of this seed the later steps are the better ones
  c.evaluators.masked = config_lib.evaluator('mlm', 'text', split='train', batch_size=8, during_training=True)
  c.evaluators.afterwards = config_lib.evaluator('mlm', 'text', split='train', batch_size=8)
  c.train.update(dict(steps=5, ema_decay=0.5, checkpoint_every=2, max_to_keep=3, **train))
  return c


def _train(workdir, config):
  assert loop.train(config, str(workdir), jax.devices()[:1]) == loop.FINISHED
  return workdir


@pytest.fixture(scope='module', autouse=True)
def _one_step():
  with pytest.MonkeyPatch.context() as patch:
    saved_run.share_steps(patch)
    yield


@pytest.fixture(scope='module')
def run():
  return train_run.build(_config(evaluate_every=2), jax.devices()[:1])


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
  return _train(tmp_path_factory.mktemp('evaluated'), _config(evaluate_every=2, best_metric=_METRIC))


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  return _train(tmp_path_factory.mktemp('plain'), _config())


def _lines(workdir, evaluations: bool):
  return [line for line in saved_run.lines(workdir) if ('loss/total' not in line) == evaluations]


def _measured(run, params) -> dict[str, float]:
  [e] = [e for e in run.plan.evaluations if e.during_training]
  return {f'eval/masked/{s.name}': s.value for s in suite.scores(e, run.data, run.predictor(params), {})}


@pytest.mark.nightly
def test_evaluation_changes_no_bit_of_training(run, evaluated, plain):
  chex.assert_trees_all_equal(saved_run.state(run, evaluated, 5), saved_run.state(run, plain, 5))
  assert _lines(evaluated, False) == _lines(plain, False) and len(_lines(plain, False)) == 5
  assert _lines(plain, True) == []
  early, late = (saved_run.state(run, plain, step)[1].params for step in (2, 5))  # the control: parameters do move
  assert sum(jax.tree.leaves(jax.tree.map(lambda a, b: not np.array_equal(a, b), early, late))) > 10


def test_every_other_step_and_the_last_are_measured_as_their_checkpoints_are(run, evaluated):
  lines = _lines(evaluated, True)
  assert [line.pop('step') for line in lines] == [2, 4, 5]
  for step, line in zip((2, 4, 5), lines, strict=True):
    _, state = saved_run.state(run, evaluated, step)
    # Averaged parameters, and target sets that are encoded with them: those of an earlier step would differ.
    assert line == _measured(run, state.ema_params) != _measured(run, state.params)
    manifest = json.loads((evaluated / f'checkpoints/{step}/manifest.json').read_text())
    assert {name: manifest['metrics'][name] for name in line} == line and 'loss/total' in manifest['metrics']
  assert len({line[_METRIC] for line in lines}) == 3


def test_checkpoints_have_the_digests_of_the_data_of_evaluators_that_run_in_training(run, evaluated, plain):
  manifests = [folder / 'checkpoints/4/manifest.json' for folder in (evaluated, plain)]
  recorded = [json.loads(path.read_text())['evaluation_data'] for path in manifests]
  assert recorded == [validation.Validation(run, None).fingerprints(), {}] and [*recorded[0]] == ['masked']


def _train_with_a_stop_in(step, workdir):
  """Trains until a stop is requested while a step is taken; None: no stop."""
  class Stop(loop.Stop):
    requested = property(lambda _: step is not None and any(
        line['step'] >= step for line in map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())))

  return loop.train(_config(evaluate_every=2, best_metric=_METRIC), str(workdir), jax.devices()[:1], stop=Stop())


def _metrics(workdir, step):
  """What a checkpoint has of the metrics of its step, without times."""
  manifest = json.loads((workdir / f'checkpoints/{step}/manifest.json').read_text())
  return {k: v for k, v in manifest['metrics'].items() if k not in TIMINGS}


@pytest.mark.nightly
def test_an_evaluation_that_a_stop_prevents_is_made_up_for_by_the_next_start(run, evaluated, tmp_path, capfd):
  measured = lambda: [line['step'] for line in _lines(tmp_path, True)]
  assert _train_with_a_stop_in(4, tmp_path) == loop.PREEMPTED and measured() == [2]
  assert _train_with_a_stop_in(5, tmp_path) == loop.PREEMPTED and measured() == [2, 4]
  assert 'stopped at step 5 of 5 before its evaluation; the same command continues' in capfd.readouterr().out
  assert _train_with_a_stop_in(0, tmp_path) == loop.PREEMPTED and measured() == [2, 4]  # it makes up for nothing
  for _ in range(2):
    capfd.readouterr()
    assert _train_with_a_stop_in(None, tmp_path) == loop.FINISHED
    assert 'is finished: 5 of 5 steps' in capfd.readouterr().out

  assert saved_run.lines(tmp_path) == saved_run.lines(evaluated) and measured() == [2, 4, 5]
  best = []
  for workdir in (tmp_path, evaluated):
    with Checkpoints(workdir, None, _METRIC) as checkpoints:
      assert checkpoints.steps() == [2, 4, 5]
      best.append(checkpoints.best())
  assert best[0] == best[1] != 2  # step 2 alone was measured before the first signal
  assert [_metrics(tmp_path, step) for step in (2, 4, 5)] == [_metrics(evaluated, step) for step in (2, 4, 5)]
  chex.assert_trees_all_equal(saved_run.state(run, tmp_path, 5), saved_run.state(run, evaluated, 5))


def test_a_finished_run_is_evaluated_when_evaluations_are_switched_on_later(plain, tmp_path):
  workdir = shutil.copytree(plain, tmp_path / 'plain')
  _train(workdir, _config(evaluate_every=2))
  assert [line['step'] for line in _lines(workdir, True)] == [5]


def _scores(monkeypatch, scores):
  """Has evaluators call a function instead of measuring."""
  monkeypatch.setattr(validation.suite, 'scores', scores)


def test_a_run_whose_evaluations_have_no_finite_value_finishes(plain, tmp_path, monkeypatch):
  workdir = shutil.copytree(plain, tmp_path / 'plain')
  _scores(monkeypatch, lambda *_: [Score('accuracy', float('nan'), 1)])
  _train(workdir, _config(evaluate_every=2))
  assert _lines(workdir, True) == []


def test_the_best_checkpoint_is_kept_and_an_evaluation_that_fails_is_repeated_by_the_next_start(
    tmp_path, monkeypatch):
  values = iter([.1, None, .9, .5])

  def scores(*_):
    if (value := next(values)) is None:
      raise OSError('the disk is full')
    return [Score.proportion('accuracy', value, 10)]

  _scores(monkeypatch, scores)
  config = _config(evaluate_every=2, best_metric='eval/masked/accuracy')
  config.train.max_to_keep = 1
  with pytest.raises(OSError, match='the disk is full'):
    _train(tmp_path, config)
  assert saved_steps(tmp_path) == [2, 4]  # the evaluation of step 4 failed
  _train(tmp_path, config)
  measured = [(line['step'], line['eval/masked/accuracy']) for line in _lines(tmp_path, True)]
  assert measured == [(2, .1), (4, .9), (5, .5)]
  with Checkpoints(tmp_path, None, config.train.best_metric) as checkpoints:
    assert (checkpoints.steps(), checkpoints.best()) == ([4, 5], 4)


def test_a_split_that_is_missing_is_refused_before_the_first_step(tmp_path):
  config = _config(evaluate_every=2)
  config.evaluators.masked.split = 'validation'
  with pytest.raises(UsageError, match="split 'validation'"):
    _train(tmp_path / 'run', config)
  assert not (tmp_path / 'run').exists()
  config.train.evaluate_every = 0  # nothing reads it in training
  validation.Validation(train_run.build(config, jax.devices()[:1]), None)


def _on_inputs(monkeypatch, call):
  """Has evaluators call a function after each batch."""
  inputs = predictor.Predictor.inputs
  monkeypatch.setattr(predictor.Predictor, 'inputs', lambda *args: [inputs(*args), call()][0])


def test_an_evaluation_ends_before_the_next_batch_once_the_run_is_to_stop(run, monkeypatch):
  made = []
  _on_inputs(monkeypatch, lambda: made.append(1))
  measure, state = validation.Validation(run, lambda *_: contextlib.nullcontext()), train_run.initial_state(run)
  assert measure(2, state, lambda: False)
  num_batches = len(made)
  made.clear()
  assert measure(2, state, lambda: bool(made)) is None
  assert len(made) == 1 < num_batches


@pytest.mark.nightly
def test_a_signal_during_an_evaluation_saves_its_step(tmp_path, monkeypatch):
  made = []
  _on_inputs(monkeypatch, lambda: made.append(1) or len(made) > 1 or signal.raise_signal(signal.SIGTERM))
  config = _config(evaluate_every=2)
  config.train.checkpoint_every = 4
  assert loop.train(config, str(tmp_path), jax.devices()[:1]) == loop.PREEMPTED
  assert len(made) == 1 and saved_steps(tmp_path) == [2] and _lines(tmp_path, True) == []


def test_a_run_that_is_to_stop_measures_nothing_more(run, monkeypatch):
  ran, phases = [], []
  scores = [Score('accuracy', .5, 1), Score('perplexity', float('nan'), 1)]
  _scores(monkeypatch, lambda e, *_: [ran.append((e.name, e.baselines)), scores][1])
  measure = validation.Validation(run, lambda *phase: contextlib.nullcontext(phases.append(phase)))
  state = run.abstract_state()
  assert measure(4, state, lambda: True) is None and not ran
  assert measure(4, state, lambda: False) == {'eval/masked/accuracy': .5}  # without what is not finite
  assert ran == [('masked', False)]  # baselines do not change while a model trains
  assert phases == [('evaluating the parameters', 4)] * 2
  assert [step for step in range(1, 6) if measure.is_due(step)] == [2, 4, 5]


def test_an_evaluation_is_missing_if_it_is_due_and_not_logged(run, tmp_path):
  measure = validation.Validation(run, None)
  missing = lambda: [step for step in range(6) if measure.is_missing(step, tmp_path)]
  assert missing() == [2, 4, 5]  # not at step 0, where training starts
  rows = {'step': 2, 'eval/masked/accuracy': .5}, {'step': 3, 'eval/masked/accuracy': .5}, {'step': 4, 'loss/total': 1.}
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows) + '{"step": 5, "eva')
  assert missing() == [4, 5]


def test_a_metric_that_few_targets_do_not_have_is_refused_before_the_first_step():
  c = tiny.config('shape', data_dir=tiny.data_dir())
  c.evaluators.three = config_lib.evaluator('classification', 'shape', split='train', during_training=True)
  c.train.update(dict(evaluate_every=50, best_metric='eval/three/top-5'))
  run = train_run.build(c, jax.devices()[:1])
  with pytest.raises(UsageError, match=r"best_metric='eval/three/top-5' is not measured among 3 targets"):
    validation.Validation(run, None)
  run.config.train.best_metric = 'eval/three/top-1'
  validation.Validation(run, None)
