"""Zero-shot evaluation: a run is evaluated on tasks of other configs with its own parameters; nothing is trained."""

import importlib.util
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

from tests.helpers import in_process, saved_run, tiny
from tests.helpers.processes import ROOT
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.config.schema import DataConfig
from uni_moe_jax.data.embedded import build
from uni_moe_jax.eval import suite
from uni_moe_jax.export import artifact
from uni_moe_jax.train import adaptation, loop, workdir
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.trained_run import TrainedRun
from uni_moe_jax.utils.errors import UsageError

_FILE = ROOT / 'configs' / 'zero_shot.py'


def _config(router):
  """Text alone; images of 32 pixels, as digits have."""
  c = tiny.config('package', data_dir=tiny.data_dir())
  c.model.update(dict(image_size=32, patch_size=16, num_layers=1))
  c.moe.router = router
  c.tokenizer.path = tiny.tokenizer_file()
  c.evaluators.package = config_lib.evaluator('classification', 'package', split='train')
  return c


@pytest.fixture(autouse=True, scope='module')
def _digits():
  build.build(DataConfig(dir=tiny.data_dir()), 1, ['digits'])


@pytest.fixture(name='run', scope='module')
def _run(tmp_path_factory):
  """(workdir, config, parameters) of a run that was at its second step."""
  folder, c = tmp_path_factory.mktemp('attribute'), _config('attribute')
  return folder, c, saved_run.save(folder, c, step=2)


@pytest.fixture(name='one_device')
def _one_device(monkeypatch):
  """Commands build runs on one device."""
  build = train_run.build
  monkeypatch.setattr(train_run, 'build', lambda c, *_, **given: build(c, jax.devices()[:1], **given))


def _zero_shot(argument):
  """configs/zero_shot.py, as the command line reads it."""
  spec = importlib.util.spec_from_file_location('zero_shot', _FILE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument)


def test_its_parameters_are_those_of_the_run(run, tmp_path, capsys):
  folder, _, trained = run
  params = saved_run.load(adaptation.zero_shot(f'run={folder},task=package'), tmp_path)[2]
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), trained)
  assert f'starts from {folder}; fresh: nothing; dropped: nothing' in capsys.readouterr().out


@pytest.mark.parametrize('task, task_type', [
    ('digits', 'image_classification'), pytest.param('digit_question', 'vqa', marks=pytest.mark.nightly),
    ('digit_word', 'image_word')])
def test_a_new_task_and_a_new_task_type_are_config_alone(run, tmp_path, task, task_type):
  c = _zero_shot(f'run={run[0]},task={task}')
  assert c.tasks[task].type == task_type
  # The run was not trained on the conditions that are evaluated: attribute routing reads their bits.
  trained, queried = ([str(condition)[:8] for condition in make_plan(config).conditions] for config in (run[1], c))
  assert queried[0] not in trained
  c.evaluators[next(iter(c.evaluators))].num_examples = 20
  made, predictor, _ = saved_run.load(c, tmp_path)
  rows = suite.evaluate(made.plan, made.data, predictor, 0, tmp_path)
  assert rows[0]['chance'] == 0.1 and rows[0]['count'] == 20
  assert set(rows[0]['baselines']) == {'majority', 'nearest neighbor'}
  assert json.loads((tmp_path / suite.EVALUATION_FILE).read_text()) == rows


def test_it_is_evaluated_again_after_more_steps_by_another_evaluator_and_of_another_model(
    run, one_device, tmp_path, capfd):
  folder, trained = tmp_path / 'run', train_run.build(run[1])
  shutil.copytree(run[0], folder)

  def evaluated(*more):
    arguments = f'--config={_FILE}:run={folder},task=package', f'--workdir={tmp_path / "new"}', *more
    assert in_process.run(ROOT / 'launch/evaluate.py', *arguments) == 0
    return 'is already evaluated' not in capfd.readouterr().out

  assert evaluated() and not evaluated()
  assert evaluated('--config.evaluators.package.num_examples=3')
  assert workdir.load_config(tmp_path / 'new').evaluators.package.num_examples == 3  # as other commands read it
  with Checkpoints(folder, 2) as checkpoints:
    checkpoints.save(5, trained.state_from(run[2]))
  assert evaluated('--config.evaluators.package.num_examples=0')
  assert suite.evaluated_step(tmp_path / 'new') == 5 and not evaluated()
  shutil.rmtree(folder / 'checkpoints/5')
  with Checkpoints(folder, 2) as checkpoints:  # another model of as many steps
    checkpoints.save(5, trained.state_from(jax.tree.map(lambda x: 2 * x, run[2])))
  assert evaluated()


def test_the_best_checkpoint_and_that_of_a_step_are_those_of_the_run(run, tmp_path):
  folder, c = shutil.copytree(run[0], tmp_path / 'run'), workdir.load_config(run[0])
  trained = train_run.build(c, jax.devices()[:1])
  with Checkpoints(folder, 2) as checkpoints:
    checkpoints.save(5, trained.state_from(jax.tree.map(lambda x: 2 * x, run[2])), {'loss/total': 2.})
    checkpoints.add_metrics(2, {'loss/total': 1.})
  zero_shot, new = adaptation.zero_shot(f'run={folder},task=package'), tmp_path / 'new'
  workdir.claim_workdir(new, zero_shot, trained.data.fingerprint)
  best = lambda: train_run.find_step(zero_shot, make_plan(zero_shot), None, str(new), best=True)
  with pytest.raises(UsageError, match=f'{folder} has no best checkpoint'):
    best()
  c.train.best_metric = 'loss/total'
  workdir.claim_workdir(folder, c, trained.data.fingerprint, extends=True)
  assert best() == 2
  for step, factor in ((best(), 1), (None, 2)):
    params = jax.device_get(TrainedRun.load(new, step)._params)
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(lambda x, by=factor: by * x, run[2]))
  with pytest.raises(UsageError, match='has no checkpoint of step 4; it has those of 2, 5'):
    TrainedRun.load(new, 4)


def test_it_and_its_export_name_the_step_that_they_read_and_the_export_has_the_rows_of_the_evaluation(
    run, one_device, tmp_path, monkeypatch, capfd):
  exports = []
  monkeypatch.setattr(artifact, 'write', lambda *given: exports.append(given) or 'weights')
  workdir_flag, output = f'--workdir={tmp_path / "new"}', f'--output={tmp_path / "out"}'
  folder = shutil.copytree(run[0], tmp_path / 'run')
  damaged = shutil.copytree(folder / 'checkpoints/2', folder / 'checkpoints/5')
  saved_run.flip_bit(damaged / saved_run.largest_file(damaged))
  arguments = f'--config={_FILE}:run={folder},task=package', workdir_flag
  assert in_process.run(ROOT / 'launch/evaluate.py', *arguments) == 0
  assert in_process.run(ROOT / 'launch/export.py', workdir_flag, output) == 0
  [(_, _, provenance, rows, *_)] = exports
  printed = capfd.readouterr()
  assert provenance['step'] == 2 and f'{tmp_path / "out"}: step 2, ' in printed.out and '--best' not in printed.err
  assert {(row['evaluator'], row['step']) for row in rows} == {('package', 2)}
  monkeypatch.setitem(sys.modules, 'torch', None)  # not installed, which is reported before the export
  assert in_process.run(ROOT / 'launch/export.py', workdir_flag, output, '--torch') == 2 and len(exports) == 1


def test_the_new_task_type_has_attribute_bits_by_rule_and_targets_of_a_known_family(run):
  plan = train_run.build(_zero_shot(f'run={run[0]},task=digit_word'), jax.devices()[:1]).plan
  # Images in, text out; a visual input token. Words: 11 (both inputs), 01 (text), 01 (text), 1 (target), 0.
  assert [str(c)[:8] for c in plan.conditions] == ['10011000', '11010110']


def test_a_task_router_accepts_known_names_and_reports_unknown_ones(tmp_path):
  workdir.claim_workdir(tmp_path, _config('task'), 'print')
  workdir.copy_tokenizer(tmp_path, pathlib.Path(tiny.tokenizer_file()))
  for task in ('digits', 'digit_question'):
    assert train_run.build(_zero_shot(f'run={tmp_path},task={task}'), jax.devices()[:1]).plan.probes
  message = "router='task': .* has no embedding for image_word; it has .*Give the task type one of"
  with pytest.raises(ValueError, match=message):
    train_run.build(_zero_shot(f'run={tmp_path},task=digit_word'), jax.devices()[:1])
  known = _zero_shot(f'run={tmp_path},task=digit_word')
  known.task_types.image_word.router_task = 'classification'
  assert train_run.build(known, jax.devices()[:1]).plan.probes


def test_a_config_that_trains_nothing_is_refused_by_training(run, tmp_path):
  with pytest.raises(ValueError, match='nothing to train'):
    loop.train(adaptation.zero_shot(f'run={run[0]},task=package'), str(tmp_path / 'new'), jax.devices()[:1])
  assert not (tmp_path / 'new').exists()
  assert workdir.load_config(run[0]).tasks.package.batch_size > 0
