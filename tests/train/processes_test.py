"""Two processes of four devices: a step, a run that is stopped and continues, and its evaluation."""

import json
import pathlib
import re
import runpy
import shutil
import sys

import jax
import numpy as np
import pytest

from tests.helpers import in_process, process_step, processes, saved_run, tiny
from uni_moe_jax.data.shards import file_dataset, writer
from uni_moe_jax.io import storage


@pytest.mark.nightly
def test_loss_and_gradients_equal_those_of_one_device(tmp_path):
  """The launcher starts them, in a tree whose launch/train.py takes one step."""
  processes.copy_launcher(tmp_path)
  (tmp_path / 'launch/train.py').write_text(
      'import sys\nfrom tests.helpers import process_step\nprocess_step.main(*sys.argv[1:])\n')
  processes.run([*processes.TWO, '--', str(tmp_path), *process_step.CASES], folder=tmp_path)
  for i in range(2):
    out = json.loads((tmp_path / f'{i}.json').read_text())
    assert out['devices'] == [4, 8]
    # Batch shards of process i; where `model` spans both, each has the only one.
    assert out['shards'] == {'data': [4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3], 'halves': [i], 'model': [0]}
    assert set(out['cases']) == set(process_step.CASES)
    for name, result in out['cases'].items():
      assert result['loss'] <= 1e-5, name
      assert result['gradients'] <= 2e-5, name
      assert result['margin'] > 1e-5, name


_LAUNCH = processes.ROOT / 'launch'
_STEPS = 10  # up to two seconds each, where two cores serve eight devices in two processes
_CONFIG = '''
import sys
sys.path.insert(0, {root!r})
from tests.helpers import tiny
from uni_moe_jax import config


def get_config():
  c = tiny.config('shape', 'pair', data_dir={data!r})
  for task in c.tasks.values():
    task.batch_size = 8
  c.model.num_layers = 1
  for evaluator, task in (('classification', 'shape'), ('retrieval', 'pair')):
    c.evaluators[task] = config.evaluator(evaluator, task, split='train', batch_size=5, num_examples=6)
  c.evaluators.shape.during_training = True
  c.train.evaluate_every = 8
  c.moe.router = 'token'  # it sends what an attribute model sends, and tokens
  c.mesh.update(dict(data=-1, expert=2))
  c.train.update(dict(steps={steps}, checkpoint_every=1000, log_every=1))
  return c
'''


def _config(folder: pathlib.Path, steps: int = _STEPS) -> str:
  """Writes a config; the flag that names it."""
  (folder / 'config.py').write_text(_CONFIG.format(root=str(processes.ROOT), data=tiny.data_dir(), steps=steps))
  return f'--config={folder}/config.py'


def _two(tmp_path: pathlib.Path, name: str) -> list[str]:
  """The command that trains with two processes in the work directory `name`."""
  return [*processes.TWO, '--', _config(tmp_path), f'--workdir={tmp_path / name}']


@pytest.mark.nightly
def test_a_run_of_two_processes_stops_continues_and_evaluates_and_equals_that_of_one(tmp_path):
  processes.run(_two(tmp_path, 'undisturbed'))
  output = processes.stop(_two(tmp_path, 'stopped'), tmp_path / 'stopped', 2)
  assert output.count('the same command continues') == 1, output  # only process 0 prints
  assert 2 < len(saved_run.lines(tmp_path / 'stopped')) < _STEPS
  assert 'resumed from step' in processes.run(_two(tmp_path, 'stopped'))
  assert saved_run.lines(tmp_path / 'stopped') == saved_run.lines(tmp_path / 'undisturbed')

  processes.run([*processes.TWO, '--evaluate', '--', f'--workdir={tmp_path / "stopped"}'])
  evaluated = json.loads((tmp_path / 'stopped/evaluation.json').read_text())
  assert in_process.run(_LAUNCH / 'evaluate.py', f'--workdir={tmp_path / "stopped"}', '--force') == 0
  assert json.loads((tmp_path / 'stopped/evaluation.json').read_text()) == evaluated
  assert {row['count'] for row in evaluated if row['evaluator'] == 'shape'} == {6}

  # One process of eight devices reads the same batches, and its losses are the same but for rounding.
  assert in_process.run(_LAUNCH / 'train.py', _config(tmp_path), f'--workdir={tmp_path / "one"}') == 0
  lines = [saved_run.lines(tmp_path / name) for name in ('one', 'stopped')]
  one, two = ([line for line in several if 'loss/total' in line] for several in lines)
  assert [line['step'] for line in one] == [line['step'] for line in two] == list(range(1, _STEPS + 1))
  for a, b in zip(one, two):
    assert a['loss/total'] == pytest.approx(b['loss/total'], abs=1e-5)

  # Two processes evaluate each example once, as one process does.
  during = [[line for line in several if 'eval/shape/top-1' in line] for several in lines]
  assert during[0] == during[1] and [line['step'] for line in during[1]] == [8, _STEPS]


@pytest.mark.nightly
def test_a_run_in_a_bucket_moves_between_processes_and_devices(gcs, tmp_path):
  bucket, one = f'{gcs.address}/{tmp_path.name}', [sys.executable, 'launch/train.py']
  flags = [_config(tmp_path, 8), '--config.train.evaluate_every=0', '--config.optim.decay_steps=8']
  processes.run([*one, *flags, f'--workdir={tmp_path / "disk"}'], devices=8)
  two = [*processes.TWO, '--']
  for steps, command, resumed in ((2, two, None), (4, one, 2), (6, two, 4), (8, two, 4)):
    if steps == 8:  # the processes agree that the checkpoint of step 6 cannot be used, whichever reads the altered bit
      saved_run.alter(storage.path(bucket) / 'checkpoints/6')
    output = processes.run([*command, *flags, f'--workdir={bucket}', f'--config.train.steps={steps}'],
                           devices=8 if command is one else 4)
    assert {int(s) for s in re.findall(r'resumed from step (\d+)', output)} == {resumed} - {None}, output
  assert 'the checkpoint of step 6 in' in output and f'checkpoint 6 was moved to {bucket}/damaged/6' in output, output
  moved, unmoved = (saved_run.lines(folder) for folder in (bucket, tmp_path / 'disk'))
  assert [line['step'] for line in moved] == list(range(1, 9))
  assert [a['loss/total'] for a in moved] == pytest.approx([b['loss/total'] for b in unmoved], abs=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize('script', ['train', 'evaluate'])
def test_work_directories_that_are_not_shared_are_refused_at_the_start(tmp_path, script):
  config, folders = _config(tmp_path), [tmp_path / 'host0/run', tmp_path / 'host1/run']
  address = processes.free_address()
  commands = [[sys.executable, f'launch/{script}.py', config, f'--workdir={folder}',
               '--config.train.hang_timeout=30', f'--coordinator_address={address}', '--num_processes=2',
               f'--process_id={i}'] for i, folder in enumerate(folders)]
  for i, (code, output) in enumerate(processes.together(*commands, devices=4)):
    [error] = [line for line in output.splitlines() if line.startswith('error: ')]
    assert code == 2 and f'workdir {folders[i]} is not shared: what process 0 (' in error, output
  assert list(folders[0].iterdir()) == [] and not folders[1].exists()


@pytest.mark.nightly
def test_a_run_of_which_one_process_lacks_the_data_ends_within_seconds_and_names_the_folder(tmp_path):
  common = [sys.executable, 'launch/train.py', _config(tmp_path), f'--workdir={tmp_path / "run"}',
            f'--coordinator_address={processes.free_address()}', '--num_processes=2']
  missing = f'--config.data.dir={tmp_path / "missing"}'
  (other, lost), (code, output) = processes.together(
      [*common, '--process_id=0'], [*common, '--process_id=1', missing], devices=4, timeout=180)
  assert code == 2 and output.count('error: ') == 1 and f'{tmp_path / "missing"} does not exist' in output, output
  assert other == 1 and 'error: another process of this run has died or cannot be reached' in lost, lost
  assert not (tmp_path / 'run/config.json').exists()


@pytest.mark.nightly
@pytest.mark.parametrize('script', ['train', 'evaluate'])
def test_processes_of_which_one_has_another_validation_label_are_refused(tmp_path, script):
  config, (columns, classes) = _config(tmp_path), tiny.columns()['glyphs']
  folder = file_dataset.embedded_folder('glyphs')
  for i in range(2):
    labels = np.array([tiny.CLASSES[i], *columns['class'][1:]])
    splits = [('train', columns, classes), ('validation', {**columns, 'class': labels}, classes)]
    writer.write_dataset(tmp_path / f'data{i}', folder, lambda splits=splits: splits)
  if script == 'evaluate':
    saved_run.save(tmp_path / 'run', runpy.run_path(str(tmp_path / 'config.py'))['get_config'](), 1, devices=8)
  common = [sys.executable, f'launch/{script}.py', config, '--config.evaluators.shape.split=validation',
            f'--workdir={tmp_path / "run"}', f'--coordinator_address={processes.free_address()}', '--num_processes=2']
  each = [[*common, f'--process_id={i}', f'--config.data.dir={tmp_path / f"data{i}"}'] for i in range(2)]
  for code, output in processes.together(*each, devices=4):
    assert code == 2 and 'error: process 1 of 2 reads other data than process 0' in output, output


@pytest.mark.nightly
@pytest.mark.parametrize('script', ['train', 'evaluate'])
def test_processes_of_which_one_has_another_config_are_refused_before_they_write_anything(tmp_path, script):
  common = [sys.executable, f'launch/{script}.py', _config(tmp_path), f'--workdir={tmp_path / "run"}',
            f'--coordinator_address={processes.free_address()}', '--num_processes=2']
  each = [[*common, f'--process_id={i}', f'--config.seed={i}'] for i in range(2)]
  ended = processes.together(*each, devices=4)
  for code, output in ended:
    assert code == 2, ended
    assert 'error: process 1 of 2 has another config than process 0 (seed: 0 → 1)' in output, output
  assert list((tmp_path / 'run').iterdir()) == []


@pytest.mark.nightly
@pytest.mark.parametrize('shift, expected', [(1, 2), (0, 0)])
def test_processes_of_which_one_has_another_checkpoint_to_start_from_are_refused(tmp_path, shift, expected):
  """Each has its own copy of that run, at the same address."""
  config = _config(tmp_path)
  get_config = runpy.run_path(str(tmp_path / 'config.py'))['get_config']
  folders = [tmp_path / f'host{i}' for i in range(2)]
  save = lambda folder, shift: saved_run.save(folder / 'init', get_config(), 1, devices=8, change=lambda state: (
      state.replace(params=jax.tree.map(lambda x: x + shift, state.params))))
  save(folders[0], 0)
  if shift:
    save(folders[1], shift)
  else:
    shutil.copytree(*folders)
  common = [sys.executable, processes.ROOT / 'launch/train.py', config, '--config.train.steps=1',
            '--config.train.evaluate_every=0', '--config.train.init=init', f'--workdir={tmp_path / "run"}',
            f'--coordinator_address={processes.free_address()}', '--num_processes=2']
  each = [[*common, f'--process_id={i}'] for i in range(2)]
  ended = processes.together(*each, devices=4, folders=folders)
  for code, output in ended:
    assert code == expected, ended
    assert ('error: process 1 of 2 has another checkpoint in config.train.init=' in output) == bool(code), output
