"""Greedy and beam search: equal to the two-stream forward of training; ends and length penalty."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model, uncached_search
from uni_moe_jax.model import decoding
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.tasks import task_types

_SPEC = small_model.spec()
_VIDEOS = small_model.spec(frame_differences=True)  # captions videos of two frames, the others images
_PROMPTED = small_model.spec(num_deep_prompts=2, num_prefix_prompts=3, prompt_sharing='separate', spe_bias=True)
_NEIGHBORS = small_model.spec(word_neighbors=2)
_DEEP = small_model.spec(num_deep_prompts=2, spe_bias=True)
_DENSE, _TOKEN, _CONTEXT, _TASK = (small_model.spec(router) for router in ('dense', 'token', 'context', 'task'))
_B, _K, _N, _V = 4, 3, 5, small_model.VOCABULARY
_NEVER = -1  # an `eot` that no word is
_ROWS = 16  # the most that any test needs: all pad to them, so that one program serves every beam


def _task_type(spec):
  return task_types.TASK_TYPES['video_caption' if spec is _VIDEOS else 'image_caption']


@functools.cache
def _pixels(spec=_SPEC):
  return small_model.sequence(_task_type(spec), _B, seed=1).pixels


@functools.cache
def _features(spec=_SPEC):
  """(pixels [R, …], words [R, n]) → normalized features [R, n, D] of every query, without a cache."""
  @small_model.jit
  def run(values, pixels, words):
    text = jnp.concatenate([words, jnp.full_like(words, small_model.SPE)], axis=1)
    sequence = small_model.sequence(_task_type(spec), len(pixels), pixels=pixels, text=text)
    return normalize(small_model.encode(spec, [sequence], values=values)[0][0])

  def cut(pixels, words):
    padded = [np.pad(x, [(0, _ROWS - len(x)), *[(0, 0)] * (x.ndim - 1)]) for x in (pixels, words)]
    return np.asarray(run(small_model.params(spec), *padded))[:len(words)]
  return cut


@functools.cache
def _words(spec=_SPEC) -> jax.Array:
  """[V, D] normalized features of words, spread like queries, so that captions vary."""
  rng = np.random.default_rng(3)
  texts = [rng.integers(0, _V, (_B, _N)).astype(np.int32) for _ in range(3)]
  rows = np.concatenate([_features(spec)(_pixels(spec), t) for t in texts]).reshape(-1, 16)[:_V]
  return normalize(jnp.asarray(rows - rows.mean(0)))


@functools.cache
def _program(beams: int, spec):
  """(parameters, pixels, words, eot, penalty) → captions."""

  @small_model.jit
  def run(values, pixels, words, eot, penalty):
    return decoding.beam_search(
        decoding.Decoder.of(UniPerceiver(spec), values, _task_type(spec)), pixels, words, temperature='group',
        spe=small_model.SPE, eot=eot, max_len=_N, beam_size=beams, length_penalty=penalty)
  return run


@functools.cache
def _search(beams: int, eot: int, penalty: float = 0.0, spec=_SPEC):
  run = _program(beams, spec)
  return jax.device_get(run(small_model.params(spec), _pixels(spec), _words(spec), eot, penalty))


@functools.cache
def _forward(spec=_SPEC):
  """(pixels [R, …], words [R, n]) → log-probabilities [R, n, V] of every query."""
  scale = np.exp(small_model.params(spec)['log_scale_group'])
  return lambda pixels, words: np.asarray(jax.nn.log_softmax(scale * _features(spec)(pixels, words) @ _words(spec).T))


def _without_cache(beams: int, eot: int, spec=_SPEC, penalty: float = 0.0):
  """(tokens, log-probabilities) [B, k, n] of the same search, everything encoded anew at each step."""
  return uncached_search.search(
      lambda images, words, t: _forward(spec)(_pixels(spec)[images], words)[:, t], _B, beam_size=beams, max_len=_N,
      eot=eot, length_penalty=penalty)


@functools.cache
def _an_end(spec=_SPEC, beams: int = _K) -> int:
  """A word that some captions of the search reach and others do not."""
  tokens = _search(beams, _NEVER, spec=spec).tokens
  for word in np.unique(tokens[:, :, 1:3]).tolist():
    has = (tokens == word).any(-1)
    if has.any() and not has.all():
      return word
  raise AssertionError('every caption is equal')


def _assert_equal_without_caches(beams: int, eot: int, spec):
  actual, (tokens, log_p) = _search(beams, eot, spec=spec), _without_cache(beams, eot, spec)
  np.testing.assert_array_equal(actual.tokens, tokens)
  np.testing.assert_allclose(actual.log_p, log_p, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(actual.scores, log_p.sum(-1), rtol=1e-5)
  np.testing.assert_allclose(actual.log_p.sum(-1), log_p.sum(-1), rtol=1e-5)
  return tokens


@pytest.mark.parametrize('beams, spec', [
    (1, _SPEC), (_K, _SPEC), (1, _DENSE), (1, _DEEP), (1, _PROMPTED), (_K, _PROMPTED), (_K, _TOKEN), (_K, _CONTEXT),
    (_K, _TASK), (1, _VIDEOS), (_K, _VIDEOS), (1, _NEIGHBORS), (_K, _NEIGHBORS)])
def test_beam_search_equals_a_search_without_caches(beams, spec):
  tokens = _assert_equal_without_caches(beams, _NEVER, spec)
  # Otherwise equality would prove little: captions differ and do not repeat one word.
  assert len({tuple(row) for row in tokens[:, 0].tolist()}) > 2, tokens
  assert np.mean([len(set(row)) for row in tokens[:, 0].tolist()]) > 2, tokens


@pytest.mark.parametrize('beams, spec', [
    (1, _SPEC), (1, _DENSE), *((_K, spec) for spec in (_SPEC, _PROMPTED, _TOKEN, _CONTEXT, _VIDEOS, _NEIGHBORS))])
def test_hypotheses_that_end_early_equal_a_search_without_caches_and_the_others_go_on(beams, spec):
  eot = _an_end(spec, beams)
  tokens = _assert_equal_without_caches(beams, eot, spec)
  ended = (tokens == eot).any(-1)
  assert ended.any() and not ended.all()


def test_after_its_end_a_caption_is_eot_with_log_probability_zero():
  eot = _an_end(beams=1)
  actual = _search(1, eot)
  after = np.cumsum(actual.tokens == eot, axis=-1) - (actual.tokens == eot) > 0
  assert after.any()
  np.testing.assert_array_equal(actual.tokens[after], eot)
  np.testing.assert_array_equal(actual.log_p[after], 0)
  assert (actual.log_p[~after] < 0).all()


def test_later_words_do_not_change_earlier_queries():
  tokens = _search(1, _NEVER).tokens[:, 0]
  for t in range(_N):
    other = tokens.copy()
    other[:, t:] = (other[:, t:] + 7) % _V
    np.testing.assert_array_equal(_forward()(_pixels(), other)[:, t], _forward()(_pixels(), tokens)[:, t])


def test_a_prefill_is_the_image_and_a_step_a_word_and_a_query_under_the_captions_condition():
  fields = lambda layout: (layout.conditions, layout.masks, layout.readout, layout.prefixed)
  image, caption = _task_type(_SPEC).conditions
  assert fields(decoding.prefill_layout(_task_type(_SPEC))) == ((image,), ('full',), 'nothing', True)
  assert fields(decoding.step_layout(_task_type(_SPEC))) == ((caption,), ('causal',), 'queries', False)


def test_a_step_does_not_sort_the_vocabulary():
  arguments = small_model.params(_SPEC), _pixels(), _words(), 1, 0.0
  text = _program(_K, _SPEC).lower(*arguments).compile().as_text()
  assert 'custom_call_target="TopK"' in text
  of_vocabulary = re.compile(rf'[\[,]{_K * _V}[],].* sort\(')  # of that size in its shape
  assert not [line for line in text.splitlines() if of_vocabulary.search(line)]


def test_parameters_on_several_devices_give_the_captions_of_one():
  both = jax.sharding.NamedSharding(jax.sharding.Mesh(jax.devices()[:2], 'data'), jax.sharding.PartitionSpec())
  values = jax.device_put(small_model.params(_SPEC), both)
  captions = _program(_K, _SPEC)(values, _pixels(), _words(), _NEVER, 0.0)
  np.testing.assert_array_equal(captions.tokens, _search(_K, _NEVER).tokens)


def test_more_beams_find_better_captions():
  one, many = _search(1, _NEVER).scores[:, 0], _search(_K, _NEVER).scores[:, 0]
  assert (many >= one - 1e-5).all()
  assert (many - one).max() > 1e-3


def test_beams_of_an_image_are_distinct_and_sorted():
  actual = _search(_K, _NEVER)
  for tokens in actual.tokens.tolist():
    assert len(set(map(tuple, tokens))) == _K
  assert (np.diff(actual.scores, axis=1) <= 0).all()


def test_the_length_penalty_divides_by_the_words_and_reorders():
  plain, divided = _search(_K, _an_end()), _search(_K, _an_end(), 2.0)
  for b in range(_B):
    expected = {}
    for tokens, score in zip(plain.tokens[b].tolist(), plain.scores[b]):
      expected[tuple(tokens)] = score / (sum(v != _an_end() for v in tokens) + 1) ** 2
    order = sorted(expected, key=lambda h: -expected[h])
    assert [tuple(t) for t in divided.tokens[b].tolist()] == order
    np.testing.assert_allclose(divided.scores[b], [expected[h] for h in order], rtol=1e-5)
  assert (plain.tokens != divided.tokens).any()  # some order changed
  np.testing.assert_array_equal(divided.tokens, _without_cache(_K, _an_end(), penalty=2.0)[0])


def test_candidates_are_the_best_sums_and_the_first_discarded_one():
  actual = _search(_K, _NEVER)
  assert actual.candidates.shape == (_N, _B, _K + 1)
  assert (np.diff(actual.candidates, axis=-1) <= 0).all()
  np.testing.assert_allclose(np.sort(actual.candidates[-1, :, :_K])[:, ::-1], actual.scores, rtol=1e-5)


@pytest.mark.parametrize('beams', [1, _K])
def test_the_loop_stops_when_all_have_ended(beams):
  # The end is by far the likeliest word everywhere, and all others are equal: greedy captions have no word, two of
  # three hypotheses have one.
  queries = np.asarray(_features()(_pixels(), np.zeros((_B, _N), np.int32))).reshape(-1, 16)
  words = np.zeros_like(_words())
  words[1] = queries.mean(0) / np.linalg.norm(queries.mean(0))
  actual = jax.device_get(_program(beams, _SPEC)(small_model.params(_SPEC), _pixels(), words, 1, 0.0))
  num_steps = 1 if beams == 1 else 2
  assert np.isneginf(actual.candidates[num_steps:]).all()
  assert np.isfinite(actual.candidates[:num_steps, :, 0]).all()
