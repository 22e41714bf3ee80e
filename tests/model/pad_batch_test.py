"""Examples that pad a batch change no result of the others and are not counted."""

import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import meshes, small_model
from uni_moe_jax.eval import predictor
from uni_moe_jax.model import uni_perceiver
from uni_moe_jax.model.sequences import join_equal
from uni_moe_jax.moe.routers import routes_tokens
from uni_moe_jax.tasks import task_types
from uni_moe_jax.train import router_metrics
from uni_moe_jax.train.forward import forward

_N, _MULTIPLE = 3, 4


def _texts(valid=True):
  texts = small_model.target(task_types.families()['names'], batch=_N)
  mask = jnp.array([[True, True, True], [True, True, False], [True, False, False]])
  return texts.replace(text_valid=mask if valid else None)


def test_padding_has_no_valid_token_and_even_batches_and_images_stay_unchanged():
  texts, filled = _texts(), _texts().pad_batch(_MULTIPLE)
  chex.assert_shape([filled.text, filled.text_valid], (_MULTIPLE, small_model.WORDS))
  np.testing.assert_array_equal(filled.text_valid.sum(1), [3, 2, 1, 0])
  np.testing.assert_array_equal(_texts(valid=False).pad_batch(_MULTIPLE).text_valid.sum(1), [3, 3, 3, 0])
  np.testing.assert_array_equal(filled.ids, [0, 1, 2, 0])
  images = small_model.sequence('image_classification', batch=_N)
  assert texts.pad_batch(_N) is texts and images.pad_batch(_MULTIPLE) is images


@functools.cache
def _training(router, **changes):
  """(texts) → ((loss, (features, statistics of routers)), gradients) of the first texts, which are not padding."""
  # With noise and dropped paths, which are drawn by ids; capacity follows shapes, so it is left out.
  spec = small_model.spec(router, num_layers=1, drop_path=0.3, noise_std=0.1, **changes)
  weights = jnp.asarray(np.random.default_rng(0).normal(size=(_N, 1, spec.width)), jnp.float32)

  def run(values, sequence):
    rows, collected = small_model.encode(spec, (sequence,), values=values, key=jax.random.key(0))
    balance = router_metrics.auxiliary_loss((('balance', 1.),), collected) if routes_tokens(router) else 0.
    return (rows[0][:_N] * weights).sum() + balance, (rows[0][:_N], _counts(collected))

  grads_of = small_model.jit(jax.value_and_grad(run, has_aux=True))
  return lambda sequence: grads_of(small_model.params(spec), sequence)


@pytest.mark.parametrize('router', ['attribute', 'token', 'dense', pytest.param('context', marks=pytest.mark.nightly)])
@pytest.mark.parametrize('valid', [True, False])
def test_padding_changes_no_feature_gradient_or_count(router, valid):
  texts, actual = _texts(valid), _training(router)
  filled = texts.pad_batch(_MULTIPLE)
  (_, (rows, counts)), grads = actual(texts)
  (_, (rows_filled, counts_filled)), grads_filled = actual(filled)
  chex.assert_trees_all_close(rows_filled, rows, atol=1e-5)
  chex.assert_trees_all_close(grads_filled, grads, atol=2e-4, rtol=1e-4)
  chex.assert_tree_all_finite(grads_filled)
  chex.assert_trees_all_close(counts_filled, counts, rtol=1e-5)
  if routes_tokens(router):  # the control: valid examples are counted
    (_, (_, more)), _ = actual(filled.replace(text_valid=jnp.ones_like(filled.text_valid)))
    assert float(more[0]['mlp'].tokens.sum()) > float(counts[0]['mlp'].tokens.sum())


@pytest.mark.nightly
def test_deep_prompts_of_padding_are_not_counted():
  texts, actual = _texts(), _training('token', num_deep_prompts=2)
  (loss, (_, counts)), grads = actual(texts)
  (loss_filled, (_, counts_filled)), grads_filled = actual(texts.pad_batch(_MULTIPLE))
  # Six valid words, a prefix and two prompts in each of three examples.
  assert float(counts_filled[0]['attention'].tokens.sum()) == 6 + 3 + 3 * 2
  chex.assert_trees_all_close((loss_filled, counts_filled), (loss, counts), rtol=1e-5)
  chex.assert_trees_all_close(grads_filled, grads, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize('task', ['shape', 'text'])
def test_every_device_of_a_mesh_encodes_equally_many_entries(task):
  run = meshes.run(meshes.Case('attribute', (task,)), 'data')
  name, [of_set] = run.plan.sets[0].name, run.plan.sets
  shards, entries, encoded = run.spec.model.shards, run.data.target_sets[name].size, []

  def join(sequences, keys, shards):
    encoded.append([len(s.ids) for s in sequences])
    return join_equal(sequences, keys, shards)

  with mock.patch.object(uni_perceiver, 'join_equal', join):
    features = jax.eval_shape(
        lambda params: forward(run.spec, params, {}, run.target_sets(), {}, jax.random.key(0))[0].target_sets[name],
        run.shapes.params)
    [sequence] = predictor.set_sequences(of_set, run.data.target_sets[name], run.data.tokenizer.eot)
    evaluated = jax.eval_shape(functools.partial(predictor.encode, run.spec.model), run.shapes.params, sequence)
  assert entries % shards
  assert encoded == [[entries + -entries % shards]] * 2
  assert (len(features), len(evaluated)) == (entries, entries)  # and padding has no feature


def _counts(collected):
  """Router statistics by block: the sums of token routers, and the outputs of other routers, which padding keeps."""
  return [out['router_stats'] for sub in ('blocks', 'tail') for out in collected[sub]]
