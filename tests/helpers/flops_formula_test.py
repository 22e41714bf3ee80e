"""The formula for FLOPs, by hand and against the compiler's count of one layer."""

import jax
import pytest

from tests.helpers import flops_formula, small_model
from uni_moe_jax.model.uni_perceiver import UniPerceiver


def test_a_layer_by_hand():
  # D 2, F 3, S 5: qkv and out 2·5·2·8 = 160, ffn 2·5·2·3·2 = 120, scores and values 2·5·5·2·2 = 200.
  spec = small_model.spec('dense', width=2, mlp_dim=3)
  assert flops_formula.layer(spec, 5) == 480
  # One token of it: keys and values of all five 80, query and out 16, ffn 24, attention 40.
  assert flops_formula.layer(spec, 5, read=1) == 160


@pytest.mark.parametrize('router, experts, expected', [
    # Two experts double qkv and out, 160, and ffn, 120; not scores and values, 200. A merged kernel is one kernel.
    ('token', ('attention', 'mlp'), 760), ('token', ('mlp',), 600), ('token', (), 480),
    ('attribute', ('attention', 'mlp'), 480)])
def test_token_routers_multiply_by_k_kernels(router, experts, expected):
  spec = small_model.spec(router, width=2, mlp_dim=3, top_k=2)
  assert flops_formula.layer(spec, 5, experts=experts) == expected


def test_only_layers_with_experts_cost_more():
  tokens = 5
  dense, token = (small_model.spec(router, num_layers=3, placement='every_2') for router in ('dense', 'token'))
  layer = flops_formula.layer
  more = layer(token, tokens, experts=token.sublayers) - layer(token, tokens)
  last = layer(token, tokens, 1, token.sublayers) - layer(token, tokens, 1)  # layer 2; layer 1 is dense
  assert flops_formula.sequence(token, tokens, False) - flops_formula.sequence(dense, tokens, False) == more + last


def test_the_projections_of_the_tiny_model_are_those_of_the_cost_model():
  # 16.73 GFLOP for 8 images of 197 tokens, without attention: 4 · 197² · 192 per layer and image.
  tiny = small_model.spec(
      'dense', num_layers=12, width=192, num_heads=3, mlp_dim=768, image_size=224, patch_size=16, channels=3)
  attention = 4 * 197**2 * 192
  assert round(8 * 12 * (flops_formula.layer(tiny, 197) - attention) / 1e9, 2) == 16.73


def test_the_formula_agrees_with_the_compilers_count():
  # A single layer is not scanned, so XLA counts all of it; it adds elementwise work, little at this width.
  spec = small_model.spec('dense', num_layers=1, width=64, mlp_dim=256, image_size=16, patch_size=4, channels=1)
  model, batch = UniPerceiver(spec), 2
  sequence = small_model.sequence('image_classification', batch)
  sequence = sequence.replace(pixels=jax.ShapeDtypeStruct((batch, 1, 16, 16, 1), 'float32'))
  params = jax.eval_shape(lambda: small_model.params(spec))

  def run(params, sequence):
    return model.apply({'params': params}, method=lambda m: m.features(m.encode(sequence).hidden))

  counted = jax.jit(run).lower(params, sequence).cost_analysis()['flops']
  assert 1.0 <= counted / (batch * flops_formula.sequence(spec, 17, visual=True)) <= 1.15
