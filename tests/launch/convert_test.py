"""launch/convert.py: the normal commands continue from an authors' checkpoint, and it converts back unchanged."""

import errno
import hashlib
import json
import pathlib

import jax
import numpy as np
import pytest
import torch

from tests.helpers import in_process, processes, saved_run, small_model, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config import presets, schema
from uni_moe_jax.convert import torch_layout
from uni_moe_jax.model.uni_perceiver import init_params
from uni_moe_jax.train import loop
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train import workdir as workdir_lib
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.utils.errors import UsageError

_SCRIPT = processes.ROOT / 'launch/convert.py'
_MERGES = '#version: a test\nt h\nth e</w>\na n\nan d</w>\n'


def _config(folder: pathlib.Path):
  """Three published task types with the published choices and vocabulary on synthetic data."""
  c = tiny.config('shape', 'caption', 'pair', data_dir=tiny.data_dir())
  presets.published(c)
  c.model.update(dict(channels=3, max_text_len=64, layer_scale_init=0.5))
  c.tokenizer.update(dict(type='clip', merges_path=str(folder / 'merges.txt')))
  c.target_sets.shapes.max_len = 32
  for t in c.tasks.values():
    t.temperature, t.sampling_weight = schema.PUBLISHED_GROUPS[t.type], 1.0
    t.max_len = 48 if t.max_len else 0
    t.batch_size = 8  # there are as many devices
  c.evaluators.shape = config_lib.evaluator('classification', 'shape', split='train')
  c.train.update(dict(steps=3, checkpoint_every=1))
  return c


@pytest.fixture(name='files', scope='module')
def _files(tmp_path_factory):
  """(folder, state dict of the checkpoint in it, spec of the model)."""
  folder = tmp_path_factory.mktemp('convert')
  (folder / 'merges.txt').write_text(_MERGES)
  c = _config(folder)
  workdir_lib.claim_workdir(folder / 'saved', c, 'print')
  (folder / 'config.py').write_text(
      'from uni_moe_jax.train.workdir import load_config\n'
      f'def get_config():\n  return load_config({str(folder / "saved")!r})\n')
  run = train_run.build(c, jax.devices()[:1])
  params = small_model.jit(lambda key: init_params(run.spec.model, key))(jax.random.key(5))
  state, _ = torch_layout.to_torch(params, run.spec.model.spec)
  torch.save({'model': {k: torch.from_numpy(np.array(v)) for k, v in state.items()}, 'iteration': 3},
             folder / 'theirs.pth')
  return folder, state, run.spec.model.spec


def _run(script: str, *arguments: str) -> None:
  assert in_process.run(processes.ROOT / f'launch/{script}.py', *arguments) == 0


def _arguments(folder, workdir, checkpoint='theirs.pth'):
  return f'--checkpoint={folder / checkpoint}', f'--config={folder / "config.py"}', f'--workdir={workdir}'


@pytest.mark.nightly
def test_a_converted_checkpoint_evaluates_trains_and_converts_back(files, tmp_path, capfd):
  folder, state, _ = files
  workdir = tmp_path / 'run'
  _run('convert', *_arguments(folder, workdir))
  output = capfd.readouterr().out
  assert 'arrays converted' in output and 'a gate that is never evaluated' in output
  assert json.loads((workdir / 'conversion.json').read_text())['dropped']
  checksum = hashlib.sha256((folder / 'theirs.pth').read_bytes()).hexdigest()
  assert workdir_lib.provenance(workdir, 0)['converted from'] == f'theirs.pth (sha256 {checksum})'

  _run('convert', f'--workdir={workdir}', f'--output={tmp_path / "ours.pth"}')
  ours = torch.load(tmp_path / 'ours.pth', weights_only=True)['model']
  assert set(ours) == set(state)
  for key, value in state.items():
    np.testing.assert_array_equal(ours[key].numpy(), value, key)
  capfd.readouterr()
  assert in_process.run(_SCRIPT, f'--workdir={workdir}', f'--output={folder / "theirs.pth"}') == 2
  assert 'theirs.pth exists; choose another file or remove it' in capfd.readouterr().err
  assert hashlib.sha256((folder / 'theirs.pth').read_bytes()).hexdigest() == checksum

  _run('evaluate', f'--workdir={workdir}')
  assert json.loads((workdir / 'evaluation.json').read_text())[0]['step'] == 0

  assert loop.train(_config(folder), str(workdir), jax.devices()[:1]) == 0
  _run('convert', f'--workdir={workdir}', f'--output={tmp_path / "trained.pth"}')
  trained = torch.load(tmp_path / 'trained.pth', weights_only=True)['model']
  moved = [k for k in state if not np.array_equal(trained[k].numpy(), state[k])]
  assert 'token_embed.embeddings.weight' in moved and 'loss_prepare.proj.weight' in moved
  spatial = 'video_embed.embeddings_st_pos.spatial_pos_embed.weight'
  np.testing.assert_array_equal(trained[spatial].numpy(), state[spatial])  # fixed, as published


def test_mistakes_end_in_one_sentence(files, tmp_path, capfd):
  folder, state, spec = files
  (folder / 'cut.pth').write_bytes((folder / 'theirs.pth').read_bytes()[:-1000])
  short = {k: torch.from_numpy(np.array(v)) for k, v in state.items() if k != 'loss_prepare.proj.bias'}
  torch.save({'model': short}, folder / 'short.pth')
  for checkpoint, message in (
      ('cut.pth', 'is not a PyTorch checkpoint, or is truncated'),
      ('short.pth', 'the checkpoint lacks loss_prepare.proj.bias'),
      ('none.pth', 'none.pth does not exist')):
    capfd.readouterr()
    code, errors = in_process.run(_SCRIPT, *_arguments(folder, tmp_path / 'a', checkpoint)), capfd.readouterr().err
    assert code == 2 and errors.count('\n') == 1 and message in errors, errors
  # A failed conversion leaves nothing that could be trained from fresh parameters by mistake.
  assert not (tmp_path / 'a').exists()
  assert in_process.run(_SCRIPT, f'--workdir={tmp_path / "a"}') == 2
  assert '--checkpoint=FILE --config=FILE' in capfd.readouterr().err


def test_a_conversion_that_ends_before_its_end_leaves_no_run_and_is_repeated(files, tmp_path, monkeypatch, capfd):
  def fail(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  arguments, folder = _arguments(files[0], tmp_path / 'run'), tmp_path / 'run/checkpoints/0'
  for owner, name, steps in ((Checkpoints, 'save', []), (workdir_lib, 'copy_tokenizer', [0])):
    with monkeypatch.context() as patch:
      patch.setattr(owner, name, fail)
      assert in_process.run(_SCRIPT, *arguments) == 1
    assert 'the disk is full' in capfd.readouterr().err
    assert not (tmp_path / 'run/config.json').exists()
    assert workdir_lib.saved_steps(tmp_path / 'run') == steps
  with pytest.raises(UsageError, match='has checkpoints, but no config.json'):
    workdir_lib.check_workdir(tmp_path / 'run', _config(files[0]), extends=True)  # by uni-moe train
  (folder / 'manifest.json').unlink()  # which shows that the step is written again
  _run('convert', *arguments)
  assert (tmp_path / 'run/config.json').exists() and (folder / 'manifest.json').exists()
  assert in_process.run(_SCRIPT, *arguments) == 2
  assert 'already has a run; choose another' in capfd.readouterr().err


def test_best_converts_the_best_checkpoint_of_a_run(files, tmp_path, capfd):
  saved_run.save_best_and_newest(tmp_path / 'run', _config(files[0]))
  _run('convert', f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "best.pth"}', '--best')
  assert f'{tmp_path}/best.pth: step 2, ' in capfd.readouterr().out
  assert in_process.run(_SCRIPT, *_arguments(files[0], tmp_path / 'a'), '--best') == 2
  assert '--best is for --output=FILE' in capfd.readouterr().err
