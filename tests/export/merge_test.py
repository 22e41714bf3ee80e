"""A merged model equals the model with experts for every task type and has no routers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from tests.helpers import small_model
from uni_moe_jax.export import merge
from uni_moe_jax.model.initialization import param_shapes
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.tasks import task_types
from uni_moe_jax.utils.tree_paths import by_path

_BOUND = 1e-5  # relative, float32
_TASK_TYPES = tuple(task_types.TASK_TYPES)
_PAIR = task_types.TASK_TYPES['image_retrieval'].pair_condition
_TARGETS = (_PAIR, *task_types.families().values())


@functools.cache
def _sequences():
  """Inputs of every task type, paired texts and both target families. Videos have one frame to save compilation."""
  pixels = {'pixels': small_model.sequence('image_caption').pixels}
  inputs = [small_model.sequence(t, **(pixels if t.visual else {})) for t in task_types.TASK_TYPES.values()]
  return tuple(inputs + [small_model.target(c) for c in _TARGETS])


def _conditions():
  return tuple(dict.fromkeys(c for s in _sequences() for c in s.layout.conditions))


@functools.cache
def _spec(router: str, **changes):
  """A spec; with prompts for one router, which is enough to test that prompts use the condition of their sequence."""
  return small_model.spec(router, num_deep_prompts=2 if router == 'attribute' else 0, **changes)


@functools.cache
def _features(spec, conditions=None):
  """Features [B, R, D] per sequence, of the model (conditions None) or of the merged model."""
  values = small_model.params(spec)
  if conditions is not None:
    spec, values = merge.merged(spec, values, conditions)
  return _encoded(spec, values)


def _encoded(spec, values, sequences=None):
  run = small_model.jit(lambda values, sequences: small_model.encode(spec, sequences, values=values)[0])
  return jax.device_get(run(values, _sequences() if sequences is None else sequences))


def _distance(a, b) -> float:
  return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


class MergedModelTest(parameterized.TestCase):

  def test_every_task_type_has_the_features_of_the_model_with_experts(self):
    self._compare('attribute')

  @parameterized.parameters('task', 'modality')
  @pytest.mark.slow
  def test_every_task_type_has_them_with_other_routers(self, router):
    self._compare(router)

  def _compare(self, router):
    merged, expected = _features(_spec(router), _conditions()), _features(_spec(router))
    for name, a, b in zip((*_TASK_TYPES, 'pair', *task_types.families()), merged, expected, strict=True):
      self.assertLess(_distance(a, b), _BOUND, name)

  def test_kernels_of_other_conditions_give_other_features(self):
    # A control of the test above: it would detect a wrong kernel.
    spec, values = merge.merged(_spec('attribute'), small_model.params(_spec('attribute')), _conditions())
    swapped = dataclasses.replace(spec, kernels=tuple((name, (k + 1) % spec.num_experts) for name, k in spec.kernels))
    for a, b in zip(_encoded(swapped, values), _features(_spec('attribute'))):
      self.assertGreater(_distance(a, b), 1e-2)

  @parameterized.parameters(('attribute', 7), ('task', 8), ('modality', 2))
  def test_there_is_one_kernel_per_distinct_condition(self, router, kernels):
    # Attributes: six published conditions and vqa's question; images of vqa and captions share one.
    # Tasks: six and two families.
    spec, values = merge.merged(_spec(router), small_model.params(_spec(router)), _conditions())
    self.assertEqual(spec.num_experts, kernels)
    self.assertEqual(sorted({k for _, k in spec.kernels}), list(range(kernels)))
    shapes = {path: leaf.shape for path, leaf in by_path(values).items()}
    self.assertEqual(shapes['encoder/tail/block0/ffn_in/kernel'], (kernels, 16, 24))
    self.assertEqual(shapes, {path: s.shape for path, s in by_path(param_shapes(UniPerceiver(spec))).items()})
    self.assertFalse([path for path in shapes if 'router' in path])

  def test_a_model_without_texts_of_target_sets_has_the_same_shapes(self):
    # Captions with baked words: the parameters do not depend on the merged conditions.
    conditions = task_types.TASK_TYPES['image_caption'].conditions
    spec, values = merge.merged(_spec('attribute'), small_model.params(_spec('attribute')), conditions)
    shapes = {path: leaf.shape for path, leaf in by_path(values).items()}
    self.assertEqual({path: s.shape for path, s in by_path(param_shapes(UniPerceiver(spec))).items()}, shapes)

  def test_a_condition_that_was_not_merged_is_named(self):
    spec, values = merge.merged(_spec('attribute'), small_model.params(_spec('attribute')), _TARGETS)
    with self.assertRaisesRegex(ValueError,
                                r'no kernel for 10011000 \(classification, visual\); it has 10010110, 11010110'):
      jax.eval_shape(lambda v: small_model.encode(spec, [small_model.sequence('image_classification')], values=v),
                     values)


class DenseTest(parameterized.TestCase):

  @parameterized.parameters(
      ('attribute', 'all'), ('attribute', 'every_2'), ('task', 'all'), ('modality', (0, 1)))
  def test_one_condition_gives_a_dense_model(self, router, placement):
    trained = small_model.spec(router, placement=placement)
    conditions = task_types.TASK_TYPES['image_classification'].conditions
    spec, values = merge.merged(trained, small_model.params(trained), conditions)
    self.assertEqual((spec.router, spec.kernels), ('dense', ()))
    dense = param_shapes(UniPerceiver(small_model.spec('dense')))
    self.assertEqual(jax.tree.map(lambda x: (x.shape, x.dtype), values),
                     jax.tree.map(lambda x: (x.shape, x.dtype), dense))

  def test_it_has_the_features_of_the_model_with_experts(self):
    # With experts in every other layer two layers form a period, unlike in a dense model.
    trained = small_model.spec('attribute', placement='every_2', num_layers=4)
    sequence = (small_model.sequence('image_classification'),)
    features = _encoded(*merge.merged(trained, small_model.params(trained), sequence[0].layout.conditions), sequence)
    self.assertLess(_distance(features[0], _encoded(trained, small_model.params(trained), sequence)[0]), _BOUND)

  def test_task_types_of_one_router_input_are_one_condition(self):
    # Attribute bits of images are the same in classification and retrieval; the task router separates them.
    types = task_types.TASK_TYPES['image_classification'], task_types.TASK_TYPES['image_retrieval']
    conditions = tuple(c for t in types for c in t.conditions)
    for router, kernels in (('attribute', ()), ('modality', ()), ('task', (('classification', 0), ('retrieval', 1)))):
      spec = small_model.spec(router)
      self.assertEqual(merge.merged(spec, small_model.params(spec), conditions)[0].kernels, kernels)

  def test_a_merged_kernel_is_the_weighted_sum_of_its_experts(self):
    # Gates of one layer whose logits are log 3 apart: coefficients 3/4 and 1/4 of kernels 1 and 5 give 2.
    spec = small_model.spec('modality', num_experts=2, num_layers=1)
    values = jax.tree.map(jnp.zeros_like, small_model.params(spec))
    block = values['encoder']['tail']['block0']
    block['ffn_router']['embed']['embedding'] = jnp.tile(jnp.asarray([-1.0, 1.0]), 8)[None].repeat(2, 0)
    block['ffn_router']['norm']['scale'] = jnp.ones(16)
    block['ffn_router']['gate'] = block['ffn_router']['gate'].at[1, 0].set(np.log(3))
    block['ffn_in']['kernel'] = jnp.stack([jnp.full((16, 24), 1.0), jnp.full((16, 24), 5.0)])
    block['ffn_in']['bias'] = jnp.stack([jnp.full(24, 8.0), jnp.full(24, 0.0)])
    _, merged = merge.merged(spec, values, task_types.TASK_TYPES['image_classification'].conditions)
    np.testing.assert_allclose(merged['encoder']['tail']['block0']['ffn_in']['kernel'], np.full((16, 24), 2.0),
                               rtol=1e-5)
    np.testing.assert_allclose(merged['encoder']['tail']['block0']['ffn_in']['bias'], np.full(24, 6.0), rtol=1e-5)


class GroupsTest(absltest.TestCase):

  def test_conditions_with_equal_coefficients_share_a_kernel(self):
    # With K = 1 every coefficient is 1, so conditions with the same expert have equal coefficients.
    spec = small_model.spec('task', top_k=1, num_experts=2, num_layers=1)
    values = jax.tree.map(jnp.zeros_like, small_model.params(spec))
    block = values['encoder']['tail']['block0']
    names = spec.router_names
    for router in ('attention_router', 'ffn_router'):
      table = np.zeros((len(names), 16), np.float32)
      table[:, 0] = [1.0 if n == 'mlm' else -1.0 for n in names]
      block[router]['embed']['embedding'] = jnp.asarray(table)
      block[router]['norm']['scale'] = jnp.ones(16)
      block[router]['gate'] = jnp.zeros((16, 2)).at[0, 1].set(1.0)
    conditions = _conditions()
    merged, _ = merge.merged(spec, values, conditions)
    self.assertEqual(merged.num_experts, 2)
    self.assertEqual({name for name, k in merged.kernels if k == dict(merged.kernels)['mlm']}, {'mlm'})
    self.assertEqual(merge.merged(spec, values, tuple(c for c in conditions if c.task != 'mlm'))[0].router, 'dense')

  def test_a_router_by_token_cannot_be_merged(self):
    spec = small_model.spec('token')
    with self.assertRaisesRegex(ValueError, "router='token' cannot be merged: it selects experts per token"):
      merge.merged(spec, small_model.params(spec), _conditions())


if __name__ == '__main__':
  absltest.main()
