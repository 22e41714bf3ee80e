"""A merged model equals the model with experts for every task type and has no routers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.export import merge
from uni_moe_jax.model.spec import PROJECTIONS
from uni_moe_jax.model.uni_perceiver import UniPerceiver, param_shapes
from uni_moe_jax.tasks.task_types import TASK_TYPES, families
from uni_moe_jax.utils.tree_paths import by_path, path_of

_BOUND = 1e-5  # relative, float32
_TARGETS = (TASK_TYPES['image_retrieval'].pair_condition, *families().values())


@functools.cache
def _sequences():
  """Inputs of every task type, paired texts and both target families. Videos have one frame to save compilation."""
  pixels = {'pixels': small_model.sequence('image_caption').pixels}
  inputs = [small_model.sequence(t, **(pixels if t.visual else {})) for t in TASK_TYPES.values()]
  return tuple(inputs + [small_model.target(c) for c in _TARGETS])


def _conditions():
  return tuple(dict.fromkeys(c for s in _sequences() for c in s.layout.conditions))


@functools.cache
def _spec(router: str):
  """A spec; with prompts for one router, which is enough to test that prompts use the condition of their sequence."""
  return small_model.spec(router, num_deep_prompts=2 if router == 'attribute' else 0)


def _merged(spec, conditions, values=None):
  """(spec, parameters) of the merged model."""
  return merge.merged(spec, small_model.params(spec) if values is None else values, conditions)


def _features(spec, values=None, sequences=None):
  """Features [B, R, D] per sequence."""
  return jax.device_get(small_model.run(spec, sequences or _sequences(), values=values)[0])


@functools.cache
def _features_with_experts(router: str):
  return _features(_spec(router))


def _distance(a, b) -> float:
  return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def _shapes(tree):
  return {path: x.shape for path, x in by_path(tree).items()}


@pytest.mark.parametrize('router', [
    'attribute', *(pytest.param(router, marks=pytest.mark.nightly) for router in ('task', 'modality'))])
def test_every_task_type_has_the_features_of_the_model_with_experts(router):
  merged, expected = _features(*_merged(_spec(router), _conditions())), _features_with_experts(router)
  for name, a, b in zip((*TASK_TYPES, 'pair', *families()), merged, expected, strict=True):
    assert _distance(a, b) < _BOUND, name


def test_kernels_of_other_conditions_give_other_features():
  # A control of the test above: it would detect a wrong kernel.
  spec, values = _merged(_spec('attribute'), _conditions())

  def following(path, x):
    path = path_of(path)
    return np.roll(x, -1, axis='/blocks/' in path) if any(f'/{name}/' in path for name in PROJECTIONS) else x

  others = jax.tree_util.tree_map_with_path(following, values)
  for a, b in zip(_features(spec, others), _features_with_experts('attribute')):
    assert _distance(a, b) > 1e-2


@pytest.mark.parametrize('router, kernels', [('attribute', 7), ('task', 8), ('modality', 2)])
def test_there_is_one_kernel_per_distinct_condition(router, kernels):
  # Attributes: six published conditions and vqa's question; images of vqa and captions share one.
  # Tasks: six and two families.
  spec, values = _merged(_spec(router), _conditions())
  assert spec.num_experts == kernels
  assert sorted({k for _, k in spec.kernels}) == list(range(kernels))
  shapes = _shapes(values)
  assert shapes['encoder/tail/block0/ffn_in/kernel'] == (kernels, 16, 24)
  assert shapes == _shapes(param_shapes(UniPerceiver(spec)))
  assert not [path for path in shapes if 'router' in path]


def test_a_model_without_texts_of_target_sets_has_the_same_shapes():
  # Captions with baked words: the parameters do not depend on the merged conditions.
  spec, values = _merged(_spec('attribute'), TASK_TYPES['image_caption'].conditions)
  assert _shapes(param_shapes(UniPerceiver(spec))) == _shapes(values)


def test_a_condition_that_was_not_merged_is_named():
  spec, values = _merged(_spec('attribute'), _TARGETS)
  encode = lambda v: small_model.encode(spec, [small_model.sequence('image_classification')], values=v)
  message = r'no kernel for 10011000 \(classification, visual\); it has 10010110, 11010110'
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(encode, values)


@pytest.mark.parametrize('router, placement', [
    ('attribute', 'all'), ('attribute', 'every_2'), ('task', 'all'), ('modality', (0, 1))])
def test_one_condition_gives_a_dense_model(router, placement):
  trained = small_model.spec(router, placement=placement)
  spec, values = _merged(trained, TASK_TYPES['image_classification'].conditions)
  assert (spec.router, spec.kernels) == ('dense', ())
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(values) == shapes(param_shapes(UniPerceiver(small_model.spec('dense'))))


def test_a_dense_model_has_the_features_of_the_model_with_experts():
  # With experts in every other layer two layers form a period, unlike in a dense model.
  trained = small_model.spec('attribute', placement='every_2', num_layers=4)
  sequence = (small_model.sequence('image_classification'),)
  features = _features(*_merged(trained, sequence[0].layout.conditions), sequence)
  assert _distance(features[0], _features(trained, sequences=sequence)[0]) < _BOUND


@pytest.mark.parametrize('router, kernels', [
    ('attribute', ()), ('modality', ()), ('task', (('classification', 0), ('retrieval', 1)))])
def test_task_types_of_one_router_input_are_one_condition(router, kernels):
  # Attribute bits of images are the same in classification and retrieval; the task router separates them.
  conditions = TASK_TYPES['image_classification'].conditions + TASK_TYPES['image_retrieval'].conditions
  assert _merged(small_model.spec(router), conditions)[0].kernels == kernels


def test_a_merged_kernel_is_the_weighted_sum_of_its_experts():
  # Gates of one layer whose logits are log 3 apart: coefficients 3/4 and 1/4 of kernels 1 and 5 give 2.
  spec = small_model.spec('modality', num_experts=2, num_layers=1)
  values = jax.tree.map(jnp.zeros_like, small_model.params(spec))
  block = values['encoder']['tail']['block0']
  block['ffn_router']['embed']['embedding'] = jnp.tile(jnp.asarray([-1.0, 1.0]), 8)[None].repeat(2, 0)
  block['ffn_router']['norm']['scale'] = jnp.ones(16)
  block['ffn_router']['gate'] = block['ffn_router']['gate'].at[1, 0].set(np.log(3))
  block['ffn_in']['kernel'] = jnp.stack([jnp.full((16, 24), 1.0), jnp.full((16, 24), 5.0)])
  block['ffn_in']['bias'] = jnp.stack([jnp.full(24, 8.0), jnp.full(24, 0.0)])
  _, merged = _merged(spec, TASK_TYPES['image_classification'].conditions, values)
  ffn_in = merged['encoder']['tail']['block0']['ffn_in']
  np.testing.assert_allclose(ffn_in['kernel'], np.full((16, 24), 2.0), rtol=1e-5)
  np.testing.assert_allclose(ffn_in['bias'], np.full(24, 6.0), rtol=1e-5)


def test_conditions_with_equal_coefficients_share_a_kernel():
  # With K = 1 every coefficient is 1, so conditions with the same expert have equal coefficients.
  spec = small_model.spec('task', top_k=1, num_experts=2, num_layers=1)
  values = jax.tree.map(jnp.zeros_like, small_model.params(spec))
  table = np.zeros((len(spec.router_names), 16), np.float32)
  table[:, 0] = [1.0 if n == 'mlm' else -1.0 for n in spec.router_names]
  for router in ('attention_router', 'ffn_router'):
    router = values['encoder']['tail']['block0'][router]
    router['embed']['embedding'], router['norm']['scale'] = jnp.asarray(table), jnp.ones(16)
    router['gate'] = jnp.zeros((16, 2)).at[0, 1].set(1.0)
  merged, _ = _merged(spec, _conditions(), values)
  assert merged.num_experts == 2
  assert {name for name, k in merged.kernels if k == dict(merged.kernels)['mlm']} == {'mlm'}
  assert _merged(spec, tuple(c for c in _conditions() if c.task != 'mlm'), values)[0].router == 'dense'


def test_a_router_by_token_cannot_be_merged():
  with pytest.raises(ValueError, match="router='token' cannot be merged: it selects experts per token"):
    _merged(small_model.spec('token'), _conditions())
