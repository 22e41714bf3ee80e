"""FLOPs of products: by hand for every construct that contains some, and of a model against its formula."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from tests.helpers import flops_formula, small_model
from uni_moe_jax.model import flops
from uni_moe_jax.model.uni_perceiver import UniPerceiver

A, B = jnp.ones((2, 3)), jnp.ones((3, 5))  # 2 · 2 · 3 · 5 = 60


def _kernel(cost_estimate=None):
  def product(a, b, out):
    out[...] = a[...] @ b[...]
  return lambda a, b: pl.pallas_call(
      product, jax.ShapeDtypeStruct((2, 5), a.dtype), grid=(2,), cost_estimate=cost_estimate,
      in_specs=[pl.BlockSpec((1, 3), lambda i: (i, 0)), pl.BlockSpec((3, 5), lambda i: (0, 0))],
      out_specs=pl.BlockSpec((1, 5), lambda i: (i, 0)))(a, b)


@pytest.mark.parametrize('function, expected', [
    (lambda a, b: a @ b + 1, 60),
    (lambda a, b: jnp.einsum('xij,xjk->xik', jnp.stack([a] * 7), jnp.stack([b] * 7)), 7 * 60),
    (jax.jit(jax.checkpoint(lambda a, b: a @ b)), 60),
    (lambda a, b: jax.lax.scan(lambda c, _: (c, a @ b), 0, None, length=4), 4 * 60),
    (lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: (a @ b).sum(), lambda: a.sum()), 60),
    (lambda a, b: jax.grad(lambda a: (a @ b).sum())(a), 2 * 60),
    # Rows 0 and 1 meet one expert each.
    (lambda a, b: jax.lax.ragged_dot(a, jnp.stack([b] * 4), jnp.array([1, 0, 1, 0])), 60),
    # Two images of 4 × 4 pixels in 3 channels; a kernel of 2 × 2 to 5 channels, every two pixels: 2 · 2 · 4 · 5 · 12.
    (lambda a, b: jax.lax.conv(jnp.ones((2, 3, 4, 4)), jnp.ones((5, 3, 2, 2)), (2, 2), 'VALID'), 960),
    (_kernel(), 60),
    (_kernel(pl.CostEstimate(flops=7, transcendentals=0, bytes_accessed=0)), 7),
], ids=['product', 'batch', 'rematerialized', 'loop', 'branch', 'gradient', 'experts', 'convolution', 'kernel',
        'declared'])
def test_products_by_hand(function, expected):
  assert flops.count(function, A, B) == expected


def test_a_model_costs_what_its_formula_gives():
  spec = small_model.spec('dense', num_layers=3, width=64, mlp_dim=256, image_size=16, patch_size=4, channels=1)
  sequence = small_model.sequence('image_classification', 2)
  sequence = sequence.replace(pixels=jax.ShapeDtypeStruct((2, 1, 16, 16, 1), 'float32'))
  params = jax.eval_shape(lambda: small_model.params(spec))

  def run(params, sequence):
    return UniPerceiver(spec).apply({'params': params}, method=lambda m: m.features(m.encode(sequence).hidden))
  expected = 2 * flops_formula.sequence(spec, 17, visual=True)
  assert flops.count(run, params, sequence) == pytest.approx(expected, rel=0.01)
