"""Models with token routers: equal to merging with constant gates, no leak of later words, counts."""

import dataclasses
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.config.schema import SUBLAYERS
from uni_moe_jax.model.sequences import InputSequence
from uni_moe_jax.model.spec import ROUTER_PARAMS, ModelSpec
from uni_moe_jax.model.sublayer import Sublayer
from uni_moe_jax.moe import dispatch
from uni_moe_jax.tasks import router_names, task_types


def _mix(batch: int = 2):
  names = ('image_classification', 'image_caption', 'text_mlm', 'vqa')
  return tuple(small_model.sequence(k, batch, seed=i) for i, k in enumerate(names))


def _without_gates(spec: ModelSpec):
  """Its parameters with zero gates: every token gets experts 0 and 1, half each."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x: x * ('gate' not in jax.tree_util.keystr(path)), small_model.params(spec))


@pytest.mark.parametrize('router', ['token', pytest.param('context', marks=pytest.mark.nightly)])
def test_constant_gates_equal_the_merge(router):
  merged, dispatched = small_model.spec('attribute', num_layers=1), small_model.spec(router, num_layers=1)
  expected, actual = (small_model.run(s, _mix(), values=_without_gates(s))[0] for s in (merged, dispatched))
  chex.assert_trees_all_close(actual, expected, atol=1e-5, rtol=1e-4)
  other, _ = small_model.run(dispatched, _mix())
  assert np.abs(np.asarray(other[0]) - expected[0]).max() > 1e-2


_WORDS, _CHANGED = 4, 2  # words from the third on are changed


def _captions(seed: int, first: int):
  """Captions [words | queries] of three images; the seed determines their words from `first` on."""
  one = small_model.sequence('image_caption', 3, seed=5, words=_WORDS)
  words = np.random.default_rng(seed).integers(2, small_model.VOCABULARY, (3, _WORDS))
  text = np.asarray(one.text).copy()
  text[:, first:_WORDS] = words[:, first:]
  return one.replace(text=jnp.asarray(text))


def _states(spec: ModelSpec, sequence, key=None):
  """[B, words and queries, D] and [B, visual tokens, D] after the last layer."""
  _, collected = small_model.run(spec, [sequence], key, taps=True, all_rows=True)
  image, text = (np.asarray(collected['tail'][0]['taps'][0][i]) for i in (0, 1))
  return text, image


# Unchanged words are 0 and 1; queries 0, 1 and 2 see no others.
_EARLIER = [0, 1, *(_WORDS + i for i in range(3))]
_LATER = [2, 3, _WORDS + 3]


def _assert_no_leak(spec, key):
  text, image = _states(spec, _captions(1, _CHANGED), key)
  for seed in (2, 3, 4):
    other, same = _states(spec, _captions(seed, _CHANGED), key)
    np.testing.assert_array_equal(other[:, _EARLIER], text[:, _EARLIER])
    np.testing.assert_array_equal(same, image)
    assert np.abs(other[:, _LATER] - text[:, _LATER]).max((0, 2)).min() > 1e-3


@pytest.mark.parametrize('router', ['attribute', 'task', 'modality', 'token', 'context'])
def test_later_words_change_no_bit_of_earlier_states(router):
  _assert_no_leak(small_model.spec(router, num_layers=1), None)


@pytest.mark.nightly
@pytest.mark.parametrize('router', ['token', pytest.param('context', marks=pytest.mark.nightly)])
@pytest.mark.parametrize('gmm', ['batched', pytest.param('tiled', marks=pytest.mark.nightly)])
def test_later_words_do_not_leak_at_half_the_capacity(router, gmm):
  spec = small_model.spec(router, num_layers=2, capacity_factor=.5, gmm=gmm)  # one drops a query that is to change
  _assert_no_leak(spec, jax.random.key(0))
  # Capacity drops tokens here: an exact model has other states.
  dropping, _ = _states(spec, _captions(1, _CHANGED), jax.random.key(0))
  exact, _ = _states(small_model.spec(router, num_layers=2), _captions(1, _CHANGED), jax.random.key(0))
  assert np.abs(dropping - exact)[:, _EARLIER].max() > 1e-2


def test_slots_given_example_by_example_would_leak():
  # A positive control: the same comparison detects a dispatch that gives all slots of an example first.
  make_plan = dispatch.make_plan

  def example_major(output, valid, groups, capacity_factor, backend):
    swapped = jax.tree.map(lambda x: x.swapaxes(0, 1), output)
    plan = make_plan(swapped, None if valid is None else valid.T, 1, capacity_factor, backend)
    B, S, K = output.expert.shape
    back = lambda x: x.reshape(S, B, -1).swapaxes(0, 1).reshape(B * S, -1)
    swapped_choice = back(jnp.arange(B * S * K, dtype=jnp.int32).reshape(B * S, K))  # of each choice
    choice = jnp.argsort(swapped_choice.reshape(-1))
    source = jnp.where(plan.source >= 0, choice[jnp.maximum(plan.source, 0)], -1).astype(jnp.int32)
    return plan.replace(
        slot=back(plan.slot), kept=back(plan.kept), gates=back(plan.gates), coef=back(plan.coef), source=source)

  # its own value: nothing is cached
  spec = small_model.spec('token', num_layers=1, capacity_factor=.5, drop_path=1e-9)
  with mock.patch.object(dispatch, 'make_plan', example_major), pytest.raises(AssertionError, match='not equal'):
    _assert_no_leak(spec, jax.random.key(0))


def test_a_pool_over_the_caption_would_leak():
  pool = Sublayer.pool

  def pool_all(self, segments, sequence):
    layout = dataclasses.replace(sequence.layout, masks=('full',) * len(segments))
    return pool(self, segments, sequence.replace(layout=layout))

  spec = small_model.spec('context', num_layers=1, drop_path=2e-9)
  with mock.patch.object(Sublayer, 'pool', pool_all), pytest.raises(AssertionError, match='not equal'):
    _assert_no_leak(spec, None)


def test_the_question_of_an_image_reaches_its_pool_and_padding_does_not():
  spec = small_model.spec('context', num_layers=1)
  valid = jnp.array([[True, True, False]] * 2)
  one = small_model.sequence('vqa', text_valid=valid, positions=jnp.zeros((2, 1), jnp.int32))
  padded = one.replace(text=one.text.at[:, 2].set(5 + (one.text[:, 2] == 5)))
  other_question = one.replace(text=one.text.at[:, 1].set(5 + (one.text[:, 1] == 5)))
  pools = [small_model.run(spec, [s], keys=True)[1]['tail'][0]['pools'][0] for s in (one, padded, other_question)]
  for part in SUBLAYERS:
    np.testing.assert_allclose(pools[1][part], pools[0][part], atol=1e-5)
    assert np.abs(pools[2][part] - pools[0][part]).max() > 1e-3


@pytest.mark.parametrize('router', ['token', pytest.param('context', marks=pytest.mark.nightly)])
def test_a_permuted_batch_has_the_permuted_result(router):
  spec, order = small_model.spec(router, num_layers=1, noise_std=8.0), np.array([3, 0, 2, 1])
  sequence, key = small_model.sequence('image_caption', 4), jax.random.key(2)
  moved = jax.tree.map(lambda x: x[order] if np.ndim(x) else x, sequence)
  run = lambda s, k: np.asarray(small_model.run(spec, [s], k)[0][0])
  straight = run(sequence, key)
  np.testing.assert_allclose(run(moved, key), straight[order], atol=1e-5, rtol=1e-5)
  for other in (run(moved.replace(ids=sequence.ids), key), run(moved, None)):
    assert np.abs(other - straight[order]).max() > 1e-2


@pytest.mark.nightly
def test_readout_rows_have_the_noise_of_all_rows():
  spec, key = small_model.spec('token', num_layers=1, noise_std=8.0), jax.random.key(2)
  few, every = (small_model.run(spec, _mix(), key, all_rows=a)[0] for a in (False, True))
  chex.assert_trees_all_close(few, every, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('router', (*router_names.CONDITION_ROUTERS, *router_names.DISPATCHED))
@pytest.mark.parametrize('parts', (('attention',), ('mlp',), SUBLAYERS))
def test_every_router_works_with_every_sublayer_and_placement(router, parts):
  for placement in ('every_2', (1,)):
    spec = small_model.spec(router, sublayers=parts, placement=placement, num_deep_prompts=1)
    shapes = small_model.nn.unbox(small_model.boxed(spec))
    run = lambda values, s=spec: small_model.encode(
        s, [small_model.sequence('image_caption')], values=values, key=jax.random.key(0))[0]
    assert [f.shape for f in jax.eval_shape(run, shapes)] == [(2, 3, 16)]
    for layer, local in enumerate(spec.pattern):
      subtree, _, block = spec.stack.locate(layer)
      assert {p for p in SUBLAYERS if ROUTER_PARAMS[p] in shapes['encoder'][subtree][block]} == set(local)


def test_tokens_are_counted_by_condition_without_padding():
  # Rows: image of a caption, its text, a text. Prefix and 4 patches, 6 words and queries; prefix and 3 words, 1
  # padded.
  spec = small_model.spec('token', num_layers=2)
  text = small_model.sequence('text_mlm', text_valid=jnp.array([[True, True, False]] * 2),
                              positions=jnp.zeros((2, 1), jnp.int32))
  _, collected = small_model.run(spec, (small_model.sequence('image_caption'), text))
  first = jax.tree.map(lambda x: x[0], collected['blocks'][0]['router_stats'])
  last = collected['tail'][0]['router_stats']
  for usage in (*first.values(), last['attention']):
    assert usage.tokens.tolist() == [10, 12, 6]
    assert usage.chosen.sum(-1).tolist() == [20, 24, 12]
  # The last block dispatches the readout rows a second time, and only they pass the MLP: 3 queries, 1 position.
  assert last['attention'].requested.tolist() == [20, 24 + 12, 12 + 4]
  assert last['mlp'].tokens.tolist() == [0, 6, 2]


def test_masked_positions_without_a_label_take_no_slot_and_are_not_counted():
  # One of four positions of each text has a label; the others repeat token 0.
  spec, task_type = small_model.spec('token', num_layers=1), task_types.TASK_TYPES['text_mlm']
  fields = dict(
      id=jnp.arange(2, dtype=jnp.uint32), text=jnp.array([[2, 3, 4], [5, 6, 7]]), text_valid=jnp.ones((2, 3), bool),
      position=jnp.array([[2, 0, 0, 0], [1, 0, 0, 0]]), weight=jnp.array([[1., 0, 0, 0], [.5, 0, 0, 0]]))

  def usage(fields):
    _, collected = small_model.run(spec, [InputSequence.of_inputs(task_type, fields)], jax.random.key(0))
    [out] = collected['tail']
    stats = [out['router_stats'][sublayer] for sublayer in ('attention', 'mlp')]
    return [float(x[0]) for of_sublayer in stats for x in (of_sublayer.tokens, of_sublayer.requested)]

  # Attention routes every token with its prefix, of which the queries are dispatched a second time, to two experts.
  assert usage(fields) == [8, 2 * (8 + 2), 2, 2 * 2]
  assert usage({**fields, 'weight': jnp.ones((2, 4))}) == [8, 2 * (8 + 8), 8, 2 * 8]
