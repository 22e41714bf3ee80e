"""AdamW when a step does not use every parameter: both published conventions by hand, and ours where they agree."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from uni_moe_jax import config as config_lib
from uni_moe_jax.train import adam, optimizer

B1 = B2 = .5  # a moment is the mean of what it was and what comes
DECAY = .25
_CONVENTIONS = 'settonone', 'zerograd'


def _steps(convention, gradients, used, p=2., decay=0., units=()):
  """(direction of each step, states) of a parameter that is held at `p`, with slices of the leading axes `units`."""
  params = {'p': jnp.asarray(p, jnp.float32)}
  tx = adam.adamw(B1, B2, 1., {'p': decay}, {'p': units}, convention)
  update, state = jax.jit(tx.update), tx.init(params)
  directions, states = [], [state]
  for g, is_used in zip(gradients, used, strict=True):
    direction, state = update({'p': jnp.asarray(g, jnp.float32)}, state, params, used={'p': jnp.asarray(is_used)})
    directions.append(np.asarray(direction['p']))
    states.append(state)
  return directions, states


def _moments(state):
  return int(state.count['p']), float(state.mu['p']), float(state.nu['p'])


# Gradients 4, none, 2, and what they make of the moments; eps is 1.
GRADIENTS, USED = (4., 0., 2.), (True, False, True)


@pytest.mark.parametrize('convention, moments, expected', [
    # m = 2, v = 8; nothing; m = 1 + 1, v = 4 + 2. Corrected by 1/2, then by 1 - 1/4: the second update, not the third.
    ('settonone', [(1, 2, 8), (1, 2, 8), (2, 2, 6)], [4 / (4 + 1), 0, (8 / 3) / (math.sqrt(8) + 1)]),
    # m = 2, v = 8; m = 1, v = 4; m = 1/2 + 1, v = 2 + 2. Corrected by 1/2, 3/4, 7/8: 4/3 and 16/3, 12/7 and 32/7.
    ('zerograd', [(1, 2, 8), (2, 1, 4), (3, 1.5, 4)],
     [4 / 5, (4 / 3) / (math.sqrt(16 / 3) + 1), (12 / 7) / (math.sqrt(32 / 7) + 1)])])
def test_one_counts_a_parameters_own_updates_the_other_continues_with_gradient_zero(convention, moments, expected):
  directions, states = _steps(convention, GRADIENTS, USED)
  assert [_moments(s) for s in states] == [(0, 0, 0), *moments]
  np.testing.assert_allclose(directions, expected, rtol=1e-6)


@pytest.mark.parametrize('convention', _CONVENTIONS)
def test_a_parameter_that_was_never_used_does_not_change_until_its_own_first_update(convention):
  # Not even decay, 1/4 of p = 2. Then gradient 4 as a first update: 4/5, and decay.
  directions, states = _steps(convention, (0., 0., 4.), (False, False, True), decay=DECAY)
  assert [_moments(s) for s in states] == [(0, 0, 0)] * 3 + [(1, 2, 8)]
  np.testing.assert_allclose(directions, [0, 0, 4 / 5 + .25 * 2], rtol=1e-6)


@pytest.mark.parametrize('convention, goes_on', [('settonone', False), ('zerograd', True)])
def test_decay_applies_where_there_is_an_update(convention, goes_on):
  with_decay, _ = _steps(convention, GRADIENTS, USED, decay=DECAY)
  without, _ = _steps(convention, GRADIENTS, USED)
  np.testing.assert_allclose(np.subtract(with_decay, without), [.5, .5 if goes_on else 0, .5], rtol=1e-6)


def test_set_to_none_ignores_the_gradient_of_an_unused_parameter():
  zero, _ = _steps('settonone', (4., 0., 2.), USED)
  nonzero, _ = _steps('settonone', (4., 9., 2.), USED)
  np.testing.assert_array_equal(zero, nonzero)
  used, _ = _steps('settonone', (4., 9., 2.), (True, True, True))
  assert (np.array(used)[1:] != np.array(nonzero)[1:]).all()


# Two experts of one layer, and two layers of two experts; the slices take turns.
TURNS = {(2,): ([1, 0], [0, 0], [1, 1]), (2, 2): ([[1, 0], [0, 1]], [[0, 1], [0, 0]], [[1, 1], [0, 1]])}


@pytest.mark.parametrize('convention', _CONVENTIONS)
@pytest.mark.parametrize('units', TURNS)
def test_every_slice_is_updated_as_a_parameter_of_its_own(units, convention):
  rng, turns = np.random.default_rng(0), np.array(TURNS[units], bool)
  p = rng.normal(size=(*units, 3)).astype(np.float32)
  gradients = rng.normal(size=(3, *p.shape)).astype(np.float32) * turns[..., None]
  together, states = _steps(convention, gradients, turns, p, DECAY, units)
  assert states[0].count['p'].shape == units
  counts = set()
  for at in np.ndindex(*units):
    alone, own = _steps(convention, gradients[(slice(None), *at)], turns[(slice(None), *at)], p[at], DECAY)
    np.testing.assert_allclose(np.array(together)[(slice(None), *at)], alone, rtol=1e-6)
    assert states[-1].count['p'][at] == own[-1].count['p']
    counts.add(int(own[-1].count['p']))
  assert len(counts) > 1


# Inside the optimizer.
PARAMS = {'block': {'kernel': jnp.array([[2., -2.], [1., 3.]]), 'bias': jnp.array([1.])}, 'word': jnp.array([[5., 5.]])}
GROUPS = (('word', 'freeze'), ('kernel', .5, .2), ('.*', 1., 0.))
ALL, FIRST_EXPERT = ({'block': {'kernel': jnp.array([True, second]), 'bias': jnp.array(True)}, 'word': jnp.array(True)}
                     for second in (True, False))


@functools.cache
def _gradients():
  rng = np.random.default_rng(1)
  return tuple(jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS) for _ in range(3))


def _optimizer(convention, groups=GROUPS):
  """For a kernel of two experts and a frozen table."""
  c = config_lib.base()
  c.optim.update(dict(
      learning_rate=.1, warmup_steps=2, grad_clip_norm=1., b1=.9, b2=.95, eps=1e-6, unused_params=convention))
  c.optim.param_groups = groups
  return optimizer.make_optimizer(c, PARAMS, lambda path: int(path == 'block/kernel')).tx


def _train(tx, **more):
  """(parameters after three updates, optimizer state)."""
  update, params, state = jax.jit(tx.update), PARAMS, tx.init(PARAMS)
  for g in _gradients():
    updates, state = update(g, state, params, grad_norm=optax.tree.norm(g), **more)
    params = optax.apply_updates(params, updates)
  return jax.device_get(params), state


@pytest.mark.parametrize('convention', _CONVENTIONS)
def test_if_every_step_uses_everything_it_is_adamw(convention):
  ours, _ = _train(_optimizer(convention), used=ALL)
  chex.assert_trees_all_close(ours, _train(_optimizer('update'))[0], rtol=1e-6, atol=1e-6)
  assert np.abs(ours['block']['kernel'] - PARAMS['block']['kernel']).min() > 1e-2


@pytest.mark.parametrize('convention', _CONVENTIONS)
def test_an_unused_expert_does_not_change_while_the_other_follows_adamw(convention):
  ours = _train(_optimizer(convention), used=FIRST_EXPERT)[0]['block']['kernel']
  usual = _train(_optimizer('update'))[0]['block']['kernel']
  np.testing.assert_array_equal(ours[1], PARAMS['block']['kernel'][1])
  assert np.abs(usual[1] - ours[1]).min() > 1e-2
  np.testing.assert_allclose(ours[0], usual[0], rtol=1e-6)


@pytest.mark.parametrize('convention', _CONVENTIONS)
def test_a_frozen_parameter_does_not_change_even_if_used(convention):
  frozen, _ = _train(_optimizer(convention), used=ALL)
  np.testing.assert_array_equal(frozen['word'], PARAMS['word'])
  free, _ = _train(_optimizer(convention, GROUPS[1:]), used=ALL)
  assert (free['word'] != PARAMS['word']).all()


@pytest.mark.parametrize('convention', _CONVENTIONS)
def test_a_frozen_parameter_has_no_moments_and_no_count_before_and_after_an_update(convention):
  tx = _optimizer(convention)
  for state in (tx.init(PARAMS), _train(tx, used=ALL)[1]):
    adam_state = optax.tree.get(state, 'AdamState')
    assert [isinstance(tree['word'], optax.MaskedNode) for tree in adam_state] == [True] * 3
    assert jax.tree.map(jnp.shape, adam_state.count['block']) == {'kernel': (2,), 'bias': ()}
