"""Attention masks drawn by hand, and zero gradients through the whole encoder, each with a control."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.model import masks
from uni_moe_jax.model.encoder import Encoder
from uni_moe_jax.model.sequences import EmbeddedSequence, Layout
from uni_moe_jax.tasks import task_types

_CAPTION, _VQA = ('full', 'two_stream'), ('full', 'full')


def _drawn(text: str) -> np.ndarray:
  """'10 / 11' → [[True, False], [True, True]]."""
  return np.array([[c == '1' for c in row.strip()] for row in text.split('/')])


def test_two_streams_and_a_causal_mask_of_three_words():
  # Columns: words 0 1 2, queries 0 1 2. Rows: the same.
  np.testing.assert_array_equal(masks.two_stream(3), _drawn('100000/110000/111000/000100/100010/110001'))
  np.testing.assert_array_equal(masks.causal(3), _drawn('100/110/111'))


@pytest.mark.parametrize('mask_types, index, visible', [
    (_CAPTION, 0, (0,)), (_CAPTION, 1, (0, 1)), (_VQA, 0, (0, 1)), (_VQA, 1, (0, 1)), (('causal',), 0, (0,))])
def test_visible_segments(mask_types, index, visible):
  assert masks.visible_segments(mask_types, index) == visible


def _rows(*args, **kwargs):
  return np.asarray(masks.attention_mask(*args, **kwargs)).astype(int)


def test_a_full_segment_without_padding_needs_no_mask():
  assert masks.attention_mask(_VQA, 0, (5, 3), (None, None)) is None


@pytest.mark.parametrize('lengths, valid, drawn', [
    ((2, 4), None, '111000/111100/110010/111001'),
    ((1, 4), jnp.array([[True, False, True, False]]), '11000/11000/10010/11000')], ids=['whole', 'padded'])
def test_a_caption_sees_the_image_and_its_own_past_without_padding(lengths, valid, drawn):
  np.testing.assert_array_equal(_rows(_CAPTION, 1, lengths, (None, valid))[0, 0], _drawn(drawn).astype(int))


def test_queries_only_are_the_lower_half():
  full = _rows(_CAPTION, 1, (2, 4), (None, None))
  half = _rows(_CAPTION, 1, (2, 4), (None, None), queries_only=True)
  np.testing.assert_array_equal(half, full[:, :, 2:])


def test_padding_is_masked():
  # Two examples; the second has one word of two.
  valid = jnp.array([[True, True], [True, False]])
  mask = _rows(_VQA, 0, (2, 2), (None, valid))
  np.testing.assert_array_equal(mask[:, 0, 0], [[1, 1, 1, 1], [1, 1, 1, 0]])


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


_IMAGE, _WORD, _QUERY = range(0, 3), range(3, 6), range(6, 9)


@functools.cache
def _caption():
  return _influence('image_caption', (3, 6))


@pytest.mark.parametrize('i', [0, 1, 2])
def test_query_i_depends_on_the_image_and_on_words_before_i_alone(i):
  of_query = _caption()[_QUERY[i]]
  np.testing.assert_array_equal(of_query[_WORD[i:]], 0)
  assert of_query[[*_IMAGE, *_WORD[:i]]].min() > 1e-3


@pytest.mark.parametrize('i', [0, 1, 2])
def test_word_i_depends_on_the_image_and_on_words_up_to_i_alone(i):
  of_word = _caption()[_WORD[i]]
  np.testing.assert_array_equal(of_word[_WORD[i + 1:]], 0)
  assert of_word[[*_IMAGE, *_WORD[:i + 1]]].min() > 1e-3


def test_a_query_depends_on_itself_and_on_no_other_query_and_words_on_none():
  block = _caption()[np.ix_(_QUERY, _QUERY)]
  np.testing.assert_array_equal(block > 0, np.eye(3, dtype=bool))
  assert block.diagonal().min() > 1e-3
  np.testing.assert_array_equal(_caption()[np.ix_(_WORD, _QUERY)], 0)


def test_an_image_depends_on_all_of_itself_and_on_a_question_but_not_on_a_caption():
  np.testing.assert_array_equal(_caption()[:3, 3:], 0)
  assert _caption()[:3, :3].min() > 1e-3
  assert _influence('vqa', (3, 4)).min() > 1e-3  # all of both on all of both


@pytest.mark.parametrize('task_type, lengths, start', [
    ('text_mlm', (5,), 0), ('vqa', (3, 4), 3), ('image_caption', (3, 6), 3)])
def test_real_tokens_do_not_depend_on_padding(task_type, lengths, start):
  # A caption is padded as a word and as its query.
  padded = (1, 4) if task_type == 'image_caption' else (lengths[-1] - 1,)
  at = [start + p for p in padded]
  real = [i for i in range(sum(lengths)) if i not in at]
  np.testing.assert_array_equal(_influence(task_type, lengths, padded)[np.ix_(real, at)], 0)


@pytest.mark.parametrize('task_type, lengths, to, at', [
    ('text_mlm', (5,), 0, 4), ('vqa', (3, 4), 0, 6), ('image_caption', (3, 6), -1, 4)])
def test_the_same_token_matters_when_it_is_real(task_type, lengths, to, at):
  # To the prefix, or to the caption's last query.
  assert _influence(task_type, lengths)[to, at] > 1e-3
