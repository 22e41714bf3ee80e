"""Decoding with cached keys and values is the two-stream forward of training, one word at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.model import decoding
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.tasks import task_types
from uni_moe_jax.tools.bench import uncached_search

_TASK_TYPE = task_types.TASK_TYPES['image_caption']
_BATCH, _LENGTH = 4, 5
_NEVER = -1  # an `eot` that no word is


@functools.cache
def _pixels() -> jax.Array:
  return small_model.sequence(_TASK_TYPE, _BATCH, seed=1).pixels


@functools.cache
def _query_features(router: str):
  """words [B, n] → normalized features [B, n, D] of every query, by the forward of training."""
  spec = small_model.spec(router)

  @small_model.jit
  def run(values, pixels, words):
    text = jnp.concatenate([words, jnp.full_like(words, small_model.SPE)], axis=1)
    sequence = small_model.sequence(_TASK_TYPE, _BATCH, pixels=pixels, text=text)
    return normalize(small_model.encode(spec, [sequence], values=values)[0][0])

  return lambda words: run(small_model.params(spec), _pixels(), jnp.asarray(words, jnp.int32))


@functools.cache
def _vocabulary(router: str) -> np.ndarray:
  """[V, D] normalized features of words, spread like queries, so that captions vary."""
  rng = np.random.default_rng(3)
  rows = [_query_features(router)(rng.integers(0, small_model.VOCABULARY, (_BATCH, _LENGTH))) for _ in range(2)]
  rows = np.concatenate(rows).reshape(-1, 16)[:small_model.VOCABULARY]
  rows = rows - rows.mean(0)
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@functools.cache
def _greedy(router: str):
  """eot → (tokens, log-probabilities), cached."""
  spec = small_model.spec(router)

  @small_model.jit
  def run(values, pixels, words, eot):
    actual = decoding.beam_search(
        UniPerceiver(spec), values, _TASK_TYPE, pixels, words, temperature='group', spe=small_model.SPE, eot=eot,
        max_len=_LENGTH)
    return actual.tokens[:, 0], actual.log_p[:, 0]

  return lambda eot: jax.tree.map(
      np.asarray, run(small_model.params(spec), _pixels(), _vocabulary(router), jnp.int32(eot)))


def _all_queries(router: str, words: np.ndarray) -> np.ndarray:
  """Log-probabilities [B, n, V] of every query."""
  scale = np.exp(small_model.params(small_model.spec(router))['log_scale_group'])
  return np.asarray(jax.nn.log_softmax(scale * _query_features(router)(words) @ _vocabulary(router).T))


def _step_by_step(router: str, eot: int):
  """The same caption without a cache: each word is chosen from a whole forward over the words so far."""
  tokens, log_p = uncached_search.search(
      lambda _, words, t: _all_queries(router, words)[:, t], _BATCH, beam_size=1, max_len=_LENGTH, eot=eot)
  return tokens[:, 0], log_p[:, 0]


def _an_end(router: str) -> int:
  """The second word of the first caption; if it ends captions, others go on or end elsewhere."""
  return int(_greedy(router)(_NEVER)[0][0, 1])


@pytest.mark.parametrize('router', ['attribute', 'dense'])  # beam_test has the other routers
@pytest.mark.parametrize('ends', [False, True])
def test_greedy_captions_equal_decoding_step_by_step(router, ends):
  eot = _an_end(router) if ends else _NEVER
  tokens, log_p = _greedy(router)(eot)
  expected_tokens, expected_log_p = _step_by_step(router, eot)
  np.testing.assert_array_equal(tokens, expected_tokens)
  np.testing.assert_allclose(log_p, expected_log_p, atol=1e-5, rtol=1e-5)


def test_after_its_end_a_caption_is_eot_with_log_probability_zero_and_others_go_on():
  eot = _an_end('attribute')
  tokens, log_p = _greedy('attribute')(eot)
  first = int(np.argmax(tokens[0] == eot))
  np.testing.assert_array_equal(tokens[0, first:], eot)
  np.testing.assert_array_equal(log_p[0, first + 1:], 0)
  assert (log_p[0, :first + 1] < 0).all()
  ends = (tokens == eot).argmax(1) + _LENGTH * (tokens != eot).all(1)
  assert len(set(ends.tolist())) > 1, ends


@pytest.mark.parametrize('router', ['attribute', 'dense'])
def test_captions_of_these_images_differ_and_do_not_repeat_one_word(router):
  # Otherwise equality would prove little.
  tokens, _ = _greedy(router)(_NEVER)
  assert len({tuple(row) for row in tokens}) > 2, tokens
  assert np.mean([len(set(row)) for row in tokens.tolist()]) > 2, tokens


def test_later_words_do_not_change_earlier_queries():
  tokens, _ = _greedy('attribute')(_NEVER)
  for t in range(_LENGTH):
    other = tokens.copy()
    other[:, t:] = (other[:, t:] + 7) % small_model.VOCABULARY
    np.testing.assert_array_equal(_all_queries('attribute', other)[:, t], _all_queries('attribute', tokens)[:, t])


def test_a_prefill_is_the_image_and_a_step_a_word_and_a_query_under_the_captions_condition():
  fields = lambda layout: (layout.conditions, layout.masks, layout.readout, layout.prefixed)
  image, caption = _TASK_TYPE.conditions
  assert fields(decoding.prefill_layout(_TASK_TYPE)) == ((image,), ('full',), 'nothing', True)
  assert fields(decoding.step_layout(_TASK_TYPE)) == ((caption,), ('causal',), 'queries', False)
