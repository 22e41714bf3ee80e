"""LayerNorm and GELU, with gradients that save one array, are those of flax and JAX."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.gmm_backends import normal
from uni_moe_jax.kernels import layer_norm
from uni_moe_jax.kernels.gelu import gelu
from uni_moe_jax.moe.layers import LayerNorm


def _norm(x, scale, bias):
  return LayerNorm().apply({'params': {'scale': jnp.asarray(scale), 'bias': jnp.asarray(bias)}}, jnp.asarray(x))


def test_layer_norm_by_hand():
  # Mean 5, variance ((-4)² + 0 + 4² + 0) / 4 = 8, of which 1e-5 is a millionth.
  y = _norm([[1., 5., 9., 5.]], [1., 1., 2., 1.], [0., .5, 0., 0.])
  np.testing.assert_allclose(y, [[-math.sqrt(2), .5, 2 * math.sqrt(2), 0.]], rtol=1e-5)
  # A row without variance is its bias, with finite gradients.
  constant = jnp.full((1, 4), 7.)
  np.testing.assert_array_equal(_norm(constant, jnp.ones(4), [1., 2., 3., 4.]), [[1., 2., 3., 4.]])
  assert np.isfinite(jax.grad(lambda x: _norm(x, jnp.ones(4), jnp.zeros(4)).sum())(constant)).all()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('rows', [(3,), (2, 5), (2, 5, 3)])
def test_layer_norm_and_its_gradients_are_those_of_flax(rows, dtype):
  x, weights = (3 * normal(0, *rows, 8) + 1).astype(dtype), normal(3, *rows, 8)
  params = {'scale': normal(1, 8), 'bias': normal(2, 8)}

  def value_and_gradients(module):
    loss = lambda x, params: ((y := module.apply({'params': params}, x)) * weights).sum() + jnp.square(y).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, params)

  flax_norm = nn.LayerNorm(epsilon=layer_norm.NORM_EPSILON, dtype=jnp.float32, use_fast_variance=False)
  (value, (dx, dparams)), (expected, (dx_expected, dparams_expected)) = map(
      value_and_gradients, (LayerNorm(), flax_norm))
  assert dx.dtype == dtype
  rounding = 1e-4 if dtype == jnp.float32 else 1e-2
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  as_float = lambda x: np.asarray(x, np.float32)
  np.testing.assert_allclose(as_float(dx), as_float(dx_expected), rtol=rounding, atol=rounding)
  for name, gradient in dparams.items():
    np.testing.assert_allclose(gradient, dparams_expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize('dtype, rounding', [(jnp.float32, 0), (jnp.bfloat16, 2**-8)])
def test_gelu_saves_one_array_and_its_gradient_is_that_of_float32(dtype, rounding):
  x = jnp.linspace(-6, 6, 1001, dtype=dtype)
  y, backward = jax.vjp(gelu, x)
  expected, exact = jax.vjp(functools.partial(jax.nn.gelu, approximate=False), x.astype(jnp.float32))
  [saved] = jax.tree.leaves(backward)
  assert saved.dtype == y.dtype == dtype
  np.testing.assert_allclose(np.float32(y), expected, rtol=4 * rounding, atol=1e-3 if rounding else 1e-6)
  [slope], [exact_slope] = backward(jnp.ones_like(x)), exact(jnp.ones(x.shape))
  assert slope.dtype == dtype
  np.testing.assert_allclose(np.float32(slope), exact_slope, rtol=rounding, atol=1e-7 if rounding else 1e-6)
  [doubled] = backward(jnp.full_like(x, 2))
  np.testing.assert_array_equal(doubled, 2 * slope)
