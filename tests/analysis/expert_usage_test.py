"""Expert usage: arithmetic by hand, and agreement with the router statistics of the encoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_config, small_model
from uni_moe_jax.analysis import expert_usage
from uni_moe_jax.analysis.expert_usage import TokenSlice
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.moe import routers

_PLAN = make_plan(small_config.config())
_SETS = {s.name: s for s in _PLAN.sets}


def _spans(name):
  [task] = [t for t in _PLAN.tasks if t.name == name]
  return [(s.name, s.role, s.array, s.half) for s in expert_usage.token_spans(task, _SETS)]


def test_a_task_has_a_span_per_array_and_target_and_a_caption_separate_words_and_queries():
  assert _spans('shape') == [('visual', 'inputs', 0, None), ('set classes', 'target_sets', 0, None)]
  assert _spans('pair') == [('visual', 'inputs', 0, None), ('paired text', 'pairs', 0, None)]
  assert _spans('name') == [('visual', 'inputs', 0, None), ('words', 'inputs', 1, 0), ('queries', 'inputs', 1, 1),
                            ('set vocabulary', 'target_sets', 0, None)]


def test_spans_with_the_same_input_of_a_merging_router_share_a_condition():
  conditions = tuple(s.condition for t in _PLAN.tasks for s in expert_usage.token_spans(t, _SETS))
  inputs, by_task = expert_usage.merging_conditions(small_model.spec('attribute'), conditions, _PLAN.tasks, _SETS)
  assert len(inputs) == 6
  assert by_task['shape']['visual'] == by_task['pair']['visual'] != by_task['name']['visual']
  assert by_task['name']['words'] == by_task['name']['queries']
  inputs, by_task = expert_usage.merging_conditions(small_model.spec('modality'), conditions, _PLAN.tasks, _SETS)
  assert inputs == ('visual', 'text') and set(by_task['name'].values()) == {0, 1}


def test_a_token_condition_belongs_to_one_task_except_for_target_sets():
  names, by_task = expert_usage.token_conditions(_PLAN.tasks, _SETS)
  assert names[:4] == ('name visual', 'name words', 'name queries', 'set vocabulary')  # tasks by name
  assert len(set(names)) == len(names) == 4 + 2 + 2 + 2 + 1  # package, pair, shape, text; text and name share a set
  assert by_task['name']['set vocabulary'] == by_task['text']['set vocabulary'] == names.index('set vocabulary')


def test_every_token_of_a_condition_is_selected_once():
  names, by_task = expert_usage.token_conditions(_PLAN.tasks, _SETS)
  group = {t.name: t.group for t in _PLAN.tasks}
  vocabulary = ('target_sets', 'vocabulary')
  sequences = [('inputs', group['text']), vocabulary, ('inputs', group['name']), vocabulary]
  task_slices = {t.name: slice(0, t.batch_size) for t in _PLAN.tasks}
  index = names.index
  assert expert_usage.token_slices(_PLAN.tasks, _SETS, by_task, sequences, task_slices) == (
      TokenSlice(index('name visual'), 2, 0, None, (0, 4)), TokenSlice(index('name words'), 2, 1, 0, (0, 4)),
      TokenSlice(index('name queries'), 2, 1, 1, (0, 4)), TokenSlice(index('set vocabulary'), 1, 0),
      TokenSlice(index('set vocabulary'), 3, 0), TokenSlice(index('text text'), 0, 0, None, (0, 4)))


_SHARES = jnp.array([[.5, .5, 0., 0.], [0., .25, .75, 0.], [.25, .25, .25, .25], [0., 0., 0., 1.]])


def test_overlap_is_the_common_share_of_two_conditions():
  np.testing.assert_allclose(routers.overlap(_SHARES), [
      [1, .25, .5, 0], [.25, 1, .5, 0], [.5, .5, 1, .25], [0, 0, .25, 1]])  # Σ min: .5 and .25 share .25 of expert 1


def test_the_effective_number_of_even_shares_is_their_number():
  effective = routers.effective_experts(_SHARES)
  np.testing.assert_allclose(effective[jnp.array([0, 2, 3])], [2, 4, 1], rtol=1e-6)
  assert float(effective[1]) == pytest.approx(np.exp(-.25 * np.log(.25) - .75 * np.log(.75)))


def test_a_task_has_the_mean_of_its_conditions_and_one_listed_twice_counts_twice():
  shares = expert_usage.task_shares(np.asarray(_SHARES)[None, None], [(0,), (0, 3), (0, 3, 3)])
  np.testing.assert_allclose(shares[0, 0], [[.5, .5, 0, 0], [.25, .25, 0, .5], [1 / 6, 1 / 6, 0, 2 / 3]], rtol=1e-6)


def test_the_content_has_overlaps_by_layer_and_their_mean():
  spec = dataclasses.replace(small_model.spec('token'), num_layers=2, sublayers=('mlp',))
  shares = np.asarray([[[[1., 0, 0, 0], [1, 0, 0, 0]]], [[[1., 0, 0, 0], [0, 1, 0, 0]]]])  # [2 layers, 1 router, 2, 4]
  content = expert_usage.to_json(
      {'checkpoint': 'init'}, spec, ('a', 'b'), {'one': {'text': 0}, 'two': {'text': 1}}, shares, np.array([8., 4.]),
      np.full((2, 1, 2), .5))
  assert content['task_overlap'] == [[[[1, 1], [1, 1]]], [[[1, 0], [0, 1]]]]
  assert content['mean_task_overlap'] == [[1, .5], [.5, 1]]
  assert (content['checkpoint'], content['layers'], content['tokens']) == ('init', [0, 1], [8, 4])
  assert content['sublayers'] == ['mlp']
  assert content['entropy'] == [[[0, 0]]] * 2 and content['router_entropy'] == [[[.5, .5]]] * 2
  assert content['effective_experts'] == [[[1, 1]]] * 2


_gate_sums = small_model.jit(expert_usage.gate_sums, static_argnums=(0, 2, 3, 4))


def _encoded(router):
  """(spec, sequences, what the encoder collected) of captions, images and a set, in this order."""
  spec = small_model.spec(router)
  padded = jnp.array([[True, True, False]] * 2)
  sequences = (small_model.sequence('image_caption', text_valid=jnp.concatenate([padded, padded], axis=1)),
               small_model.sequence('image_classification', batch=3, seed=1),
               small_model.target(_SETS['classes'].condition, seed=2))
  run = small_model.jit(lambda v: small_model.encode(spec, sequences, values=v, taps=True, all_rows=True)[1])
  return spec, sequences, run(small_model.params(spec))


@pytest.fixture(name='by_token', scope='module')
def _by_token():
  return _encoded('token')


def test_gate_sums_are_the_router_statistics_of_the_encoder(by_token):
  """The conditions here are the distinct router inputs of the encoder."""
  spec, sequences, collected = by_token
  conditions = [c for s in sequences for c in s.layout.conditions]
  inputs = routers.distinct_inputs('token', tuple(conditions))
  slices = []
  for i, s in enumerate(sequences):
    for j, condition in enumerate(s.layout.conditions):
      halves = (0, 1) if s.layout.masks[j] == 'two_stream' else (None,)
      slices += [TokenSlice(inputs.index(routers.router_input('token', condition)), i, j, half) for half in halves]
  sums = _gate_sums(spec, collected, tuple(slices), len(inputs), 1)
  assert sums.gates.shape == (3, 2, 4, 4)
  for layer in range(3):
    subtree, period, block = spec.stack.locate(layer)
    for r, sublayer in enumerate(spec.sublayers):
      stats = collected[subtree][0]['router_stats'][sublayer]
      stats = stats if period is None else jax.tree.map(lambda x, p=period: x[p], stats)
      np.testing.assert_allclose(sums.gates[layer, r], stats.importance, rtol=1e-5)
      np.testing.assert_allclose(sums.entropy[layer, r].sum(), stats.entropies.sum(), rtol=1e-5)
      np.testing.assert_allclose(sums.tokens, stats.tokens)
  # 2 images of 5 tokens; 2 captions of 2 words and 2 queries that count; 3 images; 2 texts of 4.
  assert sorted(np.asarray(sums.tokens).tolist()) == [8, 8, 10, 15]
  assert np.ptp(np.asarray(sums.gates), axis=(0, 1)).max() > .1  # layers and routers differ


def test_words_queries_and_examples_are_separate(by_token):
  spec, _, collected = by_token
  slices = (TokenSlice(0, 0, 1, 0), TokenSlice(1, 0, 1, 1), TokenSlice(2, 1, 0, None, (0, 1)),
            TokenSlice(3, 1, 0, None, (1, 3)))
  sums = _gate_sums(spec, collected, slices, 4, 1)
  np.testing.assert_allclose(sums.tokens, [4, 4, 5, 10])
  routing = collected['tail'][0]['token_routing']['mlp'][1][0]  # of three images, in the last layer
  by_hand = np.zeros((3, 4))
  for example in range(3):
    for token in range(5):
      for k in range(2):
        by_hand[example, routing.expert[example, token, k]] += routing.gates[example, token, k]
  np.testing.assert_allclose(sums.gates[2, 1, 2:], [by_hand[0], by_hand[1] + by_hand[2]], rtol=1e-5)
  words = _gate_sums(spec, collected, (TokenSlice(0, 0, 1),), 1, 1)
  np.testing.assert_allclose(sums.gates[:, :, :2].sum(2), words.gates[:, :, 0], rtol=1e-5)
  assert np.abs(np.asarray(sums.gates[:, :, 0] - sums.gates[:, :, 1])).max() > .1


def test_examples_are_counted_in_every_shard(by_token):
  spec, _, collected = by_token
  slices = (TokenSlice(0, 1, 0, None, (0, 1)),)
  # With three images as three shards of one example, the first example of every shard is all of them.
  one, every = (_gate_sums(spec, collected, slices, 1, shards) for shards in (1, 3))
  np.testing.assert_allclose((one.tokens, every.tokens), [[5], [15]])


def test_coefficients_of_a_merging_router_are_those_of_the_encoder():
  spec, sequences, collected = _encoded('attribute')
  inputs = routers.distinct_inputs('attribute', tuple(c for s in sequences for c in s.layout.conditions))
  coef = expert_usage.coefficients(spec, small_model.params(spec), inputs)
  assert coef.shape == (3, 2, 4, 4)
  for r, sublayer in enumerate(spec.sublayers):
    stacked, tail = (collected[sub][0]['router_stats'][sublayer].coef for sub in ('blocks', 'tail'))
    np.testing.assert_allclose(coef[:, r], np.concatenate([stacked, tail[None]]), rtol=1e-5)
  assert np.ptp(coef, axis=(0, 1)).max() > .1


def test_only_layers_with_experts_are_measured():
  spec = small_model.spec('modality', num_layers=5, placement='every_2')
  assert expert_usage.expert_layers(spec) == (0, 2, 4)
  assert expert_usage.coefficients(spec, small_model.params(spec), ('text',)).shape == (3, 2, 1, 4)
  assert expert_usage.expert_layers(small_model.spec('dense')) == ()
