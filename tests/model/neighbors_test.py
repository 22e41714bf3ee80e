"""Neighbors of words: which ones a token contains, by hand, and that captions contain none that follow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import small_model
from uni_moe_jax.model.embedders import Embed
from uni_moe_jax.model.sequences import NO_WORD
from uni_moe_jax.tasks import task_types

_ = NO_WORD
SPEC = small_model.spec(word_neighbors=2)
VALUES = small_model.params(SPEC)['embed']


def _text(ids, valid=None):
  text = small_model.target(task_types.families()['names'], batch=len(ids))
  return text.replace(text=jnp.array(ids), text_valid=None if valid is None else jnp.array(valid))


def test_neighbors_by_hand_nearest_first_then_those_after():
  ids, valid = [[5, 6, 7, 8]], [[True, True, True, False]]
  expected = [[_, _, 6, 7], [5, _, 7, _], [6, 5, _, _], [7, 6, _, _]]
  assert _text(ids, valid).neighbors(2)[0].tolist() == expected
  assert _text(ids).neighbors(1)[0].tolist() == [[_, 6], [5, 7], [6, 8], [7, _]]
  assert _text([[5]]).neighbors(2)[0].tolist() == [[_, _, _, _]]
  assert _text(ids).neighbors(0) is None


def test_a_caption_has_only_the_words_before_a_word_and_before_a_query():
  caption = small_model.sequence('image_caption', batch=1, text=jnp.array([[5, 6, 7, 0, 0, 0]]))
  before = [[_, _], [5, _], [6, 5]]
  assert caption.neighbors(2)[0].tolist() == [[*row, _, _] for row in before * 2]


@functools.partial(jax.jit, static_argnames='spec')
def _embed(ids, neighbors, spec=SPEC, values=VALUES):
  positions = jnp.broadcast_to(jnp.arange(len(ids[0])), np.shape(ids))
  return Embed(spec).apply({'params': values}, ids, positions, neighbors, method='text')


def test_a_token_is_the_sum_of_its_word_and_of_its_neighbors_through_their_kernels():
  kernels = VALUES['neighbors'].reshape(4, 16, 16)  # one before, two before, one after, two after
  sums = VALUES['word'][6] + VALUES['word'][5] @ kernels[0] + VALUES['word'][7] @ kernels[2]
  x = sums + VALUES['position'][1] + VALUES['type'][0]
  x = (x - x.mean()) / jnp.sqrt(x.var() + 1e-5) * VALUES['norm']['scale'] + VALUES['norm']['bias']
  text = _text([[5, 6, 7]])
  np.testing.assert_allclose(_embed(text.text, text.neighbors(2))[0, 1], x, rtol=1e-4, atol=1e-5)


def test_without_its_kernel_the_tokens_are_those_without_neighbors():
  text, zero = _text([[5, 6, 7]]), {**VALUES, 'neighbors': 0 * VALUES['neighbors']}
  plain = {name: x for name, x in VALUES.items() if name != 'neighbors'}
  expected = _embed(text.text, None, small_model.spec(), plain)
  np.testing.assert_array_equal(_embed(text.text, text.neighbors(2), values=zero), expected)
  assert np.abs(_embed(text.text, text.neighbors(2)) - expected).max() > .1  # they matter


def test_padding_changes_no_valid_token():
  valid = [[True, True, True, False]]
  rows = [small_model.run(SPEC, (_text([[5, 6, 7, end]], valid),))[0][0] for end in (8, 9)]
  np.testing.assert_array_equal(*rows)
  assert np.abs(rows[0] - small_model.run(SPEC, (_text([[5, 6, 7, 8]]),))[0][0]).max() > .01


def test_a_query_depends_on_the_words_before_it_alone():
  def features(words):
    caption = small_model.sequence('image_caption', batch=1, text=jnp.array([[*words, 0, 0, 0]]))
    return small_model.run(SPEC, (caption,))[0][0][0]

  change = np.abs(features((5, 6, 7)) - features((5, 9, 7))).max(-1)
  assert (change[:2] == 0).all() and change[2] > .01


def test_every_kernel_learns():
  text = _text([[5, 6, 7, 8, 9]])
  loss = lambda values: _embed(text.text, text.neighbors(2), values=values)[..., 0].sum()
  grads = small_model.jit(jax.grad(loss))(VALUES)
  assert (jnp.abs(grads['neighbors']).reshape(4, -1).max(-1) > 0).all()
