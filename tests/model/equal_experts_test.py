"""A model with equal experts is the dense model, in the loss and in the sum of their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests.helpers import small_model
from uni_moe_jax import config
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.train import forward

_BATCH, _WORDS = 4, small_model.WORDS
_PROJECTIONS = ('qkv', 'attention_out', 'ffn_in', 'ffn_out')


@functools.cache
def _plan():
  """Captions among the vocabulary: three conditions, segments that join keys and values, two sequences."""
  c = config.base()
  c.target_sets.vocabulary = config.target_set('vocabulary', family='words')
  c.tasks.caption = config.task(
      'image_caption', 'glyphs', batch_size=_BATCH, target_set='vocabulary', caption_templates=('{name}',),
      max_len=_WORDS)
  return make_plan(c)


def _spec(router: str):
  return small_model.spec(router, num_layers=2, temperature_groups=_plan().temperatures)


@functools.cache
def _data():
  """(batch, sets): one shard; fields as the mixture makes them."""
  rng = np.random.default_rng(0)
  words = jnp.asarray(rng.integers(2, small_model.VOCABULARY, (1, _BATCH, _WORDS)), jnp.int32)
  real = jnp.asarray(rng.random((1, _BATCH, _WORDS)) < .8).at[:, :, 0].set(True)
  fields = dict(
      id=jnp.arange(_BATCH)[None], pixels=jnp.asarray(rng.normal(size=(1, _BATCH, 1, 8, 8, 1)), jnp.float32),
      temporal_offset=jnp.int32(1), text=jnp.concatenate([words, jnp.full_like(words, small_model.SPE)], axis=2),
      text_valid=jnp.concatenate([real, real], axis=2), label=words, weight=real.astype(jnp.float32))
  vocabulary = {'buckets': (), 'order': jnp.arange(small_model.VOCABULARY)}
  return {'image_caption': fields}, {'vocabulary': vocabulary}


@functools.cache
def _loss(router: str, gradient: bool = False):
  """parameters → total loss of a training step with router noise, optionally with its gradient."""
  spec = forward.StepSpec(
      model=UniPerceiver(_spec(router)), plan=_plan(), optimizer=None, grad_accum_steps=1,
      ema_decay=0.0, eot=small_model.EOT)

  def loss(values, batch, sets):
    features, _ = forward.forward(spec, values, batch, sets, {}, jax.random.key(4))
    return forward.task_losses(spec, values, batch, features, {}, forward.weight_sums(spec, batch, {}))[0]

  run = small_model.jit(jax.value_and_grad(loss) if gradient else loss)
  return lambda values: run(values, *_data())


def _flat(tree) -> dict[str, np.ndarray]:
  return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep='/').items()}


def _is_expert(path: str) -> bool:
  return any(f'/{p}/' in path for p in _PROJECTIONS)


def _expert_axis(path: str) -> int:
  """The axis of experts, which follows that of stacked layers."""
  return 1 if '/blocks/' in path else 0


@functools.cache
def _equal_experts(router: str):
  """Parameters in which every expert is the dense model's projection; routers keep their own."""
  values, dense = _flat(small_model.params(_spec(router))), _flat(small_model.params(_spec('dense')))
  for path, leaf in dense.items():
    expert = lambda x, p=path: np.repeat(np.expand_dims(x, _expert_axis(p)), 4, axis=_expert_axis(p))
    values[path] = expert(leaf) if _is_expert(path) else leaf
  return traverse_util.unflatten_dict(values, sep='/')


def _distance(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@functools.cache
def _dense():
  return _loss('dense', gradient=True)(small_model.params(_spec('dense')))


@functools.cache
def _moe():
  return _loss('attribute', gradient=True)(_equal_experts('attribute'))


@pytest.mark.nightly
def test_the_loss_of_attribute_routing_is_the_dense_loss():
  np.testing.assert_allclose(_moe()[0], _dense()[0], rtol=1e-5)


@pytest.mark.parametrize('router', ['task', 'modality'])
@pytest.mark.nightly
def test_the_loss_of_the_other_routers_is_the_dense_loss(router):
  np.testing.assert_allclose(_loss(router)(_equal_experts(router)), _dense()[0], rtol=1e-5)


def test_the_gradients_of_the_experts_sum_to_the_dense_gradient_and_all_others_are_equal():
  actual, expected = _flat(_moe()[1]), _flat(_dense()[1])
  assert sum(map(_is_expert, expected)) == 2 * 2 * len(_PROJECTIONS)  # scanned and tail; kernel and bias
  for path, gradient in expected.items():
    if _is_expert(path):
      assert _distance(actual[path].sum(_expert_axis(path)), gradient) < 1e-5, path
    elif np.abs(gradient).max() > 0:
      assert _distance(actual[path], gradient) < 1e-5, path


def test_the_choice_of_equal_experts_does_not_matter():
  # The gates have no gradient but rounding, next to the experts'.
  actual = _flat(_moe()[1])
  gates = max(np.abs(v).max() for p, v in actual.items() if p.endswith('/gate'))
  experts = max(np.abs(v).max() for p, v in actual.items() if _is_expert(p))
  assert gates < 1e-4 * experts


def test_unequal_experts_are_another_model():
  # The control of the tests above: here the loss differs, and the gates do have a gradient.
  loss, gradient = _loss('attribute', gradient=True)(small_model.params(_spec('attribute')))
  assert abs(float(loss - _dense()[0])) > 1e-2
  gates = [np.abs(v).max() for p, v in _flat(gradient).items() if p.endswith('/gate')]
  assert min(gates) > 1e-4
