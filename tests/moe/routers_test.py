"""Decisions with coefficients worked out by hand, the three routers' inputs, and their noise."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.moe import routers
from uni_moe_jax.tasks import router_names, task_types
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.utils.errors import UsageError

_LOGITS = np.log([[1., 2., 3., 4.]])  # probabilities .1 .2 .3 .4


@pytest.mark.parametrize('top_k, expert, coef', [
    (1, [3], [0, 0, 0, 1]), (2, [3, 2], [0, 0, 3 / 7, 4 / 7]), (3, [3, 2, 1], [0, 2 / 9, 3 / 9, 4 / 9]),
    (4, [3, 2, 1, 0], [.1, .2, .3, .4])])
def test_the_best_k_experts_share_their_probability(top_k, expert, coef):
  decision = routers.route(jnp.asarray(_LOGITS), top_k)
  np.testing.assert_array_equal(decision.expert, [expert])
  np.testing.assert_allclose(decision.coef, [coef], rtol=1e-6)


def test_each_condition_has_its_own_experts_of_equal_ones_the_first_in_float32():
  # Row 1 has the probabilities .4 .1 .4 .1: experts 0 and 2, a half each; row 2 has equal experts.
  logits = jnp.asarray(np.concatenate([_LOGITS, np.log([[4., 1., 4., 1.]]), np.zeros((1, 4))]))
  decision = routers.route(logits, 2)
  np.testing.assert_array_equal(decision.expert, [[3, 2], [0, 2], [0, 1]])
  np.testing.assert_allclose(decision.coef, [[0, 0, 3 / 7, 4 / 7], [.5, 0, .5, 0], [.5, .5, 0, 0]], rtol=1e-6)
  np.testing.assert_array_equal(decision.coef[2], [.5, .5, 0, 0])
  decision = routers.route(jnp.asarray(_LOGITS, jnp.bfloat16), 2)
  assert {decision.logits.dtype, decision.coef.dtype} == {jnp.dtype('float32')}


def test_the_gradient_reaches_the_kept_experts_only():
  # coef_3 = 4/7 of softmax(log 3, log 4): d/dlogit_3 = 4/7 · 3/7, d/dlogit_2 = -4/7 · 3/7, nothing else.
  gradient = jax.grad(lambda x: routers.route(x, 2).coef[0, 3])(jnp.asarray(_LOGITS, jnp.float32))
  np.testing.assert_allclose(gradient, [[0, 0, -12 / 49, 12 / 49]], atol=1e-6)


@pytest.mark.parametrize('top_k, learns', [(1, False), (2, True)])
def test_a_router_that_keeps_one_expert_has_no_gradient(top_k, learns):
  loss = lambda logits: routers.route(logits, top_k).coef[0] @ jnp.arange(4.)
  gradient = jnp.abs(jax.grad(loss)(jnp.asarray(_LOGITS, jnp.float32))).max()
  assert (gradient > .1) == learns and (gradient < 1e-6) != learns


def test_a_single_condition_needs_its_axis():
  with pytest.raises(AssertionError, match='rank'):
    routers.route(jnp.zeros(4), 2)


def _conditions(*names: str) -> tuple[Condition, ...]:
  return tuple(c for k in names for c in task_types.TASK_TYPES[k].conditions)


# image_classification, image_retrieval, text_mlm, image_caption (image, text), words
_CONDITIONS = (*_conditions('image_classification', 'image_retrieval', 'text_mlm', 'image_caption'),
               task_types.families()['words'])


@pytest.mark.parametrize('router, rows', [
    ('modality', ('visual', 'text')), ('task', ('classification', 'retrieval', 'mlm', 'caption', 'words')),
    ('dense', (None,)),
    ('attribute', tuple(tuple(map(int, bits)) for bits in (  # classification and retrieval have the same
        '10011000', '01010100', '11011000', '11010101', '11010110')))])
def test_distinct_inputs_are_in_order(router, rows):
  assert routers.distinct_inputs(router, _CONDITIONS) == rows


@pytest.mark.parametrize('router', router_names.ROUTERS)
def test_every_condition_has_an_input(router):
  rows = routers.distinct_inputs(router, _CONDITIONS)
  assert {routers.router_input(router, c) for c in _CONDITIONS} == set(rows)


def test_only_routers_by_name_have_a_table():
  tables = {r: routers.table_names(r, ('mlm', 'words')) for r in router_names.ROUTERS}
  assert {r: t for r, t in tables.items() if t} == {'task': ('mlm', 'words'), 'modality': ('visual', 'text')}


def test_attributes_are_embedded_as_the_sum_of_their_rows():
  # Rows of W are 1, 10, 100, …: the bits can be read off. Bias 0.5.
  kernel = 10.0 ** jnp.arange(8)[:, None] * jnp.ones((8, 2))
  values = {'kernel': kernel, 'bias': jnp.array([.5, -.5])}
  rows = ((1, 0, 0, 1, 1, 0, 0, 0), (0, 1, 0, 1, 0, 1, 0, 0))
  h = routers.AttributeEmbedding(2).apply({'params': values}, rows)
  np.testing.assert_array_equal(h, [[11001.5, 11000.5], [101010.5, 101009.5]])
  for wrong, got in ((rows[0], '1'), ((rows[0], (1, 0)), r'\(1, 0\) of 2')):
    with pytest.raises(UsageError, match=f'attribute bits of a condition must be .* zeros and ones, got {got}'):
      routers.AttributeEmbedding(2).apply({'params': values}, wrong)


def test_a_name_is_its_row_of_the_table_and_an_unknown_name_an_error():
  module = routers.NameEmbedding(2, ('mlm', 'caption', 'words'))
  values = {'params': {'embedding': jnp.array([[0., 1.], [10., 11.], [20., 21.]])}}
  np.testing.assert_array_equal(module.apply(values, ('words', 'mlm')), [[20, 21], [0, 1]])
  message = (r"the router has no embedding for 'search', only for mlm, caption, words\. A task type that was added "
             'after training needs attribute or modality routing, or a dense model')
  with pytest.raises(UsageError, match=message):
    module.apply(values, ('mlm', 'search'))


def _router(noise_std: float = 1.0) -> routers.ConditionRouter:
  return routers.ConditionRouter(small_model.spec('modality', width=2, num_heads=1, noise_std=noise_std))


# Table rows (3, 1) and (0, 4) are (1, -1) and (-1, 1) after the norm; with scale (2, 1) and bias (0, 1) they are (2, 0)
# and (-2, 2).
_NAMED = {
    'embed': {'embedding': jnp.array([[3., 1.], [0., 4.]])},
    'norm': {'scale': jnp.array([2., 1.]), 'bias': jnp.array([0., 1.])},
    'gate': jnp.array([[0., 1., 2., 3.], [5., 4., 0., 0.]]),
}


def test_logits_and_the_best_gate_by_hand():
  # (2, 0)·W = (0, 2, 4, 6), of which 6 and 4 are left: e²/(e² + 1); (-2, 2)·W = (10, 6, -4, -6).
  decision = _router().apply({'params': _NAMED}, ('visual', 'text'), None)
  np.testing.assert_allclose(decision.logits, [[0, 2, 4, 6], [10, 6, -4, -6]], rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(decision.expert, [[3, 2], [0, 1]])
  np.testing.assert_allclose(decision.coef[0, 3], np.e**2 / (np.e**2 + 1), rtol=1e-4)


def test_noise_is_added_to_the_logits_but_not_at_evaluation():
  key, rows = jax.random.key(3), ('visual', 'text')
  calm, noisy = (_router().apply({'params': _NAMED}, rows, k).logits for k in (None, key))
  np.testing.assert_allclose(noisy - calm, routers.input_noise(key, rows, 4, 1.0), atol=1e-5)
  np.testing.assert_array_equal(calm, _router(noise_std=0.0).apply({'params': _NAMED}, rows, key).logits)


_KEY = jax.random.key(7)


def _noise(*rows, key=None):
  return np.asarray(routers.input_noise(_KEY if key is None else key, rows, 4, 1.0))


def test_the_noise_of_an_input_depends_on_its_value_and_the_key_but_not_on_other_inputs():
  alone, among, last = _noise('words'), _noise('words', 'mlm'), _noise('vqa', 'mlm', 'words')
  np.testing.assert_array_equal(alone[0], among[0])
  np.testing.assert_array_equal(alone[0], last[2])
  noise = _noise('words', 'mlm', (1, 0, 0, 1, 1, 0, 0, 0), (1, 0, 0, 1, 1, 0, 0, 1))
  assert len(np.unique(noise)) == noise.size
  assert not np.any(alone == _noise('words', key=jax.random.key(8)))


def test_the_standard_deviation_of_noise_is_that_of_the_config_over_the_experts():
  # 8000 draws of N(0, (2/4)²): the estimate of .5 has a standard error of .004.
  noise = np.asarray(routers.input_noise(_KEY, tuple(range(2000)), 4, 2.0))
  np.testing.assert_allclose(noise.std(), .5, atol=.016)
  np.testing.assert_allclose(noise.mean(), 0, atol=.023)


def test_the_hash_of_an_input_is_the_same_in_every_process():
  # Python's own hash() of a string differs from run to run. CRC-32 of mlm with its quotes, and its value.
  assert routers.input_hash('mlm') == zlib.crc32(b"'mlm'")
  assert routers.input_hash('mlm') == 1209776402
