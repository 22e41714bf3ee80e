"""Merging kernels is mixing expert outputs, in values and gradients; how layers declare, merge and scale them."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import hlo
from tests.helpers.gmm_backends import normal
from tests.helpers.jaxprs import equations
from uni_moe_jax.kernels.projection import project
from uni_moe_jax.model.sublayer import MergedRouting
from uni_moe_jax.moe import layers
from uni_moe_jax.moe.routers import route

# All to one of four experts, even among two, skewed, to all.
_GATES = (0., 0., 1., 0.), (.5, 0., .5, 0.), (.75, 0., 0., .25), (.1, .2, .3, .4)


def test_merge_by_hand():
  # Kernels [[1, 2]] and [[10, 20]]; rows (1/4, 3/4) and (1, 0).
  merged = layers.merge(jnp.array([[[1., 2.]], [[10., 20.]]]), jnp.array([[.25, .75], [1., 0.]]))
  np.testing.assert_allclose(merged, [[[7.75, 15.5]], [[1., 2.]]])
  # The two best of four: logits log 1, 2, 3, 4 keep 3/7 and 4/7 of the kernels 7 and 70: 3 + 40.
  coef = route(jnp.log(jnp.array([[1., 2., 3., 4.]])), 2).coef
  np.testing.assert_allclose(layers.merge(jnp.array([[-9.], [-9.], [7.], [70.]]), coef), [[43.]], rtol=1e-6)
  # Equal experts merge to one of them.
  kernels = jnp.stack([normal(0, 3, 5)] * 4)
  np.testing.assert_allclose(layers.merge(kernels, jnp.array(_GATES)), kernels, rtol=1e-6)


def _merged(kernel, bias, coef, x):
  """[A, B, S, F]: add the kernels, then multiply."""
  kernels, biases = layers.merge(kernel, coef), layers.merge(bias, coef)
  return jnp.stack([project(x, k, b) for k, b in zip(kernels, biases)])


def _mixed(kernel, bias, coef, x):
  """[A, B, S, F]: every expert multiplies, then the outputs are added."""
  outputs = jnp.einsum('bsd,edf->ebsf', x, kernel) + bias[:, None, None]
  return jnp.einsum('ae,ebsf->absf', coef, outputs)


@functools.cache
def _value_and_gradients(compute):
  def loss(*operands):
    y = compute(*operands)
    return jnp.sum(jnp.sin(y)), y
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


def _both(gates):
  operands = normal(1, 4, 6, 5), normal(2, 4, 5), jnp.array(gates), normal(3, 2, 3, 6)
  return _value_and_gradients(_merged)(*operands), _value_and_gradients(_mixed)(*operands)


@pytest.mark.parametrize('gate', _GATES)
def test_merging_equals_mixing_in_values_and_gradients(gate):
  ((_, merged), _), ((_, mixed), _) = _both([gate, gate])
  np.testing.assert_allclose(merged, mixed, rtol=1e-5, atol=1e-5)
  (_, merged), (_, mixed) = _both([gate, (0., 1., 0., 0.)])
  for name, a, b in zip(('kernel', 'bias', 'coef', 'x'), merged, mixed, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)


def test_an_expert_that_was_not_kept_has_no_gradient():
  (_, (kernel, *_)), _ = _both([(.75, 0., 0., .25), (1., 0., 0., 0.)])
  moved = np.abs(np.asarray(kernel)).max(axis=(1, 2)) > 0
  np.testing.assert_array_equal(moved, [True, False, False, True])


def _dense(num_experts: int, dtype=jnp.float32) -> layers.MoeDense:
  return layers.MoeDense(
      (('embed', 40),), (('qkv', 3), ('heads', 5), ('head_dim', 8)), layers.xavier_uniform(40, 40), num_experts,
      dtype)


def _coef(conditions: int = 3) -> jax.Array:
  return route(normal(0, conditions, 4), 2).coef


def _init(num_experts: int, coef: jax.Array | None, dtype=jnp.float32):
  """(projection, parameters)."""
  projection, variables = _dense(num_experts, dtype).init_with_output(jax.random.key(0), coef)
  return projection, nn.unbox(variables)['params']


def test_each_condition_has_one_kernel_and_bias():
  projection, _ = _init(4, _coef())
  assert [x.shape for x in projection.kernel] == [(40, 3, 5, 8)] * 3
  assert [x.shape for x in projection.bias] == [(3, 5, 8)] * 3
  assert (projection.in_axes, projection.out_axes) == (('embed',), ('qkv', 'heads', 'head_dim'))


def test_kernels_and_biases_are_merged_by_the_same_coefficients():
  values = {'kernel': normal(1, 4, 40, 3, 5, 8), 'bias': normal(2, 4, 3, 5, 8)}
  projection = _dense(4).apply({'params': values}, _coef())
  for name, merged in (('kernel', projection.kernel), ('bias', projection.bias)):
    expected = np.einsum('ae,e...->a...', _coef(), values[name])
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_dense_projection_has_one_kernel_of_the_dtype_of_the_product_and_a_float32_bias_and_parameters():
  projection, params = _init(0, None)
  [kernel] = projection.kernel
  np.testing.assert_array_equal(kernel, params['kernel'])
  projection, params = _init(0, None, jnp.bfloat16)
  assert (projection.kernel[0].dtype, projection.bias[0].dtype) == (jnp.bfloat16, jnp.float32)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}


def test_initial_kernels_differ_and_are_uniform_within_the_bound_of_the_fans():
  # Fans (40, 40): ±√(6/80) = ±.274, whatever the axes of the shape; 4800 draws a kernel.
  kernel, bound = np.asarray(_init(4, _coef(1))[1]['kernel']), math.sqrt(6 / 80)
  assert np.abs(kernel).max() <= bound
  np.testing.assert_allclose(kernel.std(axis=(1, 2, 3, 4)), bound / math.sqrt(3), rtol=.05)
  assert len(np.unique(kernel[:, 0, 0, 0, 0])) == 4


def _scaled(by, values, coef=None, dtype=jnp.float32) -> layers.Projection:
  # 4 → 6, merged from two experts by `coef` or dense; outputs are multiplied by `by` [6].
  experts = 0 if coef is None else 2
  dense = layers.MoeDense((('mlp', 4),), (('embed', 6),), nn.initializers.zeros, experts, dtype)
  return dense.apply({'params': values}, coef, by)


@pytest.mark.parametrize('experts, coef', [((), None), ((2,), jnp.array([[.25, .75], [1., 0.]]))])
def test_a_scaled_projection_multiplies_its_outputs(experts, coef):
  x, by = normal(2, 3, 5, 4), normal(3, 6)
  values = {'kernel': normal(0, *experts, 4, 6), 'bias': normal(1, *experts, 6)}
  scaled, plain = _scaled(by, values, coef), _scaled(None, values, coef)
  for row in range(len(plain.kernel)):
    y, expected = (project(x, of.kernel[row], of.bias[row]) for of in (scaled, plain))
    np.testing.assert_allclose(y, expected * by[None, None], rtol=1e-5, atol=1e-6)


def test_weights_are_scaled_before_they_are_rounded():
  # bfloat16 has 1, 1.0078 and 1.0156: 1.004 · 1.004 = 1.0080 rounds to 1.0078; rounded factors make 1.0078² = 1.0156.
  values = {'kernel': jnp.full((4, 6), 1.004), 'bias': jnp.full((6,), 1.004)}
  scaled = _scaled(jnp.full((6,), 1.004), values, dtype=jnp.bfloat16)
  np.testing.assert_array_equal(scaled.kernel[0].astype(jnp.float32), 1.0078125)
  np.testing.assert_allclose(scaled.bias[0], 1.004**2, rtol=1e-6)


def _gradient_of_257_ones(project) -> float:
  """Of a bfloat16 kernel of one weight, by 257 tokens of 1; bfloat16 has 256 and 258."""
  x, values = jnp.ones((1, 257, 1), jnp.bfloat16), {'kernel': jnp.ones((1, 1)), 'bias': jnp.zeros(1)}
  dense = layers.MoeDense((('mlp', 1),), (('embed', 1),), nn.initializers.zeros, 0, jnp.bfloat16)
  loss = lambda values: project(x, dense.apply({'params': values}, None)).astype(jnp.float32).sum()
  return float(jax.grad(loss)(values)['kernel'][0, 0])


def test_the_gradient_of_a_rounded_kernel_is_not_rounded():
  assert _gradient_of_257_ones(lambda x, of: MergedRouting().apply(x, of)[0]) == 257
  # Control: the gradient of the rounded values.
  round_first = lambda x, of: project(x, of.unrounded[0].astype(x.dtype), of.bias[0])
  assert _gradient_of_257_ones(round_first) in (256, 258)


def test_gradients_of_a_kernel_that_is_used_twice_are_added_in_float32():
  apply = lambda x, of: MergedRouting().apply(x, of)[0]
  twice = lambda x, of: jnp.concatenate([apply(x[:, :1], of), apply(x[:, 1:], of)], axis=1)
  assert _gradient_of_257_ones(twice) == 257


def test_gradients_of_a_kernel_are_summed_over_its_uses_before_they_join_those_of_others():
  x, coef = normal(0, 5, 3, 4), jnp.array([[.25, .75], [1., 0.], [.5, .5]])
  values = {'kernel': normal(1, 2, 4, 6), 'bias': normal(2, 2, 6)}
  uses = (0, 2, 2, 0, 2)  # the kernel in the middle has none

  def loss(project):
    return sum(jnp.sin(project(x[i:i + 1] * (i + 1), kernel)).sum() for i, kernel in enumerate(uses))

  def of_layer(values):
    projection = _scaled(None, values, coef)
    return loss(lambda x, kernel: MergedRouting(kernel=kernel).apply(x, projection)[0])

  def by_hand(values):
    return loss(lambda x, kernel: x @ jnp.tensordot(coef[kernel], values['kernel'], 1) + (
        coef[kernel] @ values['bias'])[None, None])

  gradients, expected = jax.grad(of_layer)(values), jax.grad(by_hand)(values)
  for name in values:
    np.testing.assert_allclose(gradients[name], expected[name], rtol=1e-5, atol=1e-5)
  names = [e.primitive.name for e in equations(jax.make_jaxpr(jax.grad(of_layer))(values))]
  assert names.count('concatenate') == 2 and 'pad' not in names  # of kernels and of biases
  assert 'pad' in [e.primitive.name for e in equations(jax.make_jaxpr(jax.grad(lambda x: x[1].sum()))(coef))]  # control


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('weights, products', [(True, 3), (False, 4)])
def test_a_rematerialized_product_is_not_computed_again(weights, products, dtype):
  # Forward, and the gradients of x and of the kernel; a fourth computes the output again, for the gradient of `by`.
  def block(x, values, by):
    of = _scaled(by if weights else None, values, dtype=dtype)
    y = project(jnp.sin(x), of.kernel[0], of.bias[0])
    return y if weights else y * by[None, None]

  def loss(*operands):
    return jnp.sin(jax.checkpoint(block)(*operands)).sum()
  operands = normal(2, 30, 50, 4), {'kernel': normal(0, 4, 6), 'bias': normal(1, 6)}, normal(3, 6)
  program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*operands).compile()
  assert hlo.count_matmuls(program.as_text()) == products
