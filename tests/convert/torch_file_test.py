"""The authors' checkpoint files: three layouts are read, no code in them is executed, and damage is reported."""

import collections
import errno
import io
import os
import pathlib
import pickle

import chex
import numpy as np
import pytest
import torch

from tests.helpers import small_model
from uni_moe_jax.convert import torch_file, torch_layout
from uni_moe_jax.convert.torch_layout import LayoutError


def _state(router: str = 'attribute', **changes):
  spec = small_model.spec(router, temperature_groups=(), posemb='frozen', **changes)
  return torch_layout.to_torch(small_model.params(spec), spec)[0]


def _save(path, state, wrap=lambda tensors: {'model': tensors}):
  torch.save(wrap({k: torch.from_numpy(np.array(v)) for k, v in state.items()}), path)
  return path


@pytest.mark.parametrize('wrap', [
    lambda t: {'model': t, 'iteration': 7, 'optimizer': {'state': {}, 'param_groups': [{'lr': .1}]}},
    lambda t: {'module': t, 'global_steps': 3},
    lambda t: collections.OrderedDict(t),
    lambda t: {'model': {f'module.{k}': v for k, v in t.items()}},
], ids=['torch', 'deepspeed', 'plain', 'distributed'])
def test_each_layout_gives_the_same_arrays(tmp_path, wrap):
  state = _state()
  arrays, remarks = torch_file.read(_save(tmp_path / 'a.pth', state, wrap))
  chex.assert_trees_all_equal(arrays, state)
  assert not remarks


def test_a_written_file_is_read_back_unchanged(tmp_path):
  state = _state()
  torch_file.write(tmp_path / 'new' / 'a.pth', state)
  chex.assert_trees_all_equal(torch_file.read(tmp_path / 'new' / 'a.pth')[0], state)
  assert os.listdir(tmp_path / 'new') == ['a.pth']
  assert set(torch.load(tmp_path / 'new' / 'a.pth', weights_only=True)) == {'model'}


def test_half_precision_becomes_float32(tmp_path):
  torch.save({'model': {'a': torch.tensor([1.5, 2.], dtype=torch.bfloat16)}}, tmp_path / 'a.pth')
  arrays, _ = torch_file.read(tmp_path / 'a.pth')
  assert arrays['a'].dtype == np.float32
  np.testing.assert_array_equal(arrays['a'], [1.5, 2.])


_OLD = [('fused_encoder.', 'encoder.'), ('loss_prepare.', 'predictor.'),
        ('.gamma_1', '.attention_output.residual_scale'), ('.gamma_2', '.ffn_output.residual_scale'),
        ('.linear1.', '.ffn.dense.'), ('.linear2.', '.ffn.dense2.'),
        ('.norm1.', '.LayerNormModules.0.'), ('.norm2.', '.LayerNormModules.1.'),
        ('.experts.deepspeed', '.deepspeed_moe.experts.deepspeed'), ('.gate.', '.deepspeed_moe.gate.'),
        ('.self_attn.in_proj_', '.attention.self.qkv_proj.'), ('.self_attn.out_proj.', '.attention.output.dense.'),
        ('.self_attn.qkv_proj.', '.attention.self.qkv_proj.'), ('.self_attn.dense.', '.attention.output.dense.')]


def _aged(state):
  """A state dict with the names of the older code."""
  out = {}
  for key, value in state.items():
    for new, old in _OLD:
      key = key.replace(new, old)
    out[key] = value[None, None] if key.endswith('residual_scale') else value
  return {**out, 'visual_embed.weight': np.ones(3, np.float32)}


@pytest.mark.parametrize('router, changes', [('attribute', {}), ('attribute', {'placement': 'every_2'}), ('dense', {})])
def test_older_names_are_renamed_in_models_with_and_without_experts(tmp_path, router, changes):
  state = _state(router, **changes)
  assert not set(_aged(state)) & {k for k in state if k.startswith(('fused', 'loss'))}
  arrays, remarks = torch_file.read(_save(tmp_path / 'a.pt', _aged(state), lambda t: {'module': t}))
  # The visual type was added to the bias.
  chex.assert_trees_all_equal(arrays, {k: v for k, v in state.items() if k != 'video_embed.embeddings_type.weight'})
  assert 'dropped' in remarks['visual_embed.weight']


@pytest.mark.parametrize('older', [False, True])
@pytest.mark.parametrize('keep', [False, True])
def test_the_visual_type_of_older_files_alone_is_added_to_the_bias(tmp_path, older, keep):
  state = _state() | {'video_embed.embeddings_type.weight': np.full((1, 16), .5, np.float32)}
  arrays, _ = torch_file.read(_save(tmp_path / 'a.pt', _aged(state) if older else state), keep_visual_type=keep)
  added = older and not keep
  bias = state['video_embed.embeddings.bias']
  np.testing.assert_array_equal(arrays['video_embed.embeddings.bias'], bias + .5 if added else bias)
  assert ('video_embed.embeddings_type.weight' in arrays) != added


class _Bomb:
  """Unpickling this without restrictions calls a function, such as one that makes a file."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize('zipped', [True, False])
def test_a_file_with_code_is_refused_by_name_and_not_executed(tmp_path, zipped):
  mark = tmp_path / 'executed'
  contents = {'model': {'a': torch.ones(2)}, 'args': _Bomb(open, str(mark), 'w')}
  torch.save(contents, tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
  with pytest.raises(LayoutError, match=r'needs .*open.*, which could execute code: refused; nothing was executed'):
    torch_file.read(tmp_path / 'a.pth')
  assert not mark.exists()
  torch.load(tmp_path / 'a.pth', weights_only=False)
  assert mark.exists()  # it would have been


def test_a_folder_is_refused_with_the_usual_file_name(tmp_path):
  with pytest.raises(LayoutError, match='is a folder; choose a file in it, such as mp_rank_00'):
    torch_file.read(tmp_path)


@pytest.mark.parametrize('target', ['folder', 'file/a.pth'])
def test_an_output_that_cannot_be_written_is_named_and_leaves_no_file(tmp_path, target):
  (tmp_path / 'folder' / 'full').mkdir(parents=True)
  (tmp_path / 'file').write_text('')
  with pytest.raises(LayoutError, match=r'cannot be written .*; choose another --output'):
    torch_file.write(tmp_path / target, _state())
  assert sorted(os.listdir(tmp_path)) == ['file', 'folder']


def test_a_full_disk_is_reported_as_such_and_leaves_no_file(tmp_path, monkeypatch):
  class Full(io.FileIO):

    def write(self, data):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  plain = pathlib.Path.open
  monkeypatch.setattr(pathlib.Path, 'open', lambda path, *how, **options: (
      Full(path, *how) if path.parent == tmp_path else plain(path, *how, **options)))
  with pytest.raises(OSError) as error:
    torch_file.write(tmp_path / 'a.pth', _state())
  assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / 'a.pth'))
  assert not os.listdir(tmp_path)


def test_a_plain_pickle_with_code_is_refused_and_not_executed(tmp_path):
  mark = tmp_path / 'executed'
  (tmp_path / 'a.pth').write_bytes(pickle.dumps(_Bomb(open, str(mark), 'w')))
  with pytest.raises(LayoutError):
    torch_file.read(tmp_path / 'a.pth')
  assert not mark.exists()


@pytest.mark.parametrize('share', [.0, .3, .9, .999])
def test_a_truncated_file_is_named(tmp_path, share):
  content = _save(tmp_path / 'a.pth', _state()).read_bytes()
  (tmp_path / 'b.pth').write_bytes(content[:int(share * len(content))])
  with pytest.raises(LayoutError, match=r'b\.pth is not a PyTorch checkpoint, or is'):
    torch_file.read(tmp_path / 'b.pth')


@pytest.mark.parametrize('content, message', [
    ({}, 'has no parameters'), ({'model': {'a': 3}}, "'a' is not a named tensor"),
    ({3: torch.ones(1)}, '3 is not a named tensor'), ([1, 2], 'has no parameters')])
def test_a_file_without_parameters_is_named(tmp_path, content, message):
  torch.save(content, tmp_path / 'a.pth')
  with pytest.raises(LayoutError, match=message):
    torch_file.read(tmp_path / 'a.pth')


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='none.pth does not exist'):
    torch_file.read(tmp_path / 'none.pth')
