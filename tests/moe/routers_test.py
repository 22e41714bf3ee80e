"""Decisions with coefficients worked out by hand, the three routers' inputs, and their noise."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from uni_moe_jax.moe import routers
from uni_moe_jax.tasks import attributes, router_names, task_types
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.utils.errors import UsageError

_LOGITS = np.log([[1., 2., 3., 4.]])  # probabilities .1 .2 .3 .4


class RouteTest(parameterized.TestCase):

  @parameterized.parameters(
      (1, [3], [0, 0, 0, 1]),
      (2, [3, 2], [0, 0, 3 / 7, 4 / 7]),
      (3, [3, 2, 1], [0, 2 / 9, 3 / 9, 4 / 9]),
      (4, [3, 2, 1, 0], [.1, .2, .3, .4]))
  def test_the_best_k_experts_share_their_probability(self, top_k, expert, coef):
    decision = routers.route(jnp.asarray(_LOGITS), top_k)
    np.testing.assert_array_equal(decision.expert, [expert])
    np.testing.assert_allclose(decision.coef, [coef], rtol=1e-6)

  def test_each_condition_has_its_own_experts(self):
    # Row 1 has the probabilities .4 .1 .4 .1: experts 0 and 2, a half each.
    logits = jnp.asarray(np.concatenate([_LOGITS, np.log([[4., 1., 4., 1.]])]))
    decision = routers.route(logits, 2)
    np.testing.assert_array_equal(decision.expert, [[3, 2], [0, 2]])
    np.testing.assert_allclose(decision.coef, [[0, 0, 3 / 7, 4 / 7], [.5, 0, .5, 0]], rtol=1e-6)

  def test_of_equal_experts_the_first_are_kept(self):
    decision = routers.route(jnp.zeros((1, 4)), 2)
    np.testing.assert_allclose(decision.coef, [[.5, .5, 0, 0]])

  def test_outputs_are_float32_for_any_input_dtype(self):
    decision = routers.route(jnp.asarray(_LOGITS, jnp.bfloat16), 2)
    self.assertEqual({decision.logits.dtype, decision.coef.dtype}, {jnp.dtype('float32')})

  def test_the_gradient_reaches_the_kept_experts_only(self):
    # coef_3 = 4/7 of softmax(log 3, log 4): d/dlogit_3 = 4/7 · 3/7, d/dlogit_2 = -4/7 · 3/7, nothing else.
    gradient = jax.grad(lambda x: routers.route(x, 2).coef[0, 3])(jnp.asarray(_LOGITS, jnp.float32))
    np.testing.assert_allclose(gradient, [[0, 0, -12 / 49, 12 / 49]], atol=1e-6)

  def test_a_single_condition_needs_its_axis(self):
    with self.assertRaisesRegex(AssertionError, 'rank'):
      routers.route(jnp.zeros(4), 2)


def _conditions(*names: str) -> tuple[Condition, ...]:
  return tuple(c for k in names for c in task_types.TASK_TYPES[k].conditions)


class RouterInputsTest(parameterized.TestCase):

  # image_classification, image_retrieval, text_mlm, image_caption (image, text), words
  _CONDITIONS = (*_conditions('image_classification', 'image_retrieval', 'text_mlm', 'image_caption'),
                 task_types.families()['words'])

  @parameterized.parameters(
      ('modality', ('visual', 'text')),
      ('task', ('classification', 'retrieval', 'mlm', 'caption', 'words')),
      ('dense', (None,)))
  def test_distinct_inputs_are_in_order(self, router, rows):
    self.assertEqual(routers.distinct_inputs(router, self._CONDITIONS), rows)

  def test_classification_and_retrieval_share_attributes(self):
    rows = [attributes.to_string(r) for r in routers.distinct_inputs('attribute', self._CONDITIONS)]
    self.assertEqual(rows, ['10011000', '01010100', '11011000', '11010101', '11010110'])

  @parameterized.parameters(*router_names.ROUTERS)
  def test_every_condition_has_an_input(self, router):
    rows = routers.distinct_inputs(router, self._CONDITIONS)
    self.assertEqual({routers.router_input(router, c) for c in self._CONDITIONS}, set(rows))

  def test_only_routers_by_name_have_a_table(self):
    tables = {r: routers.table_names(r, ('mlm', 'words')) for r in router_names.ROUTERS}
    self.assertEqual({r: t for r, t in tables.items() if t}, {'task': ('mlm', 'words'), 'modality': ('visual', 'text')})


class EmbeddingTest(absltest.TestCase):

  def test_attributes_are_embedded_as_the_sum_of_their_rows(self):
    # Rows of W are 1, 10, 100, …: the bits can be read off. Bias 0.5.
    kernel = 10.0 ** jnp.arange(8)[:, None] * jnp.ones((8, 2))
    values = {'kernel': kernel, 'bias': jnp.array([.5, -.5])}
    rows = ((1, 0, 0, 1, 1, 0, 0, 0), (0, 1, 0, 1, 0, 1, 0, 0))
    h = routers.AttributeEmbedding(2, ()).apply({'params': values}, rows)
    np.testing.assert_array_equal(h, [[11001.5, 11000.5], [101010.5, 101009.5]])

  def test_a_name_is_its_row_of_the_table(self):
    table = jnp.array([[0., 1.], [10., 11.], [20., 21.]])
    module = routers.NameEmbedding(2, ('mlm', 'caption', 'words'))
    h = module.apply({'params': {'embedding': table}}, ('words', 'mlm'))
    np.testing.assert_array_equal(h, [[20, 21], [0, 1]])

  def test_an_unknown_name_is_an_error(self):
    module = routers.NameEmbedding(2, ('mlm', 'words'))
    message = (r"the router has no embedding for 'search', only for mlm, words\. A task type that was added after "
               'training needs attribute or modality routing, or a dense model')
    with self.assertRaisesRegex(UsageError, message):
      module.apply({'params': {'embedding': jnp.zeros((2, 2))}}, ('mlm', 'search'))


def _router(noise_std: float = 1.0) -> routers.ConditionRouter:
  return routers.ConditionRouter('modality', 2, 4, 2, noise_std, ('visual', 'text'))


# Table rows (3, 1) and (0, 4) are (1, -1) and (-1, 1) after the norm; with scale (2, 1) and bias (0, 1) they are (2, 0)
# and (-2, 2).
_NAMED = {
    'embed': {'embedding': jnp.array([[3., 1.], [0., 4.]])},
    'norm': {'scale': jnp.array([2., 1.]), 'bias': jnp.array([0., 1.])},
    'gate': jnp.array([[0., 1., 2., 3.], [5., 4., 0., 0.]]),
}


class RouterTest(absltest.TestCase):

  def test_logits_by_hand(self):
    # (2, 0)·W = (0, 2, 4, 6); (-2, 2)·W = (10, 6, -4, -6).
    decision = _router().apply({'params': _NAMED}, ('visual', 'text'), None)
    np.testing.assert_allclose(decision.logits, [[0, 2, 4, 6], [10, 6, -4, -6]], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(decision.expert, [[3, 2], [0, 1]])

  def test_the_best_gate_by_hand(self):
    # Logits 6 and 4 are left: e²/(e² + 1).
    decision = _router().apply({'params': _NAMED}, ('visual',), None)
    np.testing.assert_allclose(decision.coef[0, 3], np.e**2 / (np.e**2 + 1), rtol=1e-4)

  def test_noise_is_added_to_the_logits(self):
    key, rows = jax.random.key(3), ('visual', 'text')
    calm = _router().apply({'params': _NAMED}, rows, None)
    noisy = _router().apply({'params': _NAMED}, rows, key)
    np.testing.assert_allclose(noisy.logits - calm.logits, routers.input_noise(key, rows, 4, 1.0), atol=1e-5)

  def test_evaluation_has_no_noise(self):
    rows = ('visual', 'text')
    calm = _router().apply({'params': _NAMED}, rows, None)
    without = _router(noise_std=0.0).apply({'params': _NAMED}, rows, jax.random.key(3))
    np.testing.assert_array_equal(calm.logits, without.logits)


class NoiseTest(absltest.TestCase):

  _KEY = jax.random.key(7)

  def _noise(self, *rows, key=None):
    return np.asarray(routers.input_noise(self._KEY if key is None else key, rows, 4, 1.0))

  def test_the_noise_of_an_input_does_not_depend_on_the_others(self):
    alone, among, last = self._noise('words'), self._noise('words', 'mlm'), self._noise('vqa', 'mlm', 'words')
    np.testing.assert_array_equal(alone[0], among[0])
    np.testing.assert_array_equal(alone[0], last[2])

  def test_the_noise_of_an_input_depends_on_its_value(self):
    noise = self._noise('words', 'mlm', (1, 0, 0, 1, 1, 0, 0, 0), (1, 0, 0, 1, 1, 0, 0, 1))
    self.assertLen(np.unique(noise), noise.size)

  def test_another_key_is_another_draw(self):
    self.assertFalse(np.any(self._noise('words') == self._noise('words', key=jax.random.key(8))))

  def test_its_standard_deviation_is_that_of_the_config_over_the_experts(self):
    # 8000 draws of N(0, (2/4)²): the estimate of .5 has a standard error of .004.
    noise = np.asarray(routers.input_noise(self._KEY, tuple(range(2000)), 4, 2.0))
    np.testing.assert_allclose(noise.std(), .5, atol=.016)
    np.testing.assert_allclose(noise.mean(), 0, atol=.023)

  def test_the_hash_of_an_input_is_the_same_in_every_process(self):
    # Python's own hash() of a string differs from run to run. CRC-32 of mlm with its quotes, and its value.
    self.assertEqual(routers.input_hash('mlm'), zlib.crc32(b"'mlm'"))
    self.assertEqual(routers.input_hash('mlm'), 1209776402)


if __name__ == '__main__':
  absltest.main()
