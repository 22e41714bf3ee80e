"""Prompts: extra keys that every token sees and that are no tokens, a bias of `spe`, a head that starts at nothing."""

import functools

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from tests import small_model
from uni_moe_jax import tasks
from uni_moe_jax.model import decode
from uni_moe_jax.model.similarity import normalise
from uni_moe_jax.model.uni_perceiver import UniPerceiver

_P = 2
_KINDS = ('image_classification', 'image_caption', 'text_mlm')


def _spec(**changes):
  return small_model.spec(prompts=_P, spe_bias=True, **changes)


def _sequences():
  return (*(small_model.sequence(k, seed=i) for i, k in enumerate(_KINDS)), small_model.target(tasks.families()['names']))


@functools.cache
def _features(spec):
  return small_model.jit(lambda values: small_model.encode(spec, _sequences(), values=values)[0])


@functools.cache
def _gradient(spec, stream: int):
  """Gradient of one sequence's features with respect to all parameters, as paths."""
  def total(values):
    return (jnp.sin(3 * small_model.encode(spec, _sequences(), values=values)[0][stream])).sum()
  gradient = small_model.jit(jax.grad(total))(small_model.params(spec))
  return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)}


class DeepPromptsTest(parameterized.TestCase):

  def test_prompts_change_no_shape(self):
    with_, without = _features(_spec())(small_model.params(_spec())), _features(small_model.spec())(
        small_model.params(small_model.spec()))
    self.assertEqual([f.shape for f in with_], [f.shape for f in without])

  @parameterized.parameters(*range(len(_KINDS) + 1))
  def test_every_sequence_looks_at_every_row_of_every_layer(self, stream):
    rows = [g for path, g in _gradient(_spec(), stream).items() if 'prompts/input' in path]
    self.assertLen(rows, 2)  # scanned layers, and the tail
    for g in rows:
      self.assertGreater(np.abs(g).max(-1).min(), 1e-6)

  def test_separate_prompts_serve_one_side_each(self):
    spec = _spec(prompt_sides='separate')
    for stream, own, other in ((0, 'input', 'target'), (3, 'target', 'input')):
      gradient = _gradient(spec, stream)
      for path, g in gradient.items():
        if f'prompts/{own}' in path:
          self.assertGreater(np.abs(g).min(-1).max(), 1e-8, path)
        if f'prompts/{other}' in path:
          self.assertEqual(np.abs(g).max(), 0, path)

  def test_the_condition_of_prompts_is_that_of_the_first_segment(self):
    # Of a caption's two conditions, prompts take the picture's: with it alone in the experts' choice they still move it.
    layout = small_model.sequence('image_caption').layout
    self.assertEqual(layout.prompt_condition, layout.conditions[0])
    self.assertEqual(decode.pass_layout(tasks.KINDS['image_caption']).prompt_condition, layout.conditions[0])
    self.assertNotEqual(layout.conditions[0], layout.conditions[1])


class SpeBiasTest(absltest.TestCase):

  def test_it_moves_the_prefix_of_every_sequence_as_another_word_would(self):
    spec = _spec()
    values = small_model.params(spec)
    bias = values['embed']['spe_bias']
    moved = jax.tree.map(lambda x: x, values)
    moved['embed'] = {**values['embed'], 'spe_bias': jnp.zeros_like(bias),
                      'word': values['embed']['word'].at[small_model.SPE].add(bias)}
    for a, b in zip(_features(spec)(values), _features(spec)(moved)):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    moved['embed']['word'] = values['embed']['word']
    self.assertGreater(np.abs(_features(spec)(values)[0] - _features(spec)(moved)[0]).max(), 1e-2)


class LinearHeadTest(absltest.TestCase):

  def test_a_fresh_head_changes_no_logit(self):
    model = UniPerceiver(small_model.spec(head=3))
    features, logits = jnp.ones((2, 1, 16)), jnp.arange(6.).reshape(2, 1, 3)
    values = model.init(jax.random.key(0), (small_model.sequence('text_classification', batch=1),))
    np.testing.assert_array_equal(model.apply(values, features, logits, method='with_head'), logits)

  def test_it_adds_to_weighted_similarity_by_hand(self):
    # 2 · 5 + (1, 2) · (10, 100) + 7
    head = {'kernel': jnp.array([[10.], [100.]]), 'bias': jnp.array([7.]), 'similarity_weight': jnp.float32(2.)}
    model = UniPerceiver(small_model.spec(head=1, width=2, heads=1, temperatures=()))
    found = model.apply({'params': {'linear_head': head}}, jnp.array([[[1., 2.]]]), jnp.array([[[5.]]]), method='with_head')
    np.testing.assert_allclose(found, [[[227.]]])


class DecodingTest(absltest.TestCase):

  def test_cached_decoding_with_prompts_is_the_forward_of_training(self):
    spec, kind = _spec(), tasks.KINDS['image_caption']
    values, length = small_model.params(spec), 4
    pixels = small_model.sequence(kind, 2, seed=1).pixels
    words = normalise(jnp.asarray(np.random.default_rng(0).normal(size=(small_model.VOCABULARY, 16)), jnp.float32))

    @small_model.jit
    def both(values):
      found = decode.search(UniPerceiver(spec), values, kind, pixels, words, temperature='group',
                            spe=small_model.SPE, eot=-1, length=length)
      tokens, log_p = found.tokens[:, 0], found.log_p[:, 0]
      text = jnp.concatenate([tokens, jnp.full_like(tokens, small_model.SPE)], axis=1)
      features, = small_model.encode(spec, [small_model.sequence(kind, 2, pixels=pixels, text=text)], values=values)[0]
      scale = UniPerceiver(spec).apply({'params': values}, 'group', method='scale')
      all_p = jax.nn.log_softmax(scale * normalise(features) @ words.T)
      return log_p, jnp.take_along_axis(all_p, tokens[..., None], axis=-1)[..., 0], all_p.argmax(-1) == tokens
    cached, whole, same = both(values)
    self.assertTrue(np.asarray(same).all())
    np.testing.assert_allclose(cached, whole, rtol=1e-4, atol=1e-5)


if __name__ == '__main__':
  absltest.main()
