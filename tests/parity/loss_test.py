"""Losses and gradients equal to the published system's, by the function that training steps with."""

import functools

import jax
import numpy as np
import pytest

from tests.helpers import small_model
from tests.parity import fixtures
from tests.parity.fixtures import Arrays, assert_close
from tests.parity.problem import Problem, counted, input_and_target, problem
from uni_moe_jax.convert import torch_layout
from uni_moe_jax.model import heads
from uni_moe_jax.train import step
from uni_moe_jax.train.forward import forward

LOSS, GRADIENT = 1e-5, 1e-4
# Published keys whose tensors are fixed there (POSEMBEDFIX), so that they have no gradient.
_FIXED = ('video_embed.embeddings_st_pos.spatial_pos_embed.weight',)


@functools.partial(small_model.jit, static_argnums=0)
def _step(spec, params, batch, sets):
  """(gradients, tallies, input features, target features) of the step's one task."""
  task, = spec.plan.tasks
  output = step.gradients(spec, params, batch, sets, jax.random.key(0))
  features = input_and_target(task, forward(spec, params, batch, sets, {}, jax.random.key(0))[0])
  return output.grads, output.tallies[task.name], *features


@pytest.mark.parametrize('name', fixtures.cases('train_loss_and_grad'))
def test_loss_and_gradients(name):
  arrays = Arrays(name)
  case = problem(name, arrays)
  model = fixtures.model_of(fixtures.entry(name)['weights'])
  grads, tally, features, targets = jax.device_get(_step(case.spec, fixtures.params(model), case.batch, case.sets))
  _compare_features(arrays, case, features, targets)
  _compare_losses(arrays, case, tally, features, targets)
  _compare_gradients(arrays, case, model, grads)
  assert not arrays.unread, sorted(arrays.unread)


def _compare_features(arrays: Arrays, case: Problem, features, targets) -> None:
  for key, ours in (('feat_input', counted(case, features)), ('feat_target', targets)):
    if key in arrays:
      theirs = arrays[key]
      assert_close(ours[:len(theirs)], theirs, LOSS, key)


def _compare_losses(arrays: Arrays, case: Problem, tally, features, targets) -> None:
  """Published entries carry the task's weight; both directions of retrieval are entries."""
  published = {k: float(arrays[k]) for k in arrays.keys('loss.')}
  total, null = published.pop('loss.total_backpropagated', None), published.pop('loss.null_loss', 0)
  assert null == 0
  accuracy = {k: published.pop(k) for k in list(published) if 'Accuracy' in k}
  loss = case.task.loss_weight * float(tally.loss)
  assert_close(loss, sum(published.values()), LOSS, 'loss')
  # Accuracy carries no gradient, yet the published trainer logs and adds it.
  if total is not None:
    assert_close(loss + sum(accuracy.values()), total, LOSS, 'total')
  logits = np.asarray(heads.logits(features[:, 0], targets, np.float32(1)))  # but for the scale
  soft = case.batch[case.task.group]['weight'][0]
  for key, theirs in accuracy.items():
    if 't2i' in key:
      ours = (logits.argmax(0) == np.arange(len(logits))).mean()
    elif soft.shape[1] == logits.shape[1] and soft.shape[1] > 1 and case.task.type.readout in ('cls', 'slot'):
      ours = (logits.argmax(1) == soft.argmax(1)).mean()  # of a mixed label, the larger part counts there
    else:
      ours = tally.hits
    assert_close(ours, theirs, LOSS, key)


def _compare_gradients(arrays: Arrays, case: Problem, model: str, grads) -> None:
  ours, _ = torch_layout.to_torch(grads, case.spec.model.spec)
  for key in _FIXED:
    ours[key] = np.zeros_like(ours[key])
  if 'grad_norm_per_param' in arrays:
    _compare_norms(arrays, model, ours)
  for key in arrays.keys('grad.'):
    assert_close(ours[key.removeprefix('grad.')], arrays[key], GRADIENT, key)
  for key in arrays.keys('grad_rownorm.'):
    assert_close(np.linalg.norm(ours[key.partition('.')[2]], axis=1), arrays[key], GRADIENT, key)
  for key in arrays.keys('grad_rowsum.'):
    # A LayerNorm follows the words, so that each row's gradient sums to zero: what is left is rounding on both sides,
    # to be measured against the rows themselves.
    name = key.partition('.')[2]
    error = np.linalg.norm(ours[name].sum(1) - arrays[key])
    assert error <= GRADIENT * np.linalg.norm(ours[name]), (key, error)


def _compare_norms(arrays: Arrays, model: str, ours) -> None:
  """The norm of every parameter's gradient, and of all together."""
  names = fixtures.manifest()['models'][model]['param_names']
  norms = arrays['grad_norm_per_param']
  top = norms.max()
  for key, theirs in zip(names, norms, strict=True):
    mine = np.linalg.norm(ours[key].astype(np.float64))
    if theirs <= 0:  # -1: no gradient at all
      assert mine == 0, (key, mine, theirs)
    else:
      # Some gradients are zero in exact arithmetic (a bias of keys): there both have rounding, and nothing else. Others
      # are small differences of what is as large as the largest: two processors differ there by a few float32 steps of
      # that.
      assert abs(mine - theirs) <= GRADIENT * theirs + 2e-7 * top or max(mine, theirs) < 1e-6 * top, (key, mine, theirs)
  assert_close(np.sqrt(sum(np.linalg.norm(ours[k].astype(np.float64))**2 for k in names)), arrays['grad_global_norm'],
               GRADIENT, 'global norm')
