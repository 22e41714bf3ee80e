"""What a config needs of the mesh, and the sentences that say so."""

from absl.testing import absltest, parameterized

from tests.helpers import small_config
from uni_moe_jax.config import validate
from uni_moe_jax.config.plan import Plan, make_plan


class BatchesTest(absltest.TestCase):

  def test_a_micro_batch_must_divide_over_the_shards(self):
    c = small_config.config()
    c.train.grad_accum_steps = 2
    # shape: 8 / 2 = 4 rows a micro-step, whole on 4 shards; name: 4 / 2 = 2 rows are not.
    with self.assertRaisesRegex(ValueError, (
        r'config\.tasks\.name\.batch_size=4 must be a multiple of 8 \(4 batch shards of the mesh × 2 micro-steps\);'
        ' try 8')):
      make_plan(c).check_batches(shards=4, accum=2)

  def test_the_interference_metric_needs_halves(self):
    make_plan(small_config.config()).check_halves(shards=2, accum=1)
    with self.assertRaisesRegex(ValueError, (
        r'config\.tasks\.name\.batch_size=4 must be a multiple of 8 for config\.train\.interference_every > 0, which halves it '
        r'\(4 batch shards × 1 micro-steps × 2\); try 8, or interference_every=0')):
      make_plan(small_config.config()).check_halves(shards=4, accum=1)

  def test_batches_that_divide_pass(self):
    make_plan(small_config.config()).check_batches(shards=4, accum=1)

  def test_the_next_smaller_batch_is_proposed_where_there_is_one(self):
    resolved: Plan = make_plan(small_config.config()).only('shape')
    with self.assertRaisesRegex(ValueError, 'batch_size=8 must be a multiple of 3 .*; try 6'):
      resolved.check_batches(shards=3, accum=1)


class MeshTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(model=3), r'config\.mesh\.model=3 must divide config\.model\.num_heads=2, which it splits; try 1'),
      (dict(expert=3), r'config\.mesh\.expert=3 must divide config\.moe\.num_experts=8, which it splits; try 1'),
      (dict(data=3), r'config\.mesh\.data=3 must divide config\.model\.width=16, which it splits; try 1'))
  def test_an_axis_must_divide_what_it_splits(self, sizes, message):
    c = small_config.config()
    c.mesh.fsdp = True
    fitting = dict(replica=3, data=4, expert=2, model=2)
    validate.check_mesh(c, fitting)
    with self.assertRaisesRegex(ValueError, message):
      validate.check_mesh(c, {**fitting, **sizes})

  def test_only_fsdp_splits_the_width_and_only_experts_the_experts(self):
    c = small_config.config()
    c.moe.router = 'dense'
    validate.check_mesh(c, dict(replica=1, data=3, expert=3, model=1))


if __name__ == '__main__':
  absltest.main()
