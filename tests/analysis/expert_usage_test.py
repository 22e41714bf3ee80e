"""Which experts are used: arithmetic by hand, and the same answer as the encoder's own decisions."""

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


def _names(task):
  [found] = [t for t in _PLAN.tasks if t.name == task]
  return [(s.name, s.role, s.array, s.half) for s in expert_usage.token_spans(found, _SETS)]


def test_a_task_has_its_arrays_and_its_targets_and_a_caption_words_apart_from_queries():
  assert _names('shape') == [('visual', 'input', 0, None), ('set classes', 'set', 0, None)]
  assert _names('pair') == [('visual', 'input', 0, None), ('paired text', 'pair', 0, None)]
  assert _names('name') == [('visual', 'input', 0, None), ('words', 'input', 1, 0), ('queries', 'input', 1, 1),
                            ('set vocabulary', 'set', 0, None)]


def test_rows_of_a_router_that_merges_are_shared_by_what_it_cannot_tell_apart():
  conditions = tuple(s.condition for t in _PLAN.tasks for s in expert_usage.token_spans(t, _SETS))
  rows, of = expert_usage.merging_conditions(small_model.spec('attribute'), conditions, _PLAN.tasks, _SETS)
  assert len(rows) == 6
  assert of['shape']['visual'] == of['pair']['visual'] != of['name']['visual']
  assert of['name']['words'] == of['name']['queries']
  rows, of = expert_usage.merging_conditions(small_model.spec('modality'), conditions, _PLAN.tasks, _SETS)
  assert rows == ('visual', 'text') and set(of['name'].values()) == {0, 1}


def test_rows_of_tokens_belong_to_one_task_but_for_target_sets():
  rows, of = expert_usage.token_conditions(_PLAN.tasks, _SETS)
  assert rows[:4] == ('name visual', 'name words', 'name queries', 'set vocabulary')  # tasks by name
  assert len(set(rows)) == len(rows) == 4 + 2 + 2 + 2 + 1  # package, pair, shape, text: the last has its set in common
  assert of['name']['set vocabulary'] == of['text']['set vocabulary'] == rows.index('set vocabulary')


def test_every_token_of_a_row_is_found_once():
  rows, of = expert_usage.token_conditions(_PLAN.tasks, _SETS)
  group = {t.name: t.group for t in _PLAN.tasks}
  sequences = [('input', group['text']), ('set', 'vocabulary'), ('input', group['name']), ('set', 'vocabulary')]
  found = expert_usage.token_slices(_PLAN.tasks, _SETS, of, sequences, lambda t: (0, t.batch_size))
  place = rows.index
  assert found == (
      TokenSlice(place('name visual'), 2, 0, None, (0, 4)), TokenSlice(place('name words'), 2, 1, 0, (0, 4)),
      TokenSlice(place('name queries'), 2, 1, 1, (0, 4)), TokenSlice(place('set vocabulary'), 1, 0),
      TokenSlice(place('set vocabulary'), 3, 0), TokenSlice(place('text text'), 0, 0, None, (0, 4)))


_SHARES = jnp.array([[.5, .5, 0., 0.], [0., .25, .75, 0.], [.25, .25, .25, .25], [0., 0., 0., 1.]])


def test_overlap_is_what_two_rows_have_in_common():
  np.testing.assert_allclose(routers.overlap(_SHARES), [
      [1, .25, .5, 0], [.25, 1, .5, 0], [.5, .5, 1, .25], [0, 0, .25, 1]])  # Σ min: .5 and .25 share .25 of expert 1


def test_the_effective_number_counts_even_experts():
  found = routers.effective_experts(_SHARES)
  np.testing.assert_allclose(found[jnp.array([0, 2, 3])], [2, 4, 1], rtol=1e-6)
  assert float(found[1]) == pytest.approx(np.exp(-.25 * np.log(.25) - .75 * np.log(.75)))


def test_a_task_takes_the_mean_of_its_rows_and_a_row_named_twice_counts_twice():
  found = expert_usage.task_shares(np.asarray(_SHARES)[None, None], [(0,), (0, 3), (0, 3, 3)])
  np.testing.assert_allclose(found[0, 0], [[.5, .5, 0, 0], [.25, .25, 0, .5], [1 / 6, 1 / 6, 0, 2 / 3]], rtol=1e-6)


def test_the_record_holds_overlaps_by_layer_and_their_mean():
  spec = dataclasses.replace(small_model.spec('token'), num_layers=2, sublayers=('mlp',))
  shares = np.asarray([[[[1., 0, 0, 0], [1, 0, 0, 0]]], [[[1., 0, 0, 0], [0, 1, 0, 0]]]])  # [2 layers, 1 router, 2 rows, 4]
  found = expert_usage.to_json({'checkpoint': 'init'}, spec, ('a', 'b'), {'one': {'text': 0}, 'two': {'text': 1}}, shares,
                       np.array([8., 4.]), np.full((2, 1, 2), .5))
  assert found['task_overlap'] == [[[[1, 1], [1, 1]]], [[[1, 0], [0, 1]]]]
  assert found['mean_task_overlap'] == [[1, .5], [.5, 1]]
  assert (found['checkpoint'], found['layers'], found['sublayers'], found['tokens']) == ('init', [0, 1], ['mlp'], [8, 4])
  assert found['entropy'] == [[[0, 0]]] * 2 and found['router_entropy'] == [[[.5, .5]]] * 2
  assert found['effective_experts'] == [[[1, 1]]] * 2


def _encoded(router):
  """(spec, what was collected) of captions, pictures and a set; taps keep the order of sequences."""
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


def test_gates_add_up_to_what_the_encoder_says_of_its_own_routing(by_token):
  """One row per kind of array: the encoder's own rows, computed another way."""
  spec, sequences, collected = by_token
  conditions = [c for s in sequences for c in s.layout.conditions]
  rows = routers.distinct_inputs('token', tuple(conditions))
  pieces = []
  for i, s in enumerate(sequences):
    for j, condition in enumerate(s.layout.conditions):
      halves = (0, 1) if s.layout.masks[j] == 'two_stream' else (None,)
      pieces += [TokenSlice(rows.index(routers.router_input('token', condition)), i, j, half) for half in halves]
  found = expert_usage.gate_sums(spec, collected, pieces, len(rows), 1)
  assert found.gates.shape == (3, 2, 4, 4)
  for layer in range(3):
    subtree, period, block = spec.stack.locate(layer)
    for r, part in enumerate(spec.sublayers):
      own = collected[subtree][0]['router_stats'][part]
      own = own if period is None else jax.tree.map(lambda x, p=period: x[p], own)
      np.testing.assert_allclose(found.gates[layer, r], own.importance, rtol=1e-5)
      np.testing.assert_allclose(found.entropy[layer, r].sum(), own.entropies.sum(), rtol=1e-5)
      np.testing.assert_allclose(found.tokens, own.tokens)
  # 2 pictures of 5 tokens; 2 captions of 2 words and 2 queries that count; 3 pictures; 2 texts of 4.
  assert sorted(np.asarray(found.tokens).tolist()) == [8, 8, 10, 15]
  assert np.ptp(np.asarray(found.gates), axis=(0, 1)).max() > .1  # layers and routers differ: none stands for another


def test_words_queries_and_examples_are_told_apart(by_token):
  spec, _, collected = by_token
  pieces = (TokenSlice(0, 0, 1, 0), TokenSlice(1, 0, 1, 1), TokenSlice(2, 1, 0, None, (0, 1)), TokenSlice(3, 1, 0, None, (1, 3)))
  found = expert_usage.gate_sums(spec, collected, pieces, 4, 1)
  np.testing.assert_allclose(found.tokens, [4, 4, 5, 10])
  choice = collected['tail'][0]['token_routing'][1]['mlp'][0]  # of three pictures, in the last layer
  by_hand = np.zeros((3, 4))
  for example in range(3):
    for token in range(5):
      for k in range(2):
        by_hand[example, choice.expert[example, token, k]] += choice.gates[example, token, k]
  np.testing.assert_allclose(found.gates[2, 1, 2:], [by_hand[0], by_hand[1] + by_hand[2]], rtol=1e-5)
  words = expert_usage.gate_sums(spec, collected, (TokenSlice(0, 0, 1),), 1, 1)
  np.testing.assert_allclose(found.gates[:, :, :2].sum(2), words.gates[:, :, 0], rtol=1e-5)
  assert np.abs(np.asarray(found.gates[:, :, 0] - found.gates[:, :, 1])).max() > .1


def test_examples_are_counted_in_every_shard(by_token):
  spec, _, collected = by_token
  # Three pictures as three shards of one example: the first example of every shard is all of them.
  one, every = (expert_usage.gate_sums(spec, collected, (TokenSlice(0, 1, 0, None, (0, 1)),), 1, shards) for shards in (1, 3))
  np.testing.assert_allclose((one.tokens, every.tokens), [[5], [15]])


def test_coefficients_of_a_router_that_merges_are_those_that_the_encoder_decides():
  spec, sequences, collected = _encoded('attribute')
  rows = routers.distinct_inputs('attribute', tuple(c for s in sequences for c in s.layout.conditions))
  found = expert_usage.coefficients(spec, small_model.params(spec), rows)
  assert found.shape == (3, 2, 4, 4)
  for r, part in enumerate(spec.sublayers):
    stacked, tail = (collected[sub][0]['router_stats'][part].coef for sub in ('blocks', 'tail'))
    np.testing.assert_allclose(found[:, r], np.concatenate([stacked, tail[None]]), rtol=1e-5)
  assert np.ptp(found, axis=(0, 1)).max() > .1


def test_only_layers_with_experts_are_asked():
  spec = small_model.spec('modality', num_layers=5, placement='every_2')
  assert expert_usage.expert_layers(spec) == (0, 2, 4)
  assert expert_usage.coefficients(spec, small_model.params(spec), ('text',)).shape == (3, 2, 1, 4)
  assert expert_usage.expert_layers(small_model.spec('dense')) == ()
