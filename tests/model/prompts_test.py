"""Prompts: deep, prefix and label prompts, the bias of `spe`, and a linear head that starts at zero."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.model import decoding
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.sequences import InputSequence
from uni_moe_jax.model.uni_perceiver import UniPerceiver, init_params
from uni_moe_jax.tasks import task_types
from uni_moe_jax.utils.tree_paths import by_path

_P = 2
_TASK_TYPES = ('image_classification', 'image_caption', 'text_mlm')


def _spec(**changes):
  return small_model.spec(num_deep_prompts=_P, spe_bias=True, **changes)


def _sequences():
  return (*(small_model.sequence(k, seed=i) for i, k in enumerate(_TASK_TYPES)),
          small_model.target(task_types.families()['names']))


def _features(spec, values=None):
  return small_model.run(spec, _sequences(), values=values)[0]


@functools.cache
def _weighted_gradient(spec):
  """(parameters, weights [sequences]) → gradient of a weighted sum over sequences."""
  def total(values, weights):
    features = small_model.encode(spec, _sequences(), values=values)[0]
    return sum(w * jnp.sin(3 * rows).sum() for w, rows in zip(weights, features, strict=True))
  return small_model.jit(jax.grad(total))


@functools.cache
def _gradient(spec, index: int):
  """Gradient of one sequence's features by all parameters, by path."""
  gradient = _weighted_gradient(spec)(small_model.params(spec), np.eye(len(_sequences()), dtype=np.float32)[index])
  return jax.tree.map(np.asarray, by_path(gradient))


def test_prompts_change_no_shape():
  with_, without = _features(_spec()), _features(small_model.spec(num_layers=1))
  assert [f.shape for f in with_] == [f.shape for f in without]


def test_prompts_of_inputs_alone_leave_targets_as_they_are():
  plain = small_model.spec(num_layers=1)
  spec = dataclasses.replace(plain, num_deep_prompts=_P, prompt_sharing='inputs')
  with_, without = _features(spec), _features(plain)
  np.testing.assert_array_equal(with_[3], without[3])
  for i in range(len(_TASK_TYPES)):
    assert np.abs(with_[i] - without[i]).max() > 1e-2


@pytest.mark.parametrize('sides, same', [('shared', True), ('separate', False), ('inputs', False)])
def test_texts_of_both_sides_share_their_products_only_where_they_share_prompts(sides, same):
  # A dense model has no conditions: only the side of a text determines its prompts.
  search = task_types.TaskType('search', (task_types.Segment('text'),), 'pair', 'cls', 'search')
  text = small_model.sequence(search)
  sequences = (text, text.replace(layout=small_model.target(search.pair_condition).layout))
  spec = small_model.spec('dense', num_deep_prompts=_P, prompt_sharing=sides)
  one, other = small_model.run(spec, sequences)[0]
  assert np.allclose(one, other, atol=1e-5) == same


@pytest.mark.parametrize('index', range(len(_TASK_TYPES) + 1))
def test_every_sequence_attends_to_every_row_of_every_layer(index):
  rows = [g for path, g in _gradient(_spec(), index).items() if 'prompts/input' in path]
  assert len(rows) == 2  # scanned layers, and the tail
  for g in rows:
    assert np.abs(g).max(-1).min() > 1e-6


def test_separate_prompts_serve_one_side_each():
  spec = _spec(prompt_sharing='separate', num_layers=1)
  for index, own, other in ((0, 'input', 'target'), (3, 'target', 'input')):
    gradient = _gradient(spec, index)
    for path, g in gradient.items():
      if f'prompts/{own}' in path:
        assert np.abs(g).min(-1).max() > 1e-8, path
      if f'prompts/{other}' in path:
        assert np.abs(g).max() == 0, path


def test_the_condition_of_prompts_is_that_of_the_first_segment():
  # Of a caption's two conditions, prompts have the image's, also in a decoding step, which has no image.
  layout = small_model.sequence('image_caption').layout
  assert layout.prompt_condition == layout.conditions[0]
  step = decoding.step_layout(task_types.TASK_TYPES['image_caption'])
  assert step.prompt_condition == layout.conditions[0]
  assert layout.conditions[0] != layout.conditions[1]


@functools.cache
def _embedded(prefix: int, sides: str = 'separate'):
  """Embedded sequences, of `_sequences` and of a question about an image."""
  spec = small_model.spec(num_layers=1, num_prefix_prompts=prefix, prompt_sharing=sides)
  _, collected = small_model.run(spec, (*_sequences(), small_model.sequence('vqa')), taps=True)
  return jax.device_get(collected['sequences']), small_model.params(spec)


@pytest.mark.parametrize('i', range(len(_TASK_TYPES) + 2))
def test_prefix_prompts_are_between_spe_and_the_first_segment(i):
  (with_, values), (without, _) = _embedded(3), _embedded(0)
  new, old = with_[i].segments, without[i].segments
  np.testing.assert_array_equal(new[0][:, :1], old[0][:, :1])
  rows = values['embed']['prompts']['target' if i == 3 else 'input']
  np.testing.assert_array_equal(new[0][:, 1:4], np.broadcast_to(rows, (2, 3, 16)))
  np.testing.assert_array_equal(new[0][:, 4:], old[0][:, 1:])
  for a, b in zip(new[1:], old[1:], strict=True):
    np.testing.assert_array_equal(a, b)  # the second segment has none


def test_prefix_prompts_are_valid_keys_and_padding_moves_with_its_text():
  valid = jnp.array([[1, 1, 0], [1, 0, 0]], bool)
  text = small_model.target(task_types.families()['names']).replace(text_valid=valid)
  _, collected = small_model.run(small_model.spec(num_prefix_prompts=2), [text], taps=True)
  np.testing.assert_array_equal(collected['sequences'][0].valid[0], [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])


def test_readout_positions_move_in_the_first_segment_only():
  (with_, _), (without, _) = _embedded(3), _embedded(0)
  mlm, question = 2, 4
  np.testing.assert_array_equal(with_[mlm].readout_positions, without[mlm].readout_positions + 3)
  np.testing.assert_array_equal(with_[question].readout_positions, without[question].readout_positions)
  for i, array in ((mlm, 0), (question, 1)):
    chosen = [np.take_along_axis(s[i].segments[array], s[i].readout_positions[..., None], axis=1)
              for s in (with_, without)]
    np.testing.assert_array_equal(*chosen)


@pytest.mark.parametrize('sides, tables', [
    ('shared', {'input'}), ('separate', {'input', 'target'}), ('inputs', {'input'})])
def test_each_side_reads_its_table_of_prefix_prompts(sides, tables):
  embedded, values = _embedded(3, sides)
  assert set(values['embed']['prompts']) == tables
  rows = values['embed']['prompts']['target' if sides == 'separate' else 'input']
  assert embedded[3].segments[0].shape[1] == 1 + small_model.WORDS + (0 if sides == 'inputs' else 3)
  assert np.array_equal(embedded[3].segments[0][0, 1:4], rows) == (sides != 'inputs')


@pytest.mark.nightly
def test_the_rows_that_are_read_are_the_same_when_all_are_computed():
  spec = small_model.spec(num_deep_prompts=_P, num_prefix_prompts=3, spe_bias=True)
  sequences = (*_sequences(), small_model.sequence('vqa'))
  every, some = (small_model.run(spec, sequences, all_rows=a)[0] for a in (True, False))
  chex.assert_trees_all_close(every, some, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('index', range(len(_TASK_TYPES) + 1))
def test_every_prefix_prompt_moves_every_readout(index):
  rows = _gradient(small_model.spec(num_layers=1, num_prefix_prompts=3), index)['embed/prompts/input']
  assert np.abs(rows).max(-1).min() > 1e-6


# Five entries in two buckets: rows are entries 1, 3, then 4, 0, 2.
_ENTRIES, _ORDER = 5, np.array([3, 0, 4, 1, 2], np.int32)


def _label_spec(entries: int = _ENTRIES):
  return small_model.spec(num_layers=1, label_prompts=(('names', entries), ('others', 2)), num_prefix_prompts=1)


def _buckets(seed: int = 0, lengths=((2, 3), (3, 4))):
  rng = np.random.default_rng(seed)
  return tuple(
      {'text': rng.integers(2, small_model.VOCABULARY, (n, s)).astype(np.int32), 'valid': np.ones((n, s), bool)}
      for n, s in lengths)


def _entries(spec, values, labelled: bool = True):
  """Features [V, D] of the set's entries, in their order."""
  sequences = InputSequence.of_buckets('names', task_types.families()['names'], _buckets(), _ORDER, labelled)
  return np.concatenate([f[:, 0] for f in small_model.run(spec, sequences, values=values)[0]])[_ORDER]


def _with_labels(values, table):
  prompts = {**values['embed']['prompts'], 'label_names': jnp.asarray(table, jnp.float32)}
  return {**values, 'embed': {**values['embed'], 'prompts': prompts}}


@pytest.mark.parametrize('entry', range(_ENTRIES))
def test_the_prompt_of_a_class_moves_the_feature_of_this_class_alone(entry):
  values = small_model.params(_label_spec())
  table = values['embed']['prompts']['label_names']
  before = _entries(_label_spec(), values)
  after = _entries(_label_spec(), _with_labels(values, table.at[entry].multiply(-2.)))
  others = np.arange(_ENTRIES) != entry
  np.testing.assert_array_equal(before[others], after[others])
  assert np.abs(before[entry] - after[entry]).max() > 1e-2


def test_a_label_prompt_follows_spe_in_every_row_of_its_entry():
  spec, values = _label_spec(), small_model.params(_label_spec())
  actual = InputSequence.of_buckets('names', task_types.families()['names'], _buckets(), _ORDER, True)
  _, collected = small_model.run(spec, actual, taps=True)
  table, prefix = values['embed']['prompts']['label_names'], values['embed']['prompts']['input']
  for sequence, entries in zip(collected['sequences'], ([1, 3], [4, 0, 2]), strict=True):
    np.testing.assert_array_equal(sequence.segments[0][:, 1], table[jnp.array(entries)])
    np.testing.assert_array_equal(sequence.segments[0][:, 2], jnp.broadcast_to(prefix, (len(entries), 16)))
    assert np.asarray(sequence.valid[0]).all()


def test_fresh_label_prompts_are_zero_and_hardly_move_a_feature():
  # LayerScale as published: what one key more changes in attention is small beside the words themselves.
  spec = dataclasses.replace(_label_spec(), layer_scale_init=1e-3)
  values = small_model.jit(lambda: init_params(UniPerceiver(spec), jax.random.key(0)))()
  assert not np.asarray(values['embed']['prompts']['label_names']).any()
  fresh, plain = _entries(spec, values), _entries(spec, values, False)
  cosine = np.asarray((normalize(fresh) * normalize(plain)).sum(-1))
  assert cosine.min() > 1 - 1e-5
  assert np.abs(fresh - plain).max() > 0  # but it is a key


def test_entries_of_one_text_have_one_feature_until_their_prompts_differ():
  texts = ({'text': np.array([[5, 6, 7]] * 3, np.int32), 'valid': np.ones((3, 3), bool)},)
  spec = _label_spec(3)
  actual = InputSequence.of_buckets('names', task_types.families()['names'], texts, np.arange(3), True)
  run = lambda v: np.asarray(small_model.run(spec, actual, values=v)[0][0][:, 0])
  values, zero = small_model.params(spec), np.zeros((3, 16), np.float32)
  same = run(_with_labels(values, zero))
  np.testing.assert_allclose(same, same[:1].repeat(3, 0), atol=1e-6)
  zero[1] = np.linspace(-1, 1, 16)
  assert np.abs(run(_with_labels(values, zero))[1] - same[1]).max() > 1e-2


def test_spe_bias_moves_the_prefix_of_every_sequence_as_another_word_would():
  spec = _spec()
  values = small_model.params(spec)
  bias = values['embed']['spe_bias']
  moved = {**values, 'embed': {**values['embed'], 'spe_bias': jnp.zeros_like(bias),
                               'word': values['embed']['word'].at[small_model.SPE].add(bias)}}
  chex.assert_trees_all_close(_features(spec), _features(spec, moved), rtol=1e-5, atol=1e-5)
  moved['embed']['word'] = values['embed']['word']
  assert np.abs(_features(spec)[0] - _features(spec, moved)[0]).max() > 1e-2


def test_a_fresh_head_changes_no_logit():
  model = UniPerceiver(small_model.spec(head=3))
  features, logits = jnp.ones((2, 1, 16)), jnp.arange(6.).reshape(2, 1, 3)
  values = model.init(jax.random.key(0), features, logits, method='with_head')
  np.testing.assert_array_equal(model.apply(values, features, logits, method='with_head'), logits)


def test_a_linear_head_adds_to_weighted_similarity_by_hand():
  # 2 · 5 + (1, 2) · (10, 100) + 7
  head = {'kernel': jnp.array([[10.], [100.]]), 'bias': jnp.array([7.]), 'similarity_weight': jnp.float32(2.)}
  model = UniPerceiver(small_model.spec(head=1, width=2, num_heads=1, temperature_groups=()))
  features, logits = jnp.array([[[1., 2.]]]), jnp.array([[[5.]]])
  actual = model.apply({'params': {'linear_head': head}}, features, logits, method='with_head')
  np.testing.assert_allclose(actual, [[[227.]]])
