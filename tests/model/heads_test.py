"""Similarity by hand: the norm, the clamp, the projection."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.model import heads
from uni_moe_jax.model.uni_perceiver import UniPerceiver


def test_a_feature_gets_length_one_and_zero_stays_zero_with_a_finite_gradient():
  np.testing.assert_allclose(heads.normalize(jnp.array([[3., 4.], [0., -2.]])), [[.6, .8], [0., -1.]], rtol=1e-6)
  value, gradient = jax.value_and_grad(lambda x: heads.normalize(x).sum())(jnp.zeros((1, 2)))
  assert value == 0 and np.isfinite(gradient).all()


def test_logits_are_scaled_cosines_whatever_the_lengths():
  # (3, 4) and (0, 2) against (10, 0), (4, 3): cosines 3/5, 24/25 and 0, 3/5.
  logits = heads.logits(jnp.array([[3., 4.], [0., 2.]]), jnp.array([[10., 0.], [4., 3.]]), jnp.float32(50.))
  np.testing.assert_allclose(logits, [[30., 48.], [0., 30.]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('log_scale, scale, gradient', [
    (math.log(5.0), 5.0, 5.0), (math.log(99.0), 99.0, 99.0), (math.log(101.0), 100.0, 0.0)])
def test_a_scale_is_clamped_at_100_without_gradient(log_scale, scale, gradient):
  # d exp(x)/dx = exp(x) below the clamp.
  actual = jax.value_and_grad(heads.scale_of)(jnp.float32(log_scale))
  np.testing.assert_allclose(actual, (scale, gradient), rtol=1e-5)


def test_every_group_has_its_own_scale_which_starts_at_its_temperature():
  spec = small_model.spec(temperature_groups=('one', 'two'), temperature_init=.25)
  values = UniPerceiver(spec).bind({'params': {
      'log_scale_one': jnp.float32(math.log(4.0)), 'log_scale_two': jnp.float32(math.log(7.0))}})
  np.testing.assert_allclose([values.scale('one'), values.scale('two')], [4, 7], rtol=1e-6)
  fresh, _ = UniPerceiver(spec).init_with_output(jax.random.key(0), 'two', method='scale')
  np.testing.assert_allclose(fresh, 1 / .25, rtol=1e-6)
  names = set(small_model.boxed(spec))
  assert {'log_scale_one', 'log_scale_two'} <= names
  assert 'log_scale_group' not in names


# Norm of (1, 3) is (-1, 1); scale (2, 1), bias (0, 1): (-2, 2).
_PARAMS = {
    'norm': {'scale': jnp.array([2., 1.]), 'bias': jnp.array([0., 1.])},
    'kernel': jnp.array([[1., 10.], [3., 30.]]),
    'bias': jnp.array([.5, 0.]),
}


@pytest.mark.parametrize('lead', [(1,), (4, 3, 1)])
def test_norm_then_projection_by_hand(lead):
  # (-2·1 + 2·3 + .5, -2·10 + 2·30)
  f = heads.SimilarityHead(2).apply({'params': _PARAMS}, jnp.broadcast_to(jnp.array([1., 3.]), (*lead, 2)))
  np.testing.assert_allclose(f, np.broadcast_to([4.5, 40.], (*lead, 2)), rtol=1e-4)


def test_bfloat16_inputs_are_computed_in_float32():
  # Scale 2.1, which bfloat16 cannot represent: (-2.1·1 + 2·3 + .5, -2.1·10 + 2·30).
  values = {**_PARAMS, 'norm': {'scale': jnp.array([2.1, 1.]), 'bias': jnp.array([0., 1.])}}
  f = heads.SimilarityHead(2).apply({'params': values}, jnp.array([[1., 3.]], jnp.bfloat16))
  assert f.dtype == jnp.float32
  np.testing.assert_allclose(f, [[4.4, 39.]], rtol=1e-4)
