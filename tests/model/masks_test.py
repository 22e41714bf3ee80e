"""Attention masks drawn by hand, and zero gradients through the whole encoder, each with a control."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from tests.helpers import small_model
from uni_moe_jax.model import masks
from uni_moe_jax.model.encoder import Encoder
from uni_moe_jax.model.sequences import EmbeddedSequence, Layout
from uni_moe_jax.tasks import task_types

_CAPTION, _VQA = ('full', 'two_stream'), ('full', 'full')


def _drawn(text: str) -> np.ndarray:
  """'10 / 11' → [[True, False], [True, True]]."""
  return np.array([[c == '1' for c in row.strip()] for row in text.split('/')])


class DrawnTest(parameterized.TestCase):

  def test_two_streams_of_three_words(self):
    # Columns: words 0 1 2, queries 0 1 2. Rows: the same.
    np.testing.assert_array_equal(masks.two_stream(3), _drawn('100000/110000/111000/000100/100010/110001'))

  def test_causal(self):
    np.testing.assert_array_equal(masks.causal(3), _drawn('100/110/111'))

  @parameterized.parameters(
      (_CAPTION, 0, (0,)), (_CAPTION, 1, (0, 1)), (_VQA, 0, (0, 1)), (_VQA, 1, (0, 1)), (('causal',), 0, (0,)))
  def test_visible_segments(self, mask_types, index, visible):
    self.assertEqual(masks.visible_segments(mask_types, index), visible)


class AttentionMaskTest(absltest.TestCase):

  def _rows(self, *args, **kwargs):
    return np.asarray(masks.attention_mask(*args, **kwargs)).astype(int)

  def test_a_full_segment_without_padding_needs_no_mask(self):
    self.assertIsNone(masks.attention_mask(_VQA, 0, (5, 3), (None, None)))

  def test_a_caption_sees_the_image_and_its_own_past(self):
    mask = self._rows(_CAPTION, 1, (2, 4), (None, None))
    np.testing.assert_array_equal(mask[0, 0], _drawn('111000/111100/110010/111001').astype(int))

  def test_queries_only_are_the_lower_half(self):
    full = self._rows(_CAPTION, 1, (2, 4), (None, None))
    half = self._rows(_CAPTION, 1, (2, 4), (None, None), queries_only=True)
    np.testing.assert_array_equal(half, full[:, :, 2:])

  def test_padding_is_masked(self):
    # Two examples; the second has one word of two.
    valid = jnp.array([[True, True], [True, False]])
    mask = self._rows(_VQA, 0, (2, 2), (None, valid))
    np.testing.assert_array_equal(mask[:, 0, 0], [[1, 1, 1, 1], [1, 1, 1, 0]])

  def test_padding_and_structure_combine(self):
    valid = jnp.array([[True, False, True, False]])
    mask = self._rows(_CAPTION, 1, (1, 4), (None, valid))
    np.testing.assert_array_equal(mask[0, 0], _drawn('11000/11000/10010/11000').astype(int))


@functools.cache
def _influence_of(layout: Layout):
  spec = small_model.spec('dense')  # masks do not depend on the router, and less is compiled
  values = small_model.params(spec)['encoder']
  weights = jnp.asarray(np.random.default_rng(5).normal(size=spec.width), jnp.float32)

  @small_model.jit
  def influence(arrays, valid):
    splits = np.cumsum([a.shape[1] for a in arrays])[:-1]

    def outputs(joined):
      tokens, positions = tuple(jnp.split(joined, splits, axis=1)), jnp.zeros((1, 1), jnp.int32)
      sequence = EmbeddedSequence(tokens, valid, positions, jnp.zeros(1, jnp.uint32), layout)
      _, collected = Encoder(spec).apply({'params': values}, (sequence,), (None,), all_rows=True, taps=True)
      return jnp.concatenate(collected['tail'][-1]['taps'][0], axis=1)[0] @ weights  # [S]

    return jnp.linalg.norm(jax.jacrev(outputs)(jnp.concatenate(arrays, axis=1))[:, 0], axis=-1)

  return influence


def _influence(task_type: str, lengths: tuple[int, ...], padded: tuple[int, ...] = ()) -> np.ndarray:
  """How much each token after the encoder depends on each token before it: gradient norms [S, S].

  Args:
    task_type: its layout is encoded by three layers.
    lengths: tokens per segment.
    padded: tokens of the last segment that are padding.
  """
  rng = np.random.default_rng(0)
  arrays = tuple(jnp.asarray(rng.normal(size=(1, n, 16)), jnp.float32) for n in lengths)
  last = jnp.asarray([[i not in padded for i in range(lengths[-1])]])
  layout = Layout.of_task_type(task_types.TASK_TYPES[task_type])
  return np.asarray(_influence_of(layout)(arrays, (None,) * (len(lengths) - 1) + (last,)))


class CaptionGradientsTest(parameterized.TestCase):

  _IMAGE = range(0, 3)
  _WORD = (3, 4, 5)
  _QUERY = (6, 7, 8)

  @functools.cached_property
  def influence(self):
    return _influence('image_caption', (3, 6))

  @parameterized.parameters(0, 1, 2)
  def test_query_i_does_not_depend_on_words_from_i_on(self, i):
    np.testing.assert_array_equal(self.influence[self._QUERY[i], self._WORD[i]:self._WORD[-1] + 1], 0)

  @parameterized.parameters(1, 2)
  def test_query_i_depends_on_every_word_before_i(self, i):
    self.assertGreater(self.influence[self._QUERY[i], self._WORD[0]:self._WORD[i]].min(), 1e-3)

  @parameterized.parameters(0, 1, 2)
  def test_query_i_depends_on_every_token_of_the_image(self, i):
    self.assertGreater(self.influence[self._QUERY[i], self._IMAGE].min(), 1e-3)

  def test_a_query_depends_on_itself_and_on_no_other_query(self):
    block = self.influence[np.ix_(self._QUERY, self._QUERY)]
    np.testing.assert_array_equal(block > 0, np.eye(3, dtype=bool))
    self.assertGreater(block.diagonal().min(), 1e-3)

  @parameterized.parameters(0, 1, 2)
  def test_word_i_does_not_depend_on_later_words(self, i):
    np.testing.assert_array_equal(self.influence[self._WORD[i], self._WORD[i] + 1:self._WORD[-1] + 1], 0)

  @parameterized.parameters(0, 1, 2)
  def test_word_i_depends_on_words_up_to_i_and_on_the_image(self, i):
    seen = (*self._IMAGE, *self._WORD[:i + 1])
    self.assertGreater(self.influence[self._WORD[i], seen].min(), 1e-3)

  def test_words_do_not_depend_on_queries(self):
    np.testing.assert_array_equal(self.influence[np.ix_(self._WORD, self._QUERY)], 0)

  def test_the_image_does_not_depend_on_the_text(self):
    np.testing.assert_array_equal(self.influence[:3, 3:], 0)

  def test_the_image_depends_on_all_of_itself(self):
    self.assertGreater(self.influence[:3, :3].min(), 1e-3)


class QuestionGradientsTest(absltest.TestCase):

  def test_image_and_question_depend_on_each_other(self):
    self.assertGreater(_influence('vqa', (3, 4)).min(), 1e-3)


class PaddingGradientsTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('text', 'text_mlm', (5,), 0), ('question', 'vqa', (3, 4), 3), ('caption', 'image_caption', (3, 6), 3))
  def test_real_tokens_do_not_depend_on_padding(self, task_type, lengths, start):
    # A caption is padded as a word and as its query.
    padded = (1, 4) if task_type == 'image_caption' else (lengths[-1] - 1,)
    at = [start + p for p in padded]
    real = [i for i in range(sum(lengths)) if i not in at]
    np.testing.assert_array_equal(_influence(task_type, lengths, padded)[np.ix_(real, at)], 0)

  @parameterized.named_parameters(
      ('text', 'text_mlm', (5,), 0, 4), ('question', 'vqa', (3, 4), 0, 6), ('caption', 'image_caption', (3, 6), -1, 4))
  def test_the_same_token_matters_when_it_is_real(self, task_type, lengths, to, at):
    # To the prefix, or to the caption's last query.
    self.assertGreater(_influence(task_type, lengths)[to, at], 1e-3)


if __name__ == '__main__':
  absltest.main()
