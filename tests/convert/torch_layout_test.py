"""The published state dict and our tree convert in both directions, and errors name the key and the field to change."""

import re

import jax
import numpy as np
import pytest

from tests.helpers import small_model
from tests.parity import fixtures
from uni_moe_jax.convert import torch_layout
from uni_moe_jax.convert.torch_layout import LayoutError
from uni_moe_jax.model.embedders import sincos_table

_SPATIAL = 'video_embed.embeddings_st_pos.spatial_pos_embed.weight'
_MODELS = [name.removeprefix('weights_') for name in fixtures.cases('state_dict')]


@pytest.mark.parametrize('model', _MODELS)
def test_a_round_trip_reproduces_every_array_bit_for_bit(model):
  state, spec = fixtures.weights(model), fixtures.model_spec(model)
  params, read = torch_layout.from_torch(state, spec)
  back, made = torch_layout.to_torch(params, spec)
  assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
  for key, value in state.items():
    if key not in read.dropped or 'embeddings_norm' in key:
      np.testing.assert_array_equal(back[key], value, key)
      assert back[key].dtype == value.dtype
  # The keys that were dropped are made again; gates are zeros.
  assert set(read.dropped) == set(made.made)
  for key in made.made:
    assert 'embeddings_norm' in key or not back[key].any(), key


@pytest.mark.parametrize('model', _MODELS)
def test_every_parameter_is_filled_and_every_key_accounted_for(model):
  state, spec = fixtures.weights(model), fixtures.model_spec(model)
  params, report = torch_layout.from_torch(state, spec)
  assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(params))
  assert set(report.consumed) | set(report.dropped) == set(state)
  assert not set(report.consumed) & set(report.dropped)


@pytest.mark.parametrize('changes', [dict(num_prefix_prompts=2), dict(label_prompts=(('names', 3),)),
                                     dict(frame_differences=True), dict(stem='conv'), dict(word_neighbors=1)])
def test_what_the_published_layout_lacks_is_refused(changes):
  spec = small_model.spec(temperature_groups=(), **changes)
  with pytest.raises(LayoutError, match=r'does not support config\.model\.num_prefix_prompts, .*label_prompts'):
    torch_layout.to_torch(small_model.params(spec), spec)


def test_targets_without_prompts_have_no_key():
  keys = {}
  for sides in ('shared', 'inputs', 'separate'):
    spec = small_model.spec(num_deep_prompts=2, prompt_sharing=sides, temperature_groups=())
    keys[sides] = {e.key for e in torch_layout.entries(spec) if 'prompt' in e.key}
  shared = {f'fused_encoder.layers.{i}.deep_prompt_embedding.embedding.weight' for i in range(3)}
  assert keys['inputs'] == keys['shared'] == shared
  assert len(keys['separate']) == 6


def test_plain_layers_of_a_model_with_experts_have_their_own_names():
  keys = {e.key for e in torch_layout.entries(small_model.spec(placement='every_2', temperature_groups=()))}
  assert 'fused_encoder.layers.0.self_attn.qkv_proj.experts.deepspeed_experts.3.weight' in keys
  assert {'fused_encoder.layers.1.self_attn.qkv_proj.weight', 'fused_encoder.layers.1.linear2.bias'} <= keys
  assert not any('in_proj' in k or 'out_proj' in k for k in keys)
  dense = {e.key for e in torch_layout.entries(small_model.spec('dense', temperature_groups=()))}
  assert {'fused_encoder.layers.1.self_attn.in_proj_weight', 'fused_encoder.layers.1.self_attn.out_proj.bias'} <= dense


def test_a_packed_qkv_is_split_into_queries_keys_values_then_heads():
  # D = 4, two heads of 2: row 5 of the packed matrix is keys' row 1, head 0, dimension 1.
  spec = small_model.spec('dense', width=4, num_heads=2)
  packed = np.arange(48, dtype=np.float32).reshape(12, 4)
  ours = torch_layout.QKV.to_jax(packed, spec)
  assert ours.shape == (4, 3, 2, 2)
  np.testing.assert_array_equal(ours[:, 1, 0, 1], packed[5])
  np.testing.assert_array_equal(ours[:, 2, 1, 0], packed[10])
  np.testing.assert_array_equal(torch_layout.QKV.to_torch(ours, spec), packed)


def test_a_convolution_becomes_rows_by_row_column_and_channel():
  spec = small_model.spec('dense', width=4, patch_size=2, channels=3)
  convolution = np.arange(48, dtype=np.float32).reshape(4, 3, 2, 2)
  ours = torch_layout.PATCH.to_jax(convolution, spec)
  np.testing.assert_array_equal(ours[(1 * 2 + 0) * 3 + 2], convolution[:, 2, 1, 0])
  np.testing.assert_array_equal(torch_layout.PATCH.to_torch(ours, spec), convolution)


def _small(router: str = 'attribute', **changes):
  """(spec, its published state dict) of a small model."""
  spec = small_model.spec(router, **{'temperature_groups': ('caption',), 'posemb': 'frozen', **changes})
  return spec, torch_layout.to_torch(small_model.params(spec), spec)[0]


@pytest.mark.parametrize('router, changes', [
    ('attribute', {}), ('attribute', {'placement': 'every_2'}), ('attribute', {'placement': (1,)}), ('dense', {}),
    ('attribute', {'sublayers': ('mlp',)}), ('attribute', {'modality_embedding': True}),
    ('attribute', {'posemb': 'sincos2d'})])
def test_a_round_trip_reproduces_our_tree(router, changes):
  spec, state = _small(router, **changes)
  params, _ = torch_layout.from_torch(state, spec)
  jax.tree.map(np.testing.assert_array_equal, params, small_model.params(spec))


_KEY = 'fused_encoder.layers.2.linear1.experts.deepspeed_experts.1.weight'


@pytest.mark.parametrize('key, value, message', [
    (_KEY, None, f'the checkpoint lacks {_KEY}: the model has router attribute, 3 layers, 4 experts'),
    ('head.weight', np.zeros(3), 'it has head.weight, which the model does not have'),
    (_KEY, np.zeros((25, 16)), f'{_KEY} has shape (25, 16), but the model needs (24, 16): set config.model.mlp_dim'),
    ('token_embed.embeddings.weight', np.zeros((9, 16)), 'a different vocabulary (config.tokenizer)'),
    ('token_embed.embeddings.weight', np.zeros((23, 8)), 'the model needs (23, 16): set config.model.width'),
    ('fused_encoder.layers.0.self_attn.dense.experts.deepspeed_experts.0.weight', np.zeros((32, 8)),
     'has shape (32, 8), but the model needs (16, 16)'),  # the same size but another shape
    ('video_embed.embeddings.weight', np.zeros((16, 4, 2, 2)), 'the model needs (16, 1, 4, 4)'),
    (_KEY, np.full((24, 16), np.nan), f'{_KEY} has values that are not finite'),
    ('fused_encoder.layers.9.linear2.gate.wg.weight', np.zeros((4, 16)), 'layers.9.linear2.gate.wg.weight, which'),
    ('video_embed.embeddings_norm.bias', np.ones(16), 'SHARE_LAYERNORM False'),
    (_SPATIAL, np.zeros((5, 16)), 'both must be squares')])
def test_a_checkpoint_that_does_not_fit_is_named(key, value, message):
  spec, state = _small()
  torch_layout.from_torch(state, spec)  # fits before the change
  changed = {k: v for k, v in {**state, key: value}.items() if v is not None}
  with pytest.raises(ValueError, match=re.escape(message)):
    torch_layout.from_torch(changed, spec)


def test_a_checkpoint_of_another_architecture_is_refused():
  (spec, _), (_, dense) = _small(), _small('dense')
  message = r'lacks fused_encoder\..*experts.*; it has fused_encoder.*in_proj.*config\.moe\.router'
  with pytest.raises(LayoutError, match=message):
    torch_layout.from_torch(dense, spec)


def test_a_table_other_than_the_fixed_one_needs_a_parameter():
  spec, state = _small(posemb='sincos2d')
  np.testing.assert_array_equal(state[_SPATIAL], sincos_table(2, 16))
  with pytest.raises(LayoutError, match="set config.model.posemb='frozen'"):
    torch_layout.from_torch({**state, _SPATIAL: state[_SPATIAL] + .1}, spec)
  # Positions of a larger image are scaled, in both directions.
  scaled, other = _small(posemb='sincos2d', posemb_scale=.5)
  np.testing.assert_array_equal(other[_SPATIAL], sincos_table(2, 16, .5))
  torch_layout.from_torch(other, scaled)
  with pytest.raises(LayoutError, match="set config.model.posemb='frozen'"):
    torch_layout.from_torch(other, spec)


def test_fixed_positions_of_another_image_size_are_computed_and_of_another_scale_are_refused():
  def spatial(image_size, scale, table):
    spec = small_model.spec(posemb='frozen', temperature_groups=(), image_size=image_size, posemb_scale=scale)
    state = {**torch_layout.to_torch(small_model.params(spec), spec)[0], _SPATIAL: table}
    return torch_layout.from_torch(state, spec)[0]['embed']['spatial']

  stored = sincos_table(14, 16, 160 / 224)  # of 56 px in patches of 4
  np.testing.assert_array_equal(spatial(56, 160 / 224, stored), stored)
  np.testing.assert_array_equal(spatial(96, 160 / 384, stored), sincos_table(24, 16, 160 / 384))
  np.testing.assert_array_equal(spatial(8, 5., stored), sincos_table(2, 16, 5.))
  for image_size, value in ((56, '0.714286'), (96, '0.416667'), (8, '5')):
    with pytest.raises(LayoutError, match=f'fixed positions of 56 px, scaled by 0.714286, .*posemb_scale={value}\\.$'):
      spatial(image_size, 1., stored)
  other = stored + np.linspace(0, 1, 16, dtype=np.float32)  # no fixed table
  np.testing.assert_array_equal(spatial(56, 1., other), other)


def test_unused_temperatures_are_dropped_by_name_and_made_again():
  spec, state = _small()
  params, report = torch_layout.from_torch({**state, 'loss_prepare.logit_scale_img_cls': np.float32(1)}, spec)
  assert 'config.model.extra_temperature_groups' in report.dropped['loss_prepare.logit_scale_img_cls']
  assert 'log_scale_img_cls' not in params
  assert state['loss_prepare.logit_scale_img_cls'] == np.float32(np.log(1 / .07))


def test_position_tables_of_another_size_are_interpolated():
  spec, state = _small(max_num_frames=4)
  smaller, _ = _small(max_num_frames=2)
  params, report = torch_layout.from_torch(state, smaller)
  key = 'video_embed.embeddings_st_pos.temporal_pos_embed.weight'
  old = state[key]
  # Two rows from four: each is the mean of two.
  np.testing.assert_allclose(params['embed']['temporal'], (old[::2] + old[1::2]) / 2, rtol=1e-5, atol=1e-6)
  assert report.resized == {key: 'from 4 to 2 rows'}


@pytest.mark.parametrize('changes, message', [
    ({'router': 'task', 'router_names': ('a',)}, "router='task' is not supported"),
    ({'temperature_groups': ('mine',)}, "no temperature group 'mine'")])
def test_a_model_that_the_published_layout_cannot_represent_is_refused(changes, message):
  with pytest.raises(LayoutError, match=message):
    torch_layout.entries(small_model.spec(**changes))


def test_fields_that_a_file_does_not_contain_are_reported():
  assert 'heads 2, top_k 2, prefix <spe>' in torch_layout.taken_from_config(small_model.spec())
