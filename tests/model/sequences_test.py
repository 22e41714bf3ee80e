"""Layouts of task types, rows to read, and sequences that are joined and split again."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from tests.helpers import small_model
from uni_moe_jax.model import uni_perceiver
from uni_moe_jax.model.sequences import READ_NOTHING, EmbeddedSequence, Layout, join_equal, take_readout
from uni_moe_jax.tasks import task_types
from uni_moe_jax.tasks.task_types import Segment, TaskType

_TEXT = Layout.of_task_type(task_types.TASK_TYPES['text_mlm'])


class LayoutTest(parameterized.TestCase):

  @parameterized.parameters(
      ('image_classification', ('visual',), 0), ('text_mlm', ('text',), 0), ('text_classification', ('text',), 0),
      ('image_caption', ('visual', 'text'), 1), ('vqa', ('visual', 'text'), 1))
  def test_the_layout_of_a_task_type(self, name, modalities, readout_segment):
    layout = Layout.of_task_type(task_types.TASK_TYPES[name])
    self.assertEqual(layout.modalities, modalities)
    self.assertEqual(layout.readout_segment, readout_segment)
    self.assertEqual(layout.conditions, task_types.TASK_TYPES[name].conditions)
    self.assertTrue(layout.prefixed)

  def test_a_target_text_is_read_at_its_prefix(self):
    layout = Layout.of_text(task_types.families()['words'])
    self.assertEqual((layout.masks, layout.readout, layout.readout_segment), (('full',), 'cls', 0))

  def test_a_prefill_reads_nothing(self):
    self.assertIsNone(Layout((), (), READ_NOTHING).readout_segment)


class TakeReadoutTest(absltest.TestCase):

  # Token s of example b is 10 b + s.
  _X = jnp.arange(2)[:, None, None] * 10 + jnp.arange(6)[None, :, None]

  def test_cls_is_token_zero(self):
    np.testing.assert_array_equal(take_readout(self._X, 'cls', None)[..., 0], [[0], [10]])

  def test_queries_are_the_second_half(self):
    np.testing.assert_array_equal(take_readout(self._X, 'queries', None)[..., 0], [[3, 4, 5], [13, 14, 15]])

  def test_masked_rows_are_at_the_positions_of_each_example(self):
    positions = jnp.array([[5, 1, 1], [0, 2, 4]])
    np.testing.assert_array_equal(take_readout(self._X, 'masked', positions)[..., 0], [[5, 1, 1], [10, 12, 14]])

  def test_a_slot_is_one_position(self):
    np.testing.assert_array_equal(take_readout(self._X, 'slot', jnp.array([[2], [3]]))[..., 0], [[2], [13]])


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


class JoinTest(parameterized.TestCase):

  def test_equal_sequences_become_one(self):
    joined, _ = join_equal((_embedded(0, 2), _embedded(10, 3)), ('a', 'a'), shards=1)
    self.assertEqual([_numbers(s) for s in joined], [[0, 1, 10, 11, 12]])

  def test_every_shard_keeps_its_own_rows(self):
    # Shards of the first: (0, 1), (2, 3); of the second: 10, 11.
    joined, _ = join_equal((_embedded(0, 4), _embedded(10, 2)), ('a', 'a'), shards=2)
    self.assertEqual([_numbers(s) for s in joined], [[0, 1, 10, 2, 3, 11]])

  def test_all_leaves_are_joined(self):
    joined, _ = join_equal((_embedded(0, 4), _embedded(10, 2)), ('a', 'a'), shards=2)
    np.testing.assert_array_equal(joined[0].segments[0][:, 1, 2], [0, 1, 10, 2, 3, 11])

  @parameterized.parameters(1, 2)
  def test_results_come_back_in_the_original_order(self, shards):
    sequences = (_embedded(0, 4), _embedded(50, 2, tokens=5), _embedded(10, 2), _embedded(20, 6))
    joined, split = join_equal(sequences, ('a', 'a', 'a', 'a'), shards)
    self.assertLen(joined, 2)
    for sequence, result in zip(sequences, split([s.segments[0] for s in joined]), strict=True):
      np.testing.assert_array_equal(result, sequence.segments[0])

  def test_a_result_may_be_a_tree_with_none(self):
    _, split = join_equal((_embedded(0, 2), _embedded(10, 2)), ('a', 'a'), shards=1)
    rows = split([{'rows': jnp.arange(4), 'none': None}])
    np.testing.assert_array_equal(rows[1]['rows'], [2, 3])
    self.assertIsNone(rows[1]['none'])

  @parameterized.named_parameters(
      ('key', {}, {}, 'b'), ('length', {}, dict(tokens=3), 'a'), ('padding', {}, dict(padded=True), 'a'),
      ('masked', dict(masked=1), dict(masked=2), 'a'), ('readout', {}, dict(masked=2), 'a'))
  def test_different_sequences_stay_separate(self, one, other, key):
    joined, _ = join_equal((_embedded(0, 2, **one), _embedded(10, 2, **other)), ('a', key), shards=1)
    self.assertEqual([_numbers(s) for s in joined], [[0, 1], [10, 11]])

  def test_a_batch_that_does_not_divide_stays_alone(self):
    sequences = (_embedded(0, 3), _embedded(10, 2), _embedded(20, 2))
    joined, split = join_equal(sequences, ('a', 'a', 'a'), shards=2)
    self.assertEqual([_numbers(s) for s in joined], [[0, 1, 2], [10, 20, 11, 21]])
    self.assertEqual([r.tolist() for r in split([s.ids for s in joined])], [[0, 1, 2], [10, 11], [20, 21]])


class ModelJoinsTest(parameterized.TestCase):

  def _count_joined(self, router: str, *sequences) -> int:
    """Number of sequences that the encoder gets after joining."""
    counts = []

    def spy(*args):
      joined, split = join_equal(*args)
      counts.append(len(joined))
      return joined, split

    with absltest.mock.patch.object(uni_perceiver, 'join_equal', spy):
      jax.eval_shape(lambda: small_model.encode(small_model.spec(router), sequences)[0])
    return counts[-1]  # init may have come before

  # The two images have the same attributes and modality, but two tasks.
  @parameterized.parameters(('attribute', 1), ('modality', 1), ('dense', 1), ('task', 2))
  def test_sequences_with_one_router_input_share_their_products(self, router, count):
    images = small_model.sequence('image_classification'), small_model.sequence('image_retrieval')
    self.assertEqual(self._count_joined(router, *images), count)

  # An image and a text, each with its prefix, have five tokens.
  @parameterized.parameters(('attribute', 2), ('modality', 2), ('task', 2), ('dense', 1))
  def test_an_image_and_a_text_of_one_length_share_theirs_in_a_dense_model_only(self, router, count):
    names = small_model.target(task_types.families()['names'], words=4).replace(text_valid=None)
    self.assertEqual(self._count_joined(router, small_model.sequence('image_classification'), names), count)

  def test_the_model_joins_within_the_shards_of_its_batches(self):
    with absltest.mock.patch.object(uni_perceiver, 'join_equal', wraps=join_equal) as spy:
      sequence = small_model.sequence('text_mlm')
      jax.eval_shape(lambda: small_model.encode(small_model.spec('dense'), [sequence], shards=2)[0])
    self.assertEqual(spy.call_args.args[2], 2)

  def test_sequences_with_different_readout_segments_stay_separate(self):
    # [spe, image] [question] and [spe, question] [image], of equal shapes.
    swapped = TaskType('swapped', (Segment('text'), Segment('visual')), 'words', 'slot', 'vqa')
    sequences = [small_model.sequence(k, words=4, text_valid=None) for k in ('vqa', swapped)]
    self.assertEqual(self._count_joined('dense', *sequences), 2)


if __name__ == '__main__':
  absltest.main()
