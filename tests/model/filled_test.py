"""Rows that fill a batch up: they change nothing for the others, and nothing counts them."""

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from tests import small_model
from uni_moe_jax import tasks
from uni_moe_jax.train import routing

_N, _MULTIPLE = 3, 4


def _texts(valid=True):
  texts = small_model.target(tasks.families()['names'], batch=_N)
  mask = jnp.array([[True, True, True], [True, True, False], [True, False, False]])
  return texts.replace(text_valid=mask if valid else None)


class FilledTest(parameterized.TestCase):

  def test_rows_and_their_padding(self):
    filled = _texts().filled(_MULTIPLE)
    chex.assert_shape([filled.text, filled.text_valid], (_MULTIPLE, small_model.WORDS))
    np.testing.assert_array_equal(filled.text_valid.sum(1), [3, 2, 1, 0])
    np.testing.assert_array_equal(_texts(valid=False).filled(_MULTIPLE).text_valid.sum(1), [3, 3, 3, 0])
    np.testing.assert_array_equal(filled.ids, [0, 1, 2, 0])

  def test_what_divides_and_what_has_pictures_stays_as_it_is(self):
    texts, pictures = _texts(), small_model.sequence('image_classification', batch=_N)
    self.assertIs(texts.filled(_N), texts)
    self.assertIs(pictures.filled(_MULTIPLE), pictures)

  @parameterized.product(router=['attribute', 'token', 'context', 'dense'], valid=[True, False])
  def test_features_gradients_and_counts_are_those_without(self, router, valid):
    # Training, with noise and dropped paths, which are drawn by ids; capacity follows shapes, so it is left out.
    looks_at_tokens = router in ('token', 'context')
    spec = small_model.spec(router, drop_path=0.3, noise_std=0.1)
    texts = _texts(valid)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(_N, 1, spec.width)), jnp.float32)

    def run(values, sequence):
      rows, collected = small_model.encode(spec, (sequence,), values=values, key=jax.random.key(0))
      balance = routing.auxiliary((('balance', 1.),), collected) if looks_at_tokens else 0.
      return (rows[0][:_N] * weights).sum() + balance, (rows[0][:_N], _counts(collected))

    step = small_model.jit(jax.value_and_grad(run, has_aux=True))
    found = lambda sequence: step(small_model.params(spec), sequence)
    filled = texts.filled(_MULTIPLE)
    (_, (rows, counts)), grads = found(texts)
    (_, (rows_filled, counts_filled)), grads_filled = found(filled)
    chex.assert_trees_all_close(rows_filled, rows, atol=1e-5)
    chex.assert_trees_all_close(grads_filled, grads, atol=2e-4, rtol=1e-4)
    chex.assert_tree_all_finite(grads_filled)
    chex.assert_trees_all_close(counts_filled, counts, rtol=1e-5)
    if looks_at_tokens:  # the control: rows that are valid are counted
      (_, (_, more)), _ = found(filled.replace(text_valid=jnp.ones_like(filled.text_valid)))
      self.assertGreater(float(more[0]['ffn'].tokens.sum()), float(counts[0]['ffn'].tokens.sum()))


def _counts(collected):
  """What routers that look at tokens summed up; of the others decisions, which no row changes."""
  return [out['decisions'] for sub in ('blocks', 'tail') for out in collected[sub]]


if __name__ == '__main__':
  absltest.main()
