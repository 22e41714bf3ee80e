"""One synonym per class and step; at evaluation the mean of all."""

import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.eval import predictor
from uni_moe_jax.train.forward import sample_synonyms


def _sets(n=3000):
  """Entries of three, one and two texts in turn; text y of an entry is the token y."""
  count = np.resize([3, 1, 2], n).astype(np.int32)
  text = np.broadcast_to(np.arange(3, dtype=np.int32)[None, :, None], (n, 3, 2))
  bucket = {'text': jnp.asarray(text), 'valid': jnp.ones((n, 3, 2), bool), 'count': jnp.asarray(count)}
  plain = {'text': jnp.zeros((4, 2), jnp.int32), 'valid': jnp.ones((4, 2), bool)}
  names, plain = {'buckets': (bucket,), 'order': jnp.arange(n)}, {'buckets': (plain,), 'order': jnp.arange(4)}
  return {'names': names, 'plain': plain}


def test_every_synonym_is_equally_likely_and_drawn_anew_each_step():
  sets = _sets()
  one, again, other = (np.asarray(sample_synonyms(sets, jax.random.key(k))['names']['buckets'][0]['text'])
                       for k in (0, 0, 1))
  assert one.shape == (3000, 2)
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()
  assert (one[1::3] == 0).all()  # one text
  counts = np.bincount(one[::3, 0], minlength=3)
  assert (abs(counts - 1000 / 3) < 4 * np.sqrt(1000 * 2 / 9)).all()
  assert abs(one[2::3, 0].mean() - 0.5) < 4 * np.sqrt(0.25 / 1000)


def test_sets_without_synonyms_are_unchanged():
  sets = _sets(3)
  assert sample_synonyms(sets, jax.random.key(0))['plain']['buckets'][0] is sets['plain']['buckets'][0]


def test_evaluation_averages_the_features_of_all_synonyms():
  bucket = {'text': np.zeros((2, 3, 2), np.int32), 'count': np.array([2, 1])}
  rows = jnp.array([[2.0, 0], [0, 1], [9, 9], [3, 4], [9, 9], [9, 9]])
  np.testing.assert_allclose(predictor._mean_of_synonyms(rows, bucket), [[0.5, 0.5], [0.6, 0.8]], rtol=1e-6)
