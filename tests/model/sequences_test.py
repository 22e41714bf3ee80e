"""Layouts of task types, rows to read, and sequences that are joined and split again."""

from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.data.batches import target_sets
from uni_moe_jax.model import uni_perceiver
from uni_moe_jax.model.sequences import (
  READ_NOTHING,
  EmbeddedSequence,
  InputSequence,
  Layout,
  join_equal,
  map_joined,
  pad_to_join,
)
from uni_moe_jax.tasks import task_types
from uni_moe_jax.tasks.task_types import Segment, TaskType

_TEXT = Layout.of_task_type(task_types.TASK_TYPES['text_mlm'])


@pytest.mark.parametrize('name, modalities, readout_segment', [
    ('image_classification', ('visual',), 0), ('text_mlm', ('text',), 0), ('text_classification', ('text',), 0),
    ('image_caption', ('visual', 'text'), 1), ('vqa', ('visual', 'text'), 1)])
def test_the_layout_of_a_task_type(name, modalities, readout_segment):
  layout = Layout.of_task_type(task_types.TASK_TYPES[name])
  assert (layout.modalities, layout.readout_segment) == (modalities, readout_segment)
  assert layout.conditions == task_types.TASK_TYPES[name].conditions and layout.prefixed


def test_a_target_text_is_read_at_its_prefix():
  layout = Layout.of_text(task_types.families()['words'])
  assert (layout.masks, layout.readout, layout.readout_segment) == (('full',), 'cls', 0)


def test_a_prefill_reads_nothing():
  assert Layout((), (), READ_NOTHING).readout_segment is None


@pytest.mark.parametrize('readout, positions, rows', [
    ('cls', None, [[0], [10]]), ('queries', None, [[3, 4, 5], [13, 14, 15]]),
    ('masked', [[5, 1, 1], [0, 2, 4]], [[5, 1, 1], [10, 12, 14]]), ('slot', [[2], [3]], [[2], [13]])])
def test_rows_that_a_readout_reads(readout, positions, rows):
  tokens = jnp.arange(2)[:, None, None] * 10 + jnp.arange(6)[None, :, None]  # token s of example b is 10 b + s
  positions = None if positions is None else jnp.array(positions)
  sequence = EmbeddedSequence((tokens,), (None,), positions, jnp.arange(2, dtype=jnp.uint32), Layout((), (), readout))
  np.testing.assert_array_equal(sequence.take_readout(tokens)[..., 0], rows)


def _embedded(start: int, batch: int, tokens: int = 2, padded: bool = False, masked: int = 0) -> EmbeddedSequence:
  """Every value of example i is start + i."""
  number = start + jnp.arange(batch)
  return EmbeddedSequence(
      segments=(number[:, None, None] * jnp.ones((1, tokens, 3)),),
      valid=(jnp.ones((batch, tokens), bool) if padded else None,),
      readout_positions=jnp.zeros((batch, masked), jnp.int32) if masked else None, ids=number.astype(jnp.uint32),
      layout=_TEXT)


def _numbers(sequence: EmbeddedSequence) -> list[int]:
  return [int(i) for i in sequence.ids]


# Shards of the first batch of four: (0, 1), (2, 3); of the second: 10, 11.
@pytest.mark.parametrize('batches, shards, numbers', [
    ((2, 3), 1, [0, 1, 10, 11, 12]), ((4, 2), 2, [0, 1, 10, 2, 3, 11])])
def test_equal_sequences_become_one_in_which_every_shard_keeps_its_own_rows(batches, shards, numbers):
  [joined], _ = join_equal((_embedded(0, batches[0]), _embedded(10, batches[1])), ('a', 'a'), shards)
  assert _numbers(joined) == numbers
  np.testing.assert_array_equal(joined.segments[0][:, 1, 2], numbers)  # all leaves are joined


@pytest.mark.parametrize('shards', [1, 2])
def test_results_come_back_in_the_original_order(shards):
  sequences = (_embedded(0, 4), _embedded(50, 2, tokens=5), _embedded(10, 2), _embedded(20, 6))
  joined, split = join_equal(sequences, ('a', 'a', 'a', 'a'), shards)
  assert len(joined) == 2
  for sequence, result in zip(sequences, split([s.segments[0] for s in joined]), strict=True):
    np.testing.assert_array_equal(result, sequence.segments[0])


def test_a_result_may_be_a_tree_with_none():
  _, split = join_equal((_embedded(0, 2), _embedded(10, 2)), ('a', 'a'), shards=1)
  rows = split([{'rows': jnp.arange(4), 'none': None}])
  np.testing.assert_array_equal(rows[1]['rows'], [2, 3])
  assert rows[1]['none'] is None


@pytest.mark.parametrize('one, other, key', [
    ({}, {}, 'b'), ({}, dict(tokens=3), 'a'), ({}, dict(padded=True), 'a'), (dict(masked=1), dict(masked=2), 'a'),
    ({}, dict(masked=2), 'a')], ids=['key', 'length', 'padding', 'masked', 'readout'])
def test_different_sequences_stay_separate(one, other, key):
  joined, _ = join_equal((_embedded(0, 2, **one), _embedded(10, 2, **other)), ('a', key), shards=1)
  assert [_numbers(s) for s in joined] == [[0, 1], [10, 11]]


def test_a_batch_that_does_not_divide_stays_alone():
  sequences = (_embedded(0, 3), _embedded(10, 2), _embedded(20, 2))
  joined, split = join_equal(sequences, ('a', 'a', 'a'), shards=2)
  assert [_numbers(s) for s in joined] == [[0, 1, 2], [10, 20, 11, 21]]
  assert [r.tolist() for r in split([s.ids for s in joined])] == [[0, 1, 2], [10, 11], [20, 21]]


def _text(batch: int, tokens: int) -> EmbeddedSequence:
  text = _embedded(1, batch, tokens, padded=True)
  return text.replace(layout=Layout.of_text(task_types.families()['names']))


def _lengths(sequences) -> list[int]:
  return [s.segments[0].shape[1] for s in sequences]


# At most 128 tokens of padding: 16 texts get 8 tokens more, 17 do not, and are what still shorter ones are padded to.
@pytest.mark.parametrize('texts, keys, lengths', [
    (((4, 12), (16, 4), (3, 9)), 'aaa', [12, 12, 12]), (((4, 12), (17, 4), (16, 2)), 'aaa', [12, 4, 4]),
    (((4, 12), (16, 4)), 'ab', [12, 4])])
def test_short_texts_are_padded_to_longer_ones_of_the_same_key(texts, keys, lengths):
  assert _lengths(pad_to_join(tuple(_text(*text) for text in texts), tuple(keys))) == lengths


def test_padding_adds_no_valid_token_and_only_texts_that_are_read_at_their_prefix_get_it():
  short = _text(2, 3)
  padded, _ = pad_to_join((short, _text(1, 5)), ('a', 'a'))
  np.testing.assert_array_equal(padded.segments[0], np.pad(short.segments[0], ((0, 0), (0, 2), (0, 0))))
  assert padded.valid[0].tolist() == 2 * [[True] * 3 + [False] * 2]
  others = _embedded(0, 2, 3, masked=1), _embedded(0, 2, 5, masked=1), _text(2, 3).replace(valid=(None,)), _text(2, 5)
  assert _lengths(pad_to_join(others, 4 * ('a',))) == [3, 5, 3, 5]


@pytest.mark.parametrize('router', ['attribute', pytest.param('context', marks=pytest.mark.nightly)])
def test_texts_that_are_padded_have_the_same_features(router):
  texts = [small_model.target(task_types.families()['names'], words=n) for n in (2, 5)]
  spec = small_model.spec(router)
  alone = tuple(small_model.run(spec, [text])[0][0] for text in texts)
  assert _count_joined(router, *texts) == 1
  chex.assert_trees_all_close(small_model.run(spec, texts)[0], alone, rtol=1e-5, atol=1e-5)


def _count_joined(router: str, *sequences) -> int:
  """Number of sequences that the encoder gets after joining."""
  counts = []

  def spy(*args):
    joined, split = join_equal(*args)
    counts.append(len(joined))
    return joined, split

  with mock.patch.object(uni_perceiver, 'join_equal', spy):
    jax.eval_shape(lambda: small_model.encode(small_model.spec(router), sequences)[0])
  return counts[-1]  # init may have come before


# The two images have the same attributes and modality, but two tasks.
@pytest.mark.parametrize('router, count', [('attribute', 1), ('modality', 1), ('dense', 1), ('task', 2)])
def test_sequences_with_one_router_input_share_their_products(router, count):
  images = small_model.sequence('image_classification'), small_model.sequence('image_retrieval')
  assert _count_joined(router, *images) == count


# An image and a text, each with its prefix, have five tokens.
@pytest.mark.parametrize('router, count', [('attribute', 2), ('modality', 2), ('task', 2), ('dense', 1)])
def test_an_image_and_a_text_of_one_length_share_theirs_in_a_dense_model_only(router, count):
  names = small_model.target(task_types.families()['names'], words=4).replace(text_valid=None)
  assert _count_joined(router, small_model.sequence('image_classification'), names) == count


def test_the_model_joins_within_the_shards_of_its_batches():
  with mock.patch.object(uni_perceiver, 'join_equal', wraps=join_equal) as spy:
    sequence = small_model.sequence('text_mlm')
    jax.eval_shape(lambda: small_model.encode(small_model.spec('dense'), [sequence], shards=2)[0])
  assert spy.call_args.args[2] == 2


def test_sequences_with_different_readout_segments_stay_separate():
  # [spe, image] [question] and [spe, question] [image], of equal shapes.
  swapped = TaskType('swapped', (Segment('text'), Segment('visual')), 'words', 'slot', 'vqa')
  sequences = [small_model.sequence(k, words=4, text_valid=None) for k in ('vqa', swapped)]
  assert _count_joined('dense', *sequences) == 2


@pytest.mark.parametrize('router', ['attribute', pytest.param('context', marks=pytest.mark.nightly)])
def test_entries_in_buckets_have_the_features_and_gradients_of_entries_padded_to_the_longest(router, monkeypatch):
  spec, lengths = small_model.spec(router, num_layers=1), [4, 2, 3, 4, 2, 2]
  rng, condition = np.random.default_rng(0), task_types.families()['names']
  entries = [[rng.integers(2, small_model.VOCABULARY, n).tolist()] for n in lengths]
  direction = rng.normal(size=(len(entries), spec.width)).astype(np.float32)

  def encoded(min_saved_tokens):
    """(number of buckets, (features, gradients))."""
    monkeypatch.setattr(target_sets, 'MIN_SAVED_TOKENS', min_saved_tokens)
    buckets, order = target_sets.bucket_by_length(entries, small_model.EOT)

    def loss(values):
      sequences = InputSequence.of_buckets('names', condition, buckets, order, False)
      features = jnp.concatenate([f[:, 0] for f in small_model.encode(spec, sequences, values=values)[0]])[order]
      return (direction * features).sum(), features
    grads, features = small_model.jit(jax.grad(loss, has_aux=True))(small_model.params(spec))
    return len(buckets), (features, grads)

  (num_buckets, bucketed), (one, padded) = encoded(0), encoded(100)
  assert (num_buckets, one) == (3, 1)
  chex.assert_trees_all_close(bucketed[0], padded[0], rtol=1e-5, atol=1e-5)
  largest = max(np.abs(g).max() for g in jax.tree.leaves(padded[1]))
  chex.assert_trees_all_close(bucketed[1], padded[1], rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize('router, changes', [('dense', dict(drop_path=.5)), ('token', dict(num_layers=1))])
def test_a_pair_has_no_random_draw_in_common(router, changes):
  # 32 pairs, and all texts on both sides are equal: only draws in common could tell a pair from its negatives.
  search = TaskType('search', (Segment('text'),), 'pair', 'cls', 'search')
  text, valid = jnp.tile(jnp.array([2, 3, 4]), (32, 1)), jnp.ones((32, 3), bool)
  fields = dict(id=jnp.arange(32, dtype=jnp.uint32), text=text, text_valid=valid, target=text, target_valid=valid)
  sides = InputSequence.of_inputs(search, fields), InputSequence.of_pairs(search, fields)
  equal = lambda x, y: np.isclose(x, y, rtol=1e-3, atol=1e-3).all((1, 2)).mean()
  spec = small_model.spec(router, noise_std=4., **changes)
  (inputs, texts), _ = small_model.run(spec, sides)
  assert equal(inputs, texts) == 1
  (inputs, texts), _ = small_model.run(spec, sides, jax.random.key(0))
  # By chance, two examples have the same branches of three layers dropped once in 2^6 times.
  assert equal(inputs, texts) < .2 and equal(inputs, np.roll(inputs, 1, axis=0)) < .2
  (same, _), _ = small_model.run(spec, sides, jax.random.key(0))
  assert equal(inputs, same) == 1


@pytest.mark.parametrize('shards', [1, 2])
def test_a_function_of_tokens_sees_all_arrays_at_once_and_each_gets_its_own_results(shards):
  rng, shapes = np.random.default_rng(0), ((2, 3), (4, 1), (2, 5))
  arrays = [(rng.normal(size=(*shape, 2)), rng.normal(size=shape)) for shape in shapes]
  calls = []

  def f(x):
    calls.append(x[1].shape)
    return x[0] * x[1][..., None]

  for (a, b), y in zip(arrays, map_joined(f, arrays, shards), strict=True):
    np.testing.assert_allclose(y, a * b[..., None], rtol=1e-6)
  assert calls == [(shards, 20 // shards)]


def test_arrays_that_do_not_divide_over_the_shards_stay_alone():
  arrays = [np.ones((3, 2)), np.ones((2, 2))]
  assert [y.shape for y in map_joined(lambda x: x, arrays, 2)] == [(3, 2), (2, 2)]
