"""A saved run whose parameters alone are read is built on its own mesh, or on one device."""

import functools

import jax
import pytest

from tests.helpers import tiny
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train import workdir
from uni_moe_jax.utils.errors import UsageError


def _config():
  c = tiny.config('shape', data_dir=tiny.data_dir())
  c.tokenizer.path = tiny.tokenizer_file()
  c.model.num_layers = 1
  return c


@functools.cache
def _fingerprint():
  return train_run.build(_config(), jax.devices()[:1]).data.fingerprint


@pytest.mark.parametrize('is_other', [True, False])
def test_other_data_than_that_of_training_is_noted(tmp_path, capsys, is_other):
  workdir.claim_workdir(tmp_path, _config(), 'of the version before' if is_other else _fingerprint())
  capsys.readouterr()
  train_run.build_to_read(_config(), tmp_path)
  note = capsys.readouterr().err
  assert note.startswith(f'note: {tmp_path} was trained on other data') if is_other else note == ''


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
  assert c.to_dict() == before


@pytest.mark.parametrize('field, value, platform', [
    ('model.attention_impl', 'splash', 'gpu'), ('model.attention_impl', 'short', 'gpu'),
    ('moe.gmm', 'megablox', 'gpu'), ('moe.gmm', 'triton', 'tpu')])
def test_a_kernel_of_another_type_of_device_is_refused(field, value, platform):
  c = _config()
  c.update_from_flattened_dict({field: value})
  for fitting in {'gpu', 'tpu', 'cpu'} - {platform}:
    train_run.check_kernels(c, fitting)
  train_run.check_kernels(_config(), platform)
  with pytest.raises(UsageError, match=f"config.{field}='{value}' is a kernel for .PUs, and this run has devices of "
                                       f"type '{platform}'; set it to 'auto'"):
    train_run.check_kernels(c, platform)
  assert train_run.with_fitting_kernels(c, 'cpu') is c
  read = train_run.with_fitting_kernels(c, platform)
  assert read.model.attention_impl == read.moe.gmm == 'auto' and c.to_dict() != read.to_dict()


def test_a_saved_run_with_attention_of_cudnn_is_read_on_a_cpu(tmp_path):
  c = _config()
  c.model.update(dict(attention_impl='cudnn', dtype='bfloat16', num_heads=c.model.width // 8))
  train_run.check_kernels(c, 'gpu')
  with pytest.raises(UsageError, match="'cudnn' is a kernel for GPUs, and this run has devices of type 'cpu'"):
    train_run.check_kernels(c, 'cpu')
  assert train_run.with_fitting_kernels(c, 'cpu').model.attention_impl == 'auto'
  assert train_run.build_to_read(c, tmp_path).config.model.attention_impl == 'auto'
