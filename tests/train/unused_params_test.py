"""A published step of one task: parameters that it does not use or train stay bit-identical and count in no norm."""

import dataclasses
import functools
import math
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import small_model, tiny
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train import step, used_params
from uni_moe_jax.train.losses import Tally
from uni_moe_jax.utils.tree_paths import by_path

FROZEN = {'similarity/kernel', 'encoder/tail/block0/ffn_in/kernel'}


@functools.cache
def _run() -> train_run.Run:
  """A scanned layer and a tail. Weight decay changes every updated parameter, even where its gradient is zero."""
  c = tiny.config('shape', 'text', data_dir=tiny.data_dir())
  c.train.update(mixture='one_task', encode_all_sets=True)
  c.optim.update(unused_params='settonone', warmup_steps=0)
  c.optim.param_groups = (*((f'{path}$', 'freeze') for path in sorted(FROZEN)), ('.*', 1., .5))
  return train_run.build(c, jax.devices()[:1])


@functools.cache
def _params():
  """Nowhere zero, so that decay shows everywhere."""
  rng = np.random.default_rng(0)
  fresh = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * .2, _run().shapes.params)
  scales = {name: np.float32(math.log(5)) for name in fresh if name.startswith('log_scale')}
  return jax.device_put({**fresh, **scales}, _run().shardings.params)


@functools.cache
def _step():
  """(state, metrics, {path: gradient}, used experts) of the first step, of masked language modeling."""
  run, seen = _run(), []
  batch = run.put_batch(next(batch for name, batch in run.mixture().iterate(0, 20) if name == 'text'))
  spec = dataclasses.replace(run.spec, plan=run.plan.only('text'))

  def gradients(*args, real=step.gradients):
    seen.append(real(*args))
    return seen[-1]

  def step_with_gradients(*args):
    with mock.patch.object(step, 'gradients', gradients):
      state, metrics = step.train_step(*args, jax.random.key(0), spec=spec)
    output = seen.pop()
    return state, metrics, output.grads, output.used_experts

  state, metrics, grads, used_experts = small_model.jit(step_with_gradients)(
      run.state_from(_params()), batch, run.target_sets())
  return state, metrics, _by_path(grads), used_experts


@functools.cache
def _used():
  """{path: bool or bools}. Only texts are encoded, those of target sets included."""
  used_experts = _step()[3]
  return _by_path(used_params.used_mask(_run().spec.model.spec, _params(), used_experts, ('text',), ('text_mlm',)))


def _by_path(tree):
  return {path: np.asarray(leaf) for path, leaf in by_path(tree).items()}


def _any(x, like):
  """Whether a slice has a True: over all but the leading axes that `like` has."""
  return x.reshape(*like.shape, -1).any(-1)


def test_exactly_the_used_parameters_that_train_change():
  before, after = _by_path(_params()), _by_path(_step()[0].params)
  for path, used in _used().items():
    moved = _any(before[path] != after[path], used)
    np.testing.assert_array_equal(moved, used & (path not in FROZEN), err_msg=path)


def test_experts_embedders_and_scales_that_the_step_does_not_use():
  unused = {path for path, used in _used().items() if not used.all()}
  experts = {path for path in unused if used_params.expert_sublayer(_run().spec.model.spec, path)}
  assert unused - experts == {'embed/patch', 'embed/patch_bias', 'embed/temporal', 'log_scale_image_classification'}
  for part in ('blocks/block0/qkv', 'blocks/block0/ffn_out', 'tail/block0/attention_out', 'tail/block0/ffn_out'):
    used = _used()[f'encoder/{part}/kernel']
    assert f'encoder/{part}/kernel' in experts and used.any(), part


def test_unused_parameters_have_gradient_zero():
  grads = _step()[2]
  nonzero = {path: _any(grads[path] != 0, used) for path, used in _used().items()}
  assert not any((nonzero[path] & ~used).any() for path, used in _used().items())
  assert all(nonzero[path].any() for path in ('embed/word', 'log_scale_text_mlm', 'encoder/tail/block0/ffn_out/kernel'))


def test_a_set_of_no_task_uses_experts_whose_gradient_is_zero():
  # Conditions: of the texts, of their words, and of the shapes' names, which the step encodes but does not score.
  _, _, grads, used_experts = _step()
  assert [counts.sum(-1).tolist() for counts in jax.tree.leaves(used_experts)] == [[3 * 2], [3 * 2], 3 * 2, 3 * 2]
  kernels = [path for path, used in _used().items() if used.ndim and path.endswith('/kernel')]
  idle = [_used()[path] & ~_any(grads[path] != 0, _used()[path]) for path in kernels]
  assert any(slices.any() for slices in idle) and not all(slices.any() for slices in idle)


def test_the_optimizer_counts_the_updates_of_every_slice():
  counts = _by_path(optax.tree.get(_step()[0].opt_state, 'AdamState').count)
  assert counts.keys() == _used().keys() - FROZEN
  for path, count in counts.items():
    np.testing.assert_array_equal(count, _used()[path], err_msg=path)


def test_a_run_that_counts_updates_can_be_resumed():
  like = _run().abstract_state()
  assert jax.tree.structure(like) == jax.tree.structure(_step()[0])
  assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, _step()[0])


def test_the_gradient_norm_excludes_frozen_parameters():
  grads = _step()[2]
  square = {path: float(np.square(g.astype(np.float64)).sum()) for path, g in grads.items()}
  every = math.sqrt(sum(square.values()))
  trained = math.sqrt(sum(s for path, s in square.items() if path not in FROZEN))
  assert float(_step()[1]['grad_norm']) == pytest.approx(trained, rel=1e-5)
  assert every > 1.01 * trained


@pytest.mark.parametrize('frozen, norm', [((), 13), (('a',), 12), (('b/c',), 5), (('a', 'b/c'), 0)])
def test_a_frozen_gradient_does_not_count_in_the_norm(frozen, norm):
  # Gradients 3 and 4, and 12 or nothing.
  idle = types.SimpleNamespace(tx=optax.with_extra_args_support(optax.identity()), learning_rate=lambda t: t)
  spec = dataclasses.replace(_run().spec, optimizer=idle, unused_params='update', frozen=frozenset(frozen))
  grads = {'a': jnp.array([3., 4.]), 'b': {'c': jnp.array(12.)}}
  state = step.init_state(spec, jax.tree.map(jnp.ones_like, grads))
  tallies = {t.name: Tally(*jnp.ones(2)) for t in spec.plan.tasks}
  with mock.patch.object(step, 'gradients', return_value=step.StepOutput(jnp.array(1.), tallies, {}, {}, grads)):
    after, metrics = step.train_step(state, {}, {}, jax.random.key(0), spec=spec)
  assert float(metrics['grad_norm']) == norm
  assert after.params['b']['c'] == (1 if 'b/c' in frozen else 13)  # the optimizer, which changes nothing, is given zero
