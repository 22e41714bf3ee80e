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


def test_the_formula_of_a_layer_by_hand():
  # D 2, F 3, S 5: qkv and out 2·5·2·8 = 160, ffn 2·5·2·3·2 = 120, scores and values 2·5·5·2·2 = 200.
  spec = small_model.spec('dense', width=2, mlp_dim=3)
  assert flops_formula.layer(spec, 5) == 480
  # One token of it: keys and values of all five 80, query and out 16, ffn 24, attention 40.
  assert flops_formula.layer(spec, 5, read=1) == 160


def test_the_projections_of_the_tiny_model_are_those_of_the_cost_model():
  # 16.73 GFLOP for 8 images of 197 tokens, without attention: 4 · 197² · 192 per layer and image.
  tiny = small_model.spec(
      'dense', num_layers=12, width=192, num_heads=3, mlp_dim=768, image_size=224, patch_size=16, channels=3)
  attention = 4 * 197**2 * 192
  assert round(8 * 12 * (flops_formula.layer(tiny, 197) - attention) / 1e9, 2) == 16.73


@pytest.mark.parametrize('num_layers, counted, lowest, highest', [
    (3, flops.count, 0.99, 1.01),
    # A single layer is not scanned, so XLA counts all of it; it adds elementwise work, little at this width.
    (1, lambda run, *args: jax.jit(run).lower(*args).cost_analysis()['flops'], 1.0, 1.15)], ids=['traced', 'compiler'])
def test_a_model_costs_what_its_formula_gives(num_layers, counted, lowest, highest):
  spec = small_model.spec(
      'dense', num_layers=num_layers, width=64, mlp_dim=256, image_size=16, patch_size=4, channels=1)
  sequence = small_model.sequence('image_classification', 2)
  sequence = sequence.replace(pixels=jax.ShapeDtypeStruct((2, 1, 16, 16, 1), 'float32'))
  params = jax.eval_shape(lambda: small_model.params(spec))

  def run(params, sequence):
    return UniPerceiver(spec).apply({'params': params}, method=lambda m: m.features(m.encode(sequence).hidden))
  expected = 2 * flops_formula.sequence(spec, 17, visual=True)
  assert lowest <= counted(run, params, sequence) / expected <= highest
