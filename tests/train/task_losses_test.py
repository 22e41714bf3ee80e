"""Losses of the tasks of a step from given features: sampled vocabularies, and the choices for pairs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model, tiny
from uni_moe_jax.model import heads
from uni_moe_jax.train import forward, losses
from uni_moe_jax.train import run as train_run


def _build(**train) -> train_run.Run:
  c = tiny.config('text', 'pair', data_dir=tiny.data_dir())
  c.model.num_layers, c.tasks.pair.batch_size, c.tasks.pair.label_smoothing = 1, 8, .1
  c.train.update(train)
  return train_run.build(c, jax.devices()[:1])


_run = functools.cache(_build)
_params = lambda spec: small_model.params(spec.model.spec)
_normal = lambda *shape: np.random.default_rng(0).normal(size=shape).astype(np.float32)


LABELS = [[5, 6, 7], [5, 8, 9], [10, 5, 11], [12, 13, 5]]
LABEL_WEIGHTS = [[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 1]]


def _mlm(num_sampled, *leading):
  """(spec, batch) of a masked-language task whose vocabulary samples `num_sampled` words, with these leading axes."""
  plan = _run().plan.only('text')
  plan = dataclasses.replace(plan, sets=(dataclasses.replace(plan.sets[0], num_sampled=num_sampled),))
  fields = {'label': np.array(LABELS), 'weight': np.array(LABEL_WEIGHTS, np.float32)}
  spec = dataclasses.replace(_run().spec, plan=plan, grad_accum_steps=leading[0])
  return spec, {'text_mlm': {k: v.reshape(*leading, -1, 3) for k, v in fields.items()}}


@pytest.mark.parametrize('leading', [(1,), (2, 1)])
def test_labels_of_positive_weight_of_all_micro_steps_are_sampled_together(leading):
  words = forward.sample_vocabularies(*_mlm(8, *leading), jax.random.key(0))['words']
  assert sorted(words.ids.tolist()) == [5, 6, 7, 9, 10, 11, 12, 13]  # 8 has weight 0
  assert float(words.dropped) == 0


def test_dropped_labels_have_weight_zero():
  # A sample of 6 for 8 labels: the two that are dropped do not count. Label 5 occurs four times.
  spec, batch = _mlm(6, 1)
  sampled = forward.sample_vocabularies(spec, batch, jax.random.key(0))
  kept = np.isin(LABELS, sampled['words'].ids) * np.array(LABEL_WEIGHTS)
  assert float(sampled['words'].dropped) == 2
  assert float(forward.weight_sums(spec, batch, sampled)['text']) == kept.sum() < 11


def _loss_of_words(num_sampled, is_sampled=True):
  """(features of the words → loss of a step, sample)."""
  spec, batch = _mlm(num_sampled, 1)
  sampled = forward.sample_vocabularies(spec, batch, jax.random.key(1)) if is_sampled else {}

  def loss(words):
    rows = words[sampled['words'].ids] if is_sampled else words
    features = forward.StepInputs({'text_mlm': _normal(4, 3, 16)}, {}, {'words': rows})
    sums = forward.weight_sums(spec, batch, sampled)
    return forward.task_losses(spec, _params(spec), batch, features, sampled, sums)[0]
  return small_model.jit(jax.value_and_grad(loss)), sampled.get('words')


def test_a_vocabulary_sampled_with_every_word_has_the_loss_and_gradients_of_the_full_softmax():
  words = _normal(_run().spec.model.spec.vocab_size, 16)
  (full, of_full), (loss, of_sampled) = (
      _loss_of_words(len(words), is_sampled)[0](words) for is_sampled in (False, True))
  np.testing.assert_allclose(loss, full, rtol=1e-5)
  np.testing.assert_allclose(of_sampled, of_full, rtol=1e-4, atol=1e-6)
  assert np.abs(of_full).max() > .01


def test_a_sampled_softmax_is_over_the_sampled_words_with_their_correction():
  words, labels = _normal(_run().spec.model.spec.vocab_size, 16), np.array(LABELS)
  function, sample = _loss_of_words(12)
  spec, batch = _mlm(12, 1)
  [encoded] = forward.step_inputs(spec, {}, {'words': None}, {'words': sample}).target_sets['words']
  np.testing.assert_array_equal(encoded.text[:, 0], sample.ids)
  scale = np.exp(_params(spec)['log_scale_text_mlm'])
  logits = np.asarray(heads.logits(_normal(4, 3, 16), words[sample.ids], scale)) + np.asarray(sample.correction)
  position = np.argmax(labels[..., None] == np.asarray(sample.ids), axis=-1)  # 0 of label 8, which has weight 0
  nll = -np.take_along_axis(jax.nn.log_softmax(logits), position[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(function(words)[0], np.average(nll, weights=LABEL_WEIGHTS), rtol=1e-5)
  assert len(sample.ids) == 12 < len(words) and np.max(sample.correction) > .5


@pytest.mark.parametrize('train, text_ids, options', [
    (dict(), True, dict(reduction='mean')),
    (dict(contrastive_reduction='sum', mask_duplicate_texts=False), False, dict(reduction='sum')),
    (dict(negatives=4), True, dict(reduction='mean', block=4))])
def test_the_loss_of_pairs_has_the_choices_of_the_config(train, text_ids, options):
  run = _build(**train)
  inputs, pairs, ids = _normal(9, 16)[:8], _normal(9, 16)[1:], np.array([3, 1, 3, 2, 0, 4, 5, 3], np.int32)
  weights = np.array([1, 2, 1, 1, 0, 1, 1, 1], np.float32)
  group, spec = {'text_id': ids[None], 'weight': weights[None, :, None]}, run.spec
  spec = dataclasses.replace(spec, plan=spec.plan.only('pair'))
  features = forward.StepInputs({'image_retrieval': inputs[:, None]}, {'image_retrieval': pairs}, {})
  batch = {'image_retrieval': group}
  tally = forward.task_losses(spec, _params(spec), batch, features, {}, forward.weight_sums(spec, batch, {}))[1]['pair']
  logits = heads.logits(inputs, pairs, np.exp(_params(spec)['log_scale_image_retrieval']))

  def expected(text_ids, **options):
    tally = losses.contrastive(logits, jnp.asarray(ids) if text_ids else None, weights, .1, **options)
    return tally.loss / 8, tally.hits / 8
  np.testing.assert_allclose((tally.loss, tally.hits), expected(text_ids, **options), rtol=1e-5)
  for other in (dict(options, text_ids=not text_ids), dict(options, text_ids=text_ids, block=2)):
    assert abs(tally.loss - expected(**other)[0]) > 1e-2  # each choice matters
