"""A saved run whose parameters alone are read is built on its own mesh, or on one device."""

import functools
import types

import jax
import numpy as np
import pytest

from tests.data import own_files
from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train import workdir
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.utils.errors import UsageError


def _config():
  c = tiny.config('shape', data_dir=tiny.data_dir())
  c.tokenizer.path = tiny.tokenizer_file()
  c.model.num_layers = 1
  return c


@functools.cache
def _fingerprint():
  return train_run.build(_config(), jax.devices()[:1]).data.fingerprint


def test_a_saved_run_with_num_frames_for_images_continues_and_is_evaluated_and_a_new_one_is_refused(tmp_path):
  prepare.prepare(own_files.write_captioned_images(tmp_path / 'in', 20), tmp_path, 'colors')
  c = tiny.config(data_dir=str(tmp_path))
  c.tokenizer.path = tiny.tokenizer_file()
  c.model.update(num_layers=1, channels=3, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3)
  c.target_sets.colors = config_lib.target_set('own:colors/color', family='names')
  c.tasks.color = config_lib.task('image_classification', 'own:colors', batch_size=8, target_set='colors',
                                  label_column='color', num_frames=2)

  def num_examples(build, training, name='run'):
    run = build(c, workdir=tmp_path / name, devices=jax.devices()[:1])
    return run.data.examples(run.plan.tasks[0], training=training).size

  with pytest.raises(UsageError, match="num_frames=2: source 'own:colors' has images, and it is for videos"):
    num_examples(train_run.build, training=True)
  (tmp_path / 'ended').mkdir()
  (tmp_path / 'ended/config.json').touch()  # of a run that ended before its first checkpoint, or trains nothing
  assert num_examples(train_run.build, True, 'ended') > 10
  with Checkpoints(tmp_path / 'run', max_to_keep=1) as checkpoints:
    checkpoints.save(1, {'params': {'a': np.zeros(1)}})
  assert num_examples(train_run.build, True) == num_examples(train_run.build_to_read, False) > 10


@pytest.mark.parametrize('is_other', [True, False])
def test_other_data_than_that_of_training_is_noted(tmp_path, capsys, is_other):
  workdir.claim_workdir(tmp_path, _config(), 'of the version before' if is_other else _fingerprint())
  capsys.readouterr()
  train_run.build_to_read(_config(), tmp_path)
  note = capsys.readouterr().err
  assert note.startswith(f'note: {tmp_path} was trained on different data') if is_other else note == ''


@pytest.mark.parametrize('mesh, batch_size, shape', [
    (dict(expert=2), 8, (4, 2)),
    (dict(expert=4, data=4), 8, None),  # trained on 16 devices; here are eight
    (dict(expert=3), 8, None),
    (dict(), 4, None)])  # trained on at most four devices
def test_a_mesh_that_does_not_fit_these_devices_is_replaced_by_one_device_where_a_run_is_only_read(
    tmp_path, capsys, mesh, batch_size, shape):
  c = _config()
  c.tasks.shape.batch_size = batch_size
  c.mesh.update(mesh)
  before = c.to_dict()
  workdir.claim_workdir(tmp_path, c, _fingerprint())
  run = train_run.build_to_read(c, tmp_path)
  note = capsys.readouterr().err
  if shape:
    assert (run.mesh.shape['data'], run.mesh.shape['expert'], run.mesh.size, note) == (*shape, len(jax.devices()), '')
  else:
    assert run.mesh.size == 1 and note.startswith(f'note: config.mesh of {tmp_path} does not fit here (devices: 8)')
    with pytest.raises(UsageError):  # what trains must say so
      train_run.build(c)
    if not mesh:  # evaluation uses all devices, whose batches need not divide
      assert train_run.build_to_read(c, tmp_path, trains=False).mesh.size == 8 and not capsys.readouterr().err
  assert c.to_dict() == before


def test_the_readout_token_may_be_a_word_of_one_token():
  c = _config()
  assert train_run.build(c, jax.devices()[:1]).spec.model.spec.prefix_word is None
  c.model.readout_token = 'a'
  run = train_run.build(c, jax.devices()[:1])
  assert [run.spec.model.spec.prefix_word] == run.data.tokenizer.encode('a')
  c.model.readout_token = 'a a'
  with pytest.raises(UsageError, match=r"readout_token='a a' is 2 tokens; give a word that is one token, or '<spe>'"):
    train_run.build(c, jax.devices()[:1])


_DEVICES = {name: types.SimpleNamespace(platform=platform, compute_capability=capability) for
            name, platform, capability in [('cpu', 'cpu', None), ('tpu', 'tpu', None), ('A100', 'gpu', '8.0'),
                                           ('T4', 'gpu', '7.5'), ('MI250', 'gpu', 'gfx90a')]}
_OTHER_TYPE = "is a kernel for .PUs, and this run has devices of type '{}'; set it to 'auto'"
_OLDER = "is a kernel for GPUs of compute capability 8.0 or more, and this run has 7.5; set it to 'auto'"


@pytest.mark.parametrize('field, value, unfitting', [
    *((field, value, dict.fromkeys(('A100', 'T4', 'MI250'), _OTHER_TYPE.format('gpu'))) for field, value in (
        ('model.attention_impl', 'splash'), ('model.attention_impl', 'short'), ('moe.gmm', 'megablox'))),
    ('moe.gmm', 'triton', {'tpu': _OTHER_TYPE.format('tpu'), 'T4': _OLDER}),
    ('model.dtype', 'bfloat16', {'T4': 'is for GPUs of compute capability 8.0 .* has 7.5; set it to \'float32\''})])
def test_a_kernel_of_other_devices_is_refused(field, value, unfitting, capsys):
  c = _config()
  c.update_from_flattened_dict({field: value})
  for name, device in _DEVICES.items():
    train_run.check_kernels(_config(), device)
    if name not in unfitting:
      train_run.check_kernels(c, device)
      assert train_run.with_fitting_kernels(c, device) is c
      continue
    with pytest.raises(UsageError, match=f"config.{field}='{value}' {unfitting[name]}"):
      train_run.check_kernels(c, device)
    read = train_run.with_fitting_kernels(c, device)
    assert read.to_dict() == _config().to_dict() != c.to_dict()
    assert ('has 7.5; products are float32' in capsys.readouterr().err) == (field == 'model.dtype')


def test_a_saved_run_with_attention_of_cudnn_is_read_on_a_cpu(tmp_path):
  c = _config()
  c.model.update(dict(attention_impl='cudnn', dtype='bfloat16', num_heads=c.model.width // 8))
  train_run.check_kernels(c, _DEVICES['A100'])
  with pytest.raises(UsageError, match="'cudnn' is a kernel for GPUs, and this run has devices of type 'cpu'"):
    train_run.check_kernels(c, jax.devices()[0])
  assert train_run.with_fitting_kernels(c, jax.devices()[0]).model.attention_impl == 'auto'
  assert train_run.build_to_read(c, tmp_path).config.model.attention_impl == 'auto'
