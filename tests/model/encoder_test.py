"""The encoder: equal results joined or separate, scanned or unrolled, with all rows or the readout."""

import contextlib
import functools
from unittest import mock

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from tests.helpers.jaxprs import equations
from uni_moe_jax.model import encoder
from uni_moe_jax.model.block import drop_path
from uni_moe_jax.model.spec import ModelSpec, Stack
from uni_moe_jax.moe import routers
from uni_moe_jax.tasks import task_types

_NAMES = task_types.families()['names']


def _features(spec: ModelSpec, sequences, key=None, **options):
  return small_model.run(spec, sequences, key, **options)[0]


def _mix(batch: int = 2):
  """One segment and two, full and two-stream; the two images are joined."""
  names = ('image_classification', 'image_caption', 'image_retrieval', 'vqa')
  return tuple(small_model.sequence(k, batch, seed=i) for i, k in enumerate(names))


def _assert_close(a, b, tolerance: float = 1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@functools.cache
def _expected(router: str):
  """Joined, last layer for the readout only, nothing collected: as in training."""
  return _features(small_model.spec(router), _mix())


# All rows of the last layer; sequences that are separate, because keys are collected; or joined within two shards.
@pytest.mark.parametrize('router, option', [
    *(('attribute', option) for option in (dict(all_rows=True), dict(keys=True), dict(shards=2))),
    *(pytest.param(router, option, marks=pytest.mark.nightly)
      for router in ('token', 'context') for option in (dict(all_rows=True), dict(keys=True)))])
def test_options_of_the_encoder_change_no_result(router, option):
  _assert_close(_features(small_model.spec(router), _mix(), **option), _expected(router))


def test_features_of_sequences_and_examples_differ():
  # Otherwise the tests above could not see two results exchanged.
  rows = np.concatenate([np.asarray(f).reshape(-1, 16) for f in _expected('attribute')])
  gaps = np.abs(rows[:, None] - rows[None]).max(-1) + 9 * np.eye(len(rows))
  assert gaps.min() > 1e-2


def test_the_readout_has_one_row_per_position():
  # Token 0, three queries, token 0, one slot.
  assert [f.shape[1] for f in _expected('attribute')] == [1, 3, 1, 1]


class _Unrolled(ModelSpec):
  """The same model with every layer in the tail."""

  @property
  def stack(self) -> Stack:
    return Stack((), 0, self.pattern)


def _rearranged(values, source: Stack, destination: Stack):
  """Parameters of one stack as those of an unrolled one."""
  encoder = {'tail': {}}
  for layer in range(source.num_layers):
    subtree, index, block = source.locate(layer)
    _, _, name = destination.locate(layer)
    params = values['encoder'][subtree][block]
    encoder['tail'][name] = params if index is None else jax.tree.map(lambda x, i=index: x[i], params)
  return {**values, 'encoder': encoder}


def test_scanned_layers_equal_unrolled_ones():
  # Noise and stochastic depth are on: both are keyed by the layer, not by its subtree.
  scanned = small_model.spec(drop_path=.3)
  unrolled, values = _Unrolled(**vars(scanned)), small_model.params(scanned)
  sequences, key = (small_model.sequence('image_classification', 4),), jax.random.key(1)
  one = _features(scanned, sequences, key)
  _assert_close(one, _features(unrolled, sequences, key, values=_rearranged(values, scanned.stack, unrolled.stack)))
  otherwise = _features(scanned, sequences, jax.random.key(2))
  assert np.abs(one[0] - otherwise[0]).max() > 1e-2


def test_rematerialized_blocks_have_the_same_gradients():
  sequence, gradients = small_model.sequence('image_classification'), []
  for remat in (False, True):
    spec = small_model.spec(num_layers=4, placement='every_2', remat=remat)  # periods of two blocks
    loss = lambda values, s=spec: jnp.sin(small_model.encode(s, [sequence], values=values)[0][0]).sum()
    gradients.append(small_model.jit(jax.grad(loss))(small_model.params(spec)))
  _assert_close(*gradients)


def _num_products(jaxpr) -> int:
  return sum(e.primitive.name == 'dot_general' for e in equations(jaxpr))


_OF_ATTENTION = 6  # scores and sums of values: of image and text in the scanned block, of text alone in the last one


# A router has three small products. There is one for either sublayer of the scanned block and of the last one.
@pytest.mark.parametrize('router, of_routers', [('dense', 0), ('attribute', 12)])
def test_on_a_cpu_rematerialized_blocks_compute_no_projection_or_merge_twice(router, of_routers):
  def products(remat):
    spec = small_model.spec(router, remat=remat)
    loss = lambda values: small_model.encode(spec, [small_model.sequence('image_caption')], values=values)[0][0].sum()
    return _num_products(jax.make_jaxpr(jax.grad(loss))(small_model.params(spec)).jaxpr)

  kept = products(True)
  with mock.patch.object(encoder, 'remat_policy', return_value=None):
    assert products(True) > kept
  assert kept == products(False) + of_routers + _OF_ATTENTION


def test_positions_count_the_tokens_of_the_text():
  # The segment of a text begins with the prefix, that of a question does not.
  spec, sequences = small_model.spec('dense'), (small_model.sequence('text_mlm'), small_model.sequence('vqa'))
  features, collected = small_model.run(spec, sequences, taps=True, all_rows=True)
  (text,), (_, question) = collected['tail'][0]['taps']
  head = small_model.UniPerceiver(spec).bind({'params': small_model.params(spec)})
  for actual, hidden, at in ((features[0], text, sequences[0].positions + 1),
                            (features[1], question, sequences[1].positions)):
    rows = np.take_along_axis(np.asarray(hidden), np.asarray(at)[..., None], axis=1)
    _assert_close(actual, head.features(jnp.asarray(rows)))


# Caption: 5 visual tokens (prefix, 4 patches), 6 words and queries; names: prefix and 3 words. Batch 2.
_SEQUENCES = (small_model.sequence('image_caption'), small_model.target(_NAMES))


def _collected(**options):
  return jax.eval_shape(lambda: small_model.encode(small_model.spec(), _SEQUENCES, **options)[1])


def test_taps_are_every_segment_after_every_layer_or_the_readout_in_the_last():
  taken = _collected(taps=True, all_rows=True)
  for lead, out in (((2,), taken['blocks'][0]), ((), taken['tail'][0])):  # two scanned layers
    shapes = [[x.shape for x in sequence] for sequence in out['taps']]
    assert shapes == [[(*lead, 2, n, 16) for n in lengths] for lengths in ((5, 6), (4,))]
  last = _collected(taps=True)['tail'][0]['taps']
  assert last[0][0] is None
  assert (last[0][1].shape, last[1][0].shape) == ((2, 3, 16), (2, 1, 16))


def test_keys_and_values_are_of_every_token_also_in_the_last_layer():
  taken = _collected(keys=True)
  for lead, out in (((2,), taken['blocks'][0]), ((), taken['tail'][0])):
    shapes = [[(k.shape, v.shape) for k, v in sequence] for sequence in out['kv']]
    assert shapes == [[((*lead, 2, n, 2, 8),) * 2 for n in lengths] for lengths in ((5, 6), (4,))]


def test_by_default_only_router_stats_are_collected_with_an_entry_per_condition():
  taken = _collected()
  assert set(taken['tail'][0]) == {'router_stats'}
  for part in ('attention', 'mlp'):  # caption image, caption text, names
    assert taken['blocks'][0]['router_stats'][part].logits.shape == (2, 3, 4)
    assert taken['tail'][0]['router_stats'][part].logits.shape == (3, 4)


def test_products_are_bfloat16_and_features_and_parameters_float32():
  spec = small_model.spec(dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(small_model.nn.unbox(small_model.boxed(spec)))} == {jnp.dtype('float32')}
  actual, exact = _features(spec, _mix()), _features(small_model.spec(), _mix())
  assert {f.dtype for f in actual} == {jnp.dtype('float32')}
  for a, b in zip(actual, exact, strict=True):
    cosines = (a * b).sum(-1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)
    assert cosines.min() > .9995
    assert np.abs(a - b).max() > 1e-4  # it was not float32 in disguise


_IDS = jnp.arange(400, dtype=jnp.uint32)


def _dropped(ids, rate=.25, key=jax.random.key(0)):
  return np.asarray(drop_path(jnp.ones((len(ids), 2, 3)), key, ids, rate))


def test_a_quarter_of_the_branches_is_dropped_whole_and_the_others_are_scaled():
  actual = _dropped(_IDS)
  assert {tuple(np.unique(sample)) for sample in actual} == {(0,), (np.float32(1 / .75),)}
  assert (actual == 0).mean() == pytest.approx(.25, abs=.08)  # standard error √(.25 · .75 / 400) = .022
  np.testing.assert_array_equal(_dropped(_IDS, key=None), 1)  # at evaluation nothing is


def test_dropped_paths_follow_the_example_not_its_index():
  order = np.random.default_rng(0).permutation(400)
  np.testing.assert_array_equal(_dropped(_IDS[order]), _dropped(_IDS)[order])


def test_a_permuted_batch_has_the_permuted_result():
  spec = small_model.spec('dense', drop_path=.5)
  sequence, order = small_model.sequence('image_caption', 6), np.array([3, 0, 5, 1, 4, 2])
  moved = jax.tree.map(lambda x: x[order] if np.ndim(x) else x, sequence)
  key = jax.random.key(2)
  [straight], [permuted] = _features(spec, [sequence], key), _features(spec, [moved], key)
  _assert_close(permuted, np.asarray(straight)[order])
  # With the ids left where they were, others are dropped.
  [other] = _features(spec, [moved.replace(ids=sequence.ids)], key)
  assert np.abs(other - permuted).max() > 1e-2


@pytest.mark.parametrize('silent', ['scale1', 'scale2'])
def test_attention_and_ffn_are_both_dropped(silent):
  # With the other branch silent, two steps still differ.
  spec, sequence = small_model.spec('dense', drop_path=.5), small_model.sequence('image_caption', 6)
  values = jax.tree_util.tree_map_with_path(
      lambda path, x: x * (silent not in jax.tree_util.keystr(path)), small_model.params(spec))
  one, two = (_features(spec, [sequence], jax.random.key(k), values=values)[0] for k in (2, 3))
  assert np.abs(one - two).max() > 1e-2


def _logits(sequences, row: int, key):
  """{(layer, part): logits of one condition row}."""
  spec = small_model.spec()
  _, collected = small_model.run(spec, sequences, key)
  actual = {}
  for layer in range(spec.num_layers):
    subtree, index, block = spec.stack.locate(layer)
    decisions = collected[subtree][int(block.removeprefix('block'))]['router_stats']
    for part, decision in decisions.items():
      actual[layer, part] = np.asarray(decision.logits if index is None else decision.logits[index])[row]
  return actual


def test_a_condition_has_one_draw_per_step_layer_and_router():
  names = small_model.target(_NAMES)
  one, two = (_logits((names,), 0, jax.random.key(k)) for k in (5, 6))
  _assert_close(one, _logits((small_model.sequence('text_mlm'), names), 1, jax.random.key(5)))
  # What differs between two steps is noise alone.
  draws = np.array([one[k] - two[k] for k in one])  # [layer and part, E]
  assert len(draws) == 6
  assert np.abs(draws).max(-1).min() > 1e-2
  assert (np.abs(draws[:, None] - draws[None]).max(-1) + np.eye(6)).min() > 1e-2


def test_adding_arrays_of_two_ranks_is_an_error():
  with pytest.raises(ValueError, match='could not be broadcast together|rank promotion|rank_promotion'):
    _ = jnp.ones((2, 3)) + jnp.ones(3)


@pytest.mark.parametrize('router', small_model.ROUTERS)
def test_an_unknown_task_is_refused_by_the_task_router_alone(router):
  task_type = task_types.TaskType('search', (task_types.Segment('text'),), 'pair', 'cls', 'search')
  refused = pytest.raises(ValueError, match="no embedding for 'search'")
  with refused if router == 'task' else contextlib.nullcontext():
    [features] = jax.eval_shape(
        lambda: small_model.encode(small_model.spec(router), (small_model.sequence(task_type),))[0])
    assert features.shape == (2, 1, 16)


def test_the_router_table_has_every_built_in_condition():
  conditions = [c for k in task_types.TASK_TYPES.values() for c in (*k.conditions, k.pair_condition)]
  for router in ('task', 'modality'):
    rows = routers.distinct_inputs(router, (*conditions, *task_types.families().values()))
    assert set(rows) <= set(small_model.spec(router).router_names)


def test_parameters_of_another_model_are_refused():
  wider = small_model.params(small_model.spec('dense', mlp_dim=28))
  with pytest.raises(flax.errors.ScopeParamShapeError, match=r'/encoder/scan\(blocks\)/block0/ffn_in'):
    small_model.encode(small_model.spec('dense'), [small_model.sequence('text_classification')], values=wider)
