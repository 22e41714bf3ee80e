"""A model merged inside a program is the model with experts, and a loop that runs it reads no experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.model import decoding, merging
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.tasks import task_types
from uni_moe_jax.utils.tree_paths import by_path

_TASK_TYPE = task_types.TASK_TYPES['image_caption']
_VQA = task_types.TASK_TYPES['vqa'].conditions
_EXPERTS = 13  # as no other axis


def _spec(router: str, **changes):
  return small_model.spec(router, num_experts=_EXPERTS, **changes)


@pytest.mark.parametrize('router, changes, others', [
    ('attribute', {}, _VQA[::-1]), ('task', {'placement': 'every_2', 'num_layers': 5}, _TASK_TYPE.conditions),
    ('modality', {'sublayers': ('mlp',), 'num_deep_prompts': 2}, _VQA[::-1])])
def test_features_are_those_of_the_model_with_experts(router, changes, others):
  spec, sequence = _spec(router, **changes), small_model.sequence('vqa')

  def run(values):
    features = lambda spec, values: small_model.encode(spec, [sequence], values=values)[0][0]
    merged, right = merging.merge_experts(spec, values, _VQA)  # prompts have the condition of the first segment
    both = jax.tree.map(lambda *x: jnp.stack(x), right, merging.merge_experts(spec, values, others)[1])
    return features(spec, values), *jax.lax.map(functools.partial(features, merged), both)

  experts, merged, wrong = small_model.jit(run)(small_model.params(spec))
  np.testing.assert_allclose(merged, experts, rtol=2e-5, atol=2e-5)
  assert float(jnp.abs(wrong - experts).max()) > 1e-2  # each condition has its own kernel


def test_what_is_no_expert_is_not_copied():
  spec = _spec('attribute')
  values = small_model.params(spec)
  _, merged = merging.merge_experts(spec, values, _VQA)
  before, after = by_path(values), by_path(merged)
  shared = {path for path, x in after.items() if x is before[path]}
  assert {path for path in before if 'router' not in path and 'norm' in path} <= shared
  assert all(_EXPERTS not in x.shape for x in after.values())
  assert len(shared) < len(after) < len(before)  # kernels are merged, routers are gone


@pytest.mark.parametrize('router', ['dense', 'token', 'context'])
def test_models_without_merging_routers_stay_unchanged(router):
  spec = _spec(router)
  values = small_model.params(spec)
  actual = merging.merge_experts(spec, values, _TASK_TYPE.conditions)
  assert actual[0] is spec
  assert actual[1] is values


@pytest.mark.parametrize('router, reads', [('attribute', False), ('token', True)])
def test_the_loop_over_words_reads_experts_only_where_tokens_choose_them(router, reads):
  spec = _spec(router)
  pixels = jnp.zeros((2, 1, small_model.SIDE, small_model.SIDE, 1))

  def search(values):
    return decoding.beam_search(
        decoding.Decoder.of(UniPerceiver(spec), values, _TASK_TYPE), pixels, jnp.zeros((7, spec.width)),
        temperature='group', spe=small_model.SPE, eot=small_model.EOT, max_len=3, beam_size=2)

  [loop] = [e for e in jax.make_jaxpr(search)(small_model.params(spec)).eqns if e.primitive.name == 'while']
  assert any(_EXPERTS in v.aval.shape for v in loop.invars) == reads
