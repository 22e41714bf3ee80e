"""The formula for FLOPs: by hand, and against the compiler's count of one layer."""

import jax
from absl.testing import absltest

from tests.helpers import small_model
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.tools.bench import flops

_TINY = small_model.spec('dense', num_layers=12, width=192, num_heads=3, mlp_dim=768, image_size=224, patch_size=16, channels=3)


class FlopsTest(absltest.TestCase):

  def test_a_layer_by_hand(self):
    # D 2, F 3, S 5: qkv and out 2·5·2·8 = 160, ffn 2·5·2·3·2 = 120, scores and values 2·5·5·2·2 = 200.
    spec = small_model.spec('dense', width=2, mlp_dim=3)
    self.assertEqual(flops.layer(spec, 5), 480)
    # One row of it: keys and values of all five 80, query and out 16, ffn 24, attention 40.
    self.assertEqual(flops.layer(spec, 5, read=1), 160)

  def test_the_projections_of_tiny_are_those_of_the_cost_model(self):
    # 16.73 GFLOP for 8 pictures of 197 tokens; attention comes on top: 4 · 197² · 192 per layer and picture.
    attention = 4 * 197**2 * 192
    self.assertAlmostEqual(8 * 12 * (flops.layer(_TINY, 197) - attention) / 1e9, 16.73, places=2)

  def test_it_is_what_the_compiler_counts(self):
    # One layer is not scanned, so that XLA's count is whole; it adds elementwise work, little at this width.
    spec = small_model.spec('dense', num_layers=1, width=64, mlp_dim=256, image_size=16, patch_size=4, channels=1)
    model, batch = UniPerceiver(spec), 2
    sequence = small_model.sequence('image_classification', batch)
    sequence = sequence.replace(pixels=jax.ShapeDtypeStruct((batch, 1, 16, 16, 1), 'float32'))
    params = jax.eval_shape(lambda: small_model.params(spec))

    def run(params, sequence):
      return model.apply({'params': params}, method=lambda m: m.features(m.encode(sequence).hidden))

    counted = jax.jit(run).lower(params, sequence).cost_analysis()['flops']
    expected = batch * flops.sequence(spec, 17, visual=True)
    self.assertBetween(counted / expected, 1.0, 1.15)


if __name__ == '__main__':
  absltest.main()
