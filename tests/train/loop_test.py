"""A run that is stopped and started again ends like one that is not."""

import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from tests.helpers import in_process, processes, saved_run, tiny
from tests.helpers.stop_request import StopAfterThreeSteps
from tests.stress import injected_faults
from uni_moe_jax import config as config_lib
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.data.batches import lookahead
from uni_moe_jax.io import files, locks
from uni_moe_jax.train import loop, metrics_log
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train.workdir import claim_workdir, saved_step, saved_steps
from uni_moe_jax.utils import signals


def _config():
  c = tiny.config('shape', 'package', data_dir=tiny.data_dir())
  c.model.num_layers = 1  # compiles sooner
  c.train.update(dict(steps=6, ema_decay=0.9, checkpoint_every=4, max_to_keep=1, keep_every=4))
  return c


@functools.cache
def _run():
  return train_run.build(_config(), jax.devices()[:1])


def _state(workdir):
  return saved_run.state(_run(), workdir)


@pytest.fixture(scope='module', autouse=True)
def _one_step():
  with pytest.MonkeyPatch.context() as patch:
    saved_run.share_steps(patch)
    yield


@pytest.mark.nightly
def test_compiling_ahead_trains_nothing_and_creates_no_work_directory(tmp_path, capsys):
  assert loop.compile_steps(_config(), str(tmp_path / 'run'), jax.devices()[:1]) == loop.FINISHED
  assert 'compiled after' in capsys.readouterr().out
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('weights, num_drawn', [((1., 1.), 2), ((1., 1e-9), 1), ((1., .02), 2)])
def test_compiling_ahead_is_for_the_first_batch_of_each_task_that_the_run_draws(
    tmp_path, monkeypatch, weights, num_drawn):
  c, compiled = _config(), []
  c.train.update(dict(mixture='one_task', steps=100))
  for task, weight in zip(c.tasks.values(), weights, strict=True):
    task.sampling_weight = weight
  batches = dict(reversed(list(train_run.build(c, jax.devices()[:1]).mixture().iterate(0, 100))))  # first of each

  class Step:
    def __init__(self, task):
      self._task = task

    def lower(self, _, batch, __):
      compiled.append((self._task, jax.tree.map(np.asarray, batch)))
      return self

    def compile(self):
      pass

  monkeypatch.setattr(train_run.Run, 'step_fn', lambda _, task: Step(task))
  assert loop.compile_steps(c, str(tmp_path), jax.devices()[:1]) == loop.FINISHED
  assert len(compiled) == len(batches) == num_drawn
  chex.assert_trees_all_equal(dict(compiled), batches)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted')
  assert loop.train(_config(), str(workdir), jax.devices()[:1]) == loop.FINISHED
  return workdir


def test_multiples_of_keep_every_are_kept_beside_the_newest_checkpoint(uninterrupted):
  assert saved_steps(uninterrupted) == [4, 6]


def test_a_line_has_the_speed_of_its_steps(uninterrupted):
  images = sum(t.batch_size for t in _run().plan.tasks if t.type.visual)
  for line in map(json.loads, (uninterrupted / 'metrics.jsonl').read_text().splitlines()):
    assert set(metrics_log.TIMINGS) <= set(line)
    assert line['images_per_second'] == pytest.approx(images * line['steps_per_second'])
    assert line['input_wait_share'] == pytest.approx(line['input_wait'] * line['steps_per_second'])
    assert 0 <= line['input_wait_share'] < 1
    assert line['tokens_per_second'] > 0 and line['mfu'] > 0


@pytest.mark.nightly
def test_only_a_late_batch_counts_as_waiting_for_input(tmp_path, monkeypatch):
  ready = itertools.cycle([True, False])
  monkeypatch.setattr(lookahead.Lookahead, 'is_ready', property(lambda _: next(ready)))
  assert loop.train(_config(), str(tmp_path), jax.devices()[:1]) == loop.FINISHED
  waits = [json.loads(line)['input_wait'] for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [wait > 0 for wait in waits] == [False, False, True, False, True, False]  # the first step does not count


def test_a_step_of_two_micro_steps_has_the_products_of_one():
  counted = []
  for grad_accum_steps in (1, 2):
    c = _config()
    c.train.grad_accum_steps, c.moe.router = grad_accum_steps, 'dense'  # kernels are merged once per micro-step
    run = train_run.build(c, jax.devices()[:1])
    task, batch = next(run.mixture().iterate(0, 1))
    counted.append(run.step_flops(task, run.put_batch(batch), run.target_sets()))
  assert counted[0] == pytest.approx(counted[1], rel=1e-3) and counted[0] > 1e5


@pytest.fixture(scope='module')
def restarted(tmp_path_factory):
  """Stopped after three steps, then started again."""
  workdir = tmp_path_factory.mktemp('restarted')
  assert loop.train(_config(), str(workdir), jax.devices()[:1], stop=StopAfterThreeSteps()) == loop.PREEMPTED
  assert _state(workdir)[0] == 3
  assert loop.train(_config(), str(workdir), jax.devices()[:1]) == loop.FINISHED
  return workdir


class _Killed(Exception):
  pass


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
  """Killed in its sixth step, with a checkpoint of the fourth; then started again."""
  workdir = tmp_path_factory.mktemp('killed')

  def kill(log, step):
    if step == 6:
      raise _Killed
    return write(log, step)

  write = loop.MetricsLog.write
  with pytest.MonkeyPatch.context() as patch, pytest.raises(_Killed):
    patch.setattr(loop.MetricsLog, 'write', kill)
    loop.train(_config(), str(workdir), jax.devices()[:1])
  assert _state(workdir)[0] == 4
  assert [line['step'] for line in saved_run.lines(workdir)] == [1, 2, 3, 4, 5]
  assert loop.train(_config(), str(workdir), jax.devices()[:1]) == loop.FINISHED
  return workdir


@pytest.mark.parametrize('interrupted', [pytest.param('restarted', marks=pytest.mark.nightly), 'killed'])
def test_an_interrupted_run_ends_with_the_same_state_and_lines_bit_for_bit(uninterrupted, interrupted, request):
  workdir, (step, expected) = request.getfixturevalue(interrupted), _state(uninterrupted)
  assert step == 6
  chex.assert_trees_all_equal(_state(workdir), (6, expected))
  assert [line['step'] for line in saved_run.lines(uninterrupted)] == [1, 2, 3, 4, 5, 6]
  assert saved_run.lines(workdir) == saved_run.lines(uninterrupted)
  fresh = _run().init()  # the positive control: six steps did move parameters
  moved = jax.tree.map(lambda a, b: not np.array_equal(np.asarray(a), np.asarray(b)), expected.params, fresh.params)
  assert sum(jax.tree.leaves(moved)) > 20


def test_run_json_lists_other_commits_that_trained_a_run_and_a_damaged_one_is_written_again(tmp_path):
  commits, file = [], tmp_path / 'run.json'
  for newest in ('abc', 'abc', 'def', 'abc'):
    files.write_json(file, facts := loop._run_facts(_run(), file, newest))
    commits.append((facts.get('earlier_commits'), facts['commit']))
  assert commits == [(None, 'abc'), (None, 'abc'), (['abc'], 'def'), (['def'], 'abc')]
  file.write_text('{')
  assert 'earlier_commits' not in loop._run_facts(_run(), file, 'abc')


@pytest.fixture
def ignore_signals():
  """A signal that the loop does not catch must not end the test."""
  with signals.handled(lambda *_: None, signal.SIGTERM, signal.SIGINT):
    yield


@pytest.mark.usefixtures('ignore_signals')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_requests_a_stop_and_one_that_is_more_than_a_second_later_ends_the_process(number, monkeypatch, capfd):
  ended, stop, before = [], loop.Stop(), signal.getsignal(number)
  monkeypatch.setattr(os, '_exit', ended.append)
  with stop.on_signals():
    assert not stop.requested
    signal.raise_signal(number)
    assert stop.requested and not ended
    assert f'{number.name}: stopping after this step and saving' in capfd.readouterr().err
    signal.raise_signal(number)  # the same one, passed on by the process that started this one
    stop.repeat_after = 0.0
    signal.raise_signal(number)
    assert ended == [75]
  assert signal.getsignal(number) is before


@pytest.mark.usefixtures('ignore_signals')
def test_a_signal_during_a_step_stops_after_it_with_exit_code_75(tmp_path, capsys):
  def write(log, step):
    if step == 2:
      signal.raise_signal(signal.SIGTERM)
    return real(log, step)

  real = loop.MetricsLog.write
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.MetricsLog, 'write', write)
    assert loop.train(_config(), str(tmp_path), jax.devices()[:1]) == 75
  assert 'stopped at step 2 of 6; the same command continues' in capsys.readouterr().out
  assert _state(tmp_path)[0] == 2


def test_a_work_directory_in_which_another_process_trains_is_refused(tmp_path):
  with contextlib.ExitStack() as stack:
    assert locks.lock(tmp_path, stack) is None
    message = 'another process trains in .*: wait until it has ended, or give another --workdir'
    with pytest.raises(ValueError, match=message):
      loop.train(_config(), str(tmp_path), jax.devices()[:1])
  assert sorted(p.name for p in tmp_path.iterdir()) == ['.lock']  # nothing of the run that trains has changed


def _with_older_jax(workdir):
  """Changes the versions that a run was started with. Returns its config.json."""
  file = workdir / 'config.json'
  content = json.loads(file.read_text())
  file.write_text(json.dumps({**content, 'versions': {**content['versions'], 'jax': '0.1.0'}}))
  return file


def test_an_allowed_version_mismatch_is_recorded_once_no_other_process_trains_there(uninterrupted, tmp_path):
  shutil.copytree(uninterrupted, workdir := tmp_path / 'run')
  file = _with_older_jax(workdir)
  before = file.read_bytes()
  train = functools.partial(loop.train, _config(), str(workdir), jax.devices()[:1], allow_version_mismatch=True)
  with contextlib.ExitStack() as stack:
    assert locks.lock(workdir, stack) is None
    with pytest.raises(ValueError, match='another process trains in'):
      train()
  assert file.read_bytes() == before
  assert train() == loop.FINISHED
  content = json.loads(file.read_text())
  assert [content[k]['jax'] if k == 'versions' else content[k][0]['jax'] for k in ('versions', 'earlier_versions')] == [
      jax.__version__, '0.1.0']


def test_the_command_leaves_an_allowed_mismatch_to_the_loop_which_has_the_lock(tmp_path, monkeypatch):
  flag, workdir, passed = tiny.write_config(tmp_path / 'c.py', 'shape'), tmp_path / 'run', []
  claim_workdir(workdir, cli.config_from(flag.removeprefix('--config='), []), 'print')
  file = _with_older_jax(workdir)
  before = file.read_bytes()
  monkeypatch.setattr(loop, 'train', lambda *_, **options: passed.append(options['allow_version_mismatch']) or 0)
  command = processes.ROOT / 'launch/train.py', flag, f'--workdir={workdir}'
  assert in_process.run(*command, '--allow_version_mismatch') == 0 and passed == [True]
  assert file.read_bytes() == before
  assert in_process.run(*command) == 2 and passed == [True]


@pytest.mark.nightly
def test_where_folders_cannot_be_renamed_a_run_reports_it_at_the_start_and_ends_the_same(
    uninterrupted, tmp_path, monkeypatch, capfd):
  injected_faults.no_folder_renames(monkeypatch.setattr)
  assert loop.train(_config(), str(tmp_path), jax.devices()[:1]) == loop.FINISHED
  output, errors = capfd.readouterr()
  assert f'note: folders cannot be renamed in {tmp_path}' in errors and 'trained 6 steps' in output
  chex.assert_trees_all_equal(_state(tmp_path), _state(uninterrupted))


def test_a_finished_run_is_described_and_left_unchanged(uninterrupted, capsys):
  files = [uninterrupted / name for name in ('metrics.jsonl', 'run.json')]
  files[1].write_text(files[1].read_text().replace('"commit": "', '"commit": "of an earlier start, '))
  before = [file.read_text() for file in files]
  assert loop.train(_config(), str(uninterrupted), jax.devices()[:1]) == loop.FINISHED
  assert [file.read_text() for file in files] == before
  out, counts = capsys.readouterr().out, _run().parameter_counts()
  assert 'is finished: 6 of 6 steps' in out
  assert counts['active'] < counts['total']
  assert f'{counts["total"]:,} total, {counts["active"]:,} active per token' in out
  # package: text; shape: images; then label words and class names.
  assert 'router: attribute; 4 conditions: 01010100, 10011000, 11010110, 10010110' in out
  assert '\nnote: config.train.ema_decay=0.9: after 6 steps' in out


@pytest.mark.parametrize('steps, warmup, decay, expected', [
    (100, 200, 0., ['config.optim.warmup_steps=200 of 100 steps: the learning rate only rises, to 50% of ']),
    (100, 0, .99, ['config.train.ema_decay=0.99: after 100 steps the averaged parameters, which evaluation uses, still '
                   'contain 37% of ']),  # .99^100 = .366
    (100, 100, .98, ['config.optim.warmup_steps=100 of 100 steps: ', 'config.train.ema_decay=0.98: ']),  # .133
    (100, 99, .97, []),  # .048
    (100, 0, 0., [])])
def test_a_warm_up_or_an_average_longer_than_the_run_is_noted(steps, warmup, decay, expected):
  c = config_lib.base()
  c.train.steps, c.optim.warmup_steps, c.train.ema_decay = steps, warmup, decay
  notes = loop.notes(c)
  assert len(notes) == len(expected) and all(map(str.startswith, notes, expected))


@pytest.mark.nightly
@pytest.mark.parametrize('nonfinite, code', [((1, 2, 3), loop.ERROR), ((1, 2, 4, 5), loop.FINISHED)])
def test_losses_that_stay_nonfinite_stop_the_run_and_are_named(tmp_path, capsys, monkeypatch, nonfinite, code):
  put, calls, logged = train_run.Run.put_batch, [], itertools.count(1)

  def corrupt(run, batch):
    calls.append(len(calls))
    if calls[-1] in nonfinite:
      batch['image_classification']['weight'] = batch['image_classification']['weight'] * np.nan
    return put(run, batch)

  monkeypatch.setattr(train_run.Run, 'put_batch', corrupt)
  monkeypatch.setattr(train_run.Mixture, 'num_corrupt_examples', lambda *_: next(logged) // 2)
  c = _config()
  c.train.max_nonfinite_steps = 3
  assert loop.train(c, str(tmp_path), jax.devices()[:1]) == code
  errors = capsys.readouterr().err
  if code == loop.ERROR:
    assert '3 steps in a row up to step 4 were not finite (loss/shape, loss/total)' in errors
    assert 'parameters are those of step 1' in errors
    assert 'Lower config.optim.learning_rate' in errors
  else:
    assert not errors
    assert [line['skipped_steps'] for line in saved_run.lines(tmp_path)] == [0, 1, 2, 2, 3, 4]
    assert ['loss/shape' in line for line in saved_run.lines(tmp_path)] == [True, False, False, True, False, False]
    assert [line.get('corrupt_examples') for line in saved_run.lines(tmp_path)] == [None, 1, 1, 2, 2, 3]


@pytest.mark.nightly
def test_a_run_whose_output_nobody_reads_any_more_goes_on_until_a_signal_and_saves(tmp_path):
  flag, workdir = tiny.write_config(tmp_path / 'c.py', 'shape', steps=10_000), tmp_path / 'run'
  command = [sys.executable, 'launch/train.py', flag, f'--workdir={workdir}']
  with subprocess.Popen(command, cwd=processes.ROOT, env=processes.environment(1), stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT, text=True) as process:
    output = iter(process.stdout.readline, '')
    assert any(line.startswith('step 1/') for line in output)
    process.stdout.close()
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
  assert saved_step(workdir) == saved_run.lines(workdir)[-1]['step'] > 10


@pytest.mark.nightly
def test_a_real_signal_exits_75_and_the_same_command_ends_like_an_uninterrupted_run(tmp_path):
  config_flag = tiny.write_config(tmp_path / 'signalled.py', 'shape', steps=400)

  def command(name):
    return [sys.executable, 'launch/train.py', config_flag, f'--workdir={tmp_path / name}']
  processes.run(command('uninterrupted'), devices=1)
  assert 'the same command continues' in processes.stop(command('stopped'), tmp_path / 'stopped', 20, devices=1)
  processes.run(command('stopped'), devices=1)
  assert saved_run.lines(tmp_path / 'stopped') == saved_run.lines(tmp_path / 'uninterrupted')
