"""Random data of chosen shapes."""

import numpy as np
from absl.testing import absltest

from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.tools.bench import synthetic


def _data(lengths, entries=20):
  c = config_lib.base()
  c.target_sets.names = config_lib.target_set('synthetic/names', family='names')
  c.tasks.classes = config_lib.task('image_classification', 'synthetic', batch_size=2, target_set='names', label_column='class')
  plan = make_plan(c)
  return synthetic.SyntheticData(plan, (4, 1), 50, entries, lengths), plan


class LengthsTest(absltest.TestCase):

  def test_each_length_has_its_share(self):
    np.testing.assert_array_equal(synthetic.spread_lengths(8, {2: 0.25, 3: 0.5, 9: 0.25}), [2, 2, 3, 3, 3, 3, 9, 9])

  def test_shares_are_of_their_sum_and_every_entry_has_a_length(self):
    for entries in (1, 7, 1000):
      self.assertLen(synthetic.spread_lengths(entries, {2: 1, 3: 1, 4: 1}), entries)

  def test_the_realistic_shares_are_shares(self):
    self.assertAlmostEqual(sum(synthetic.REALISTIC.values()), 1)

  def test_full_length_names_fill_their_bucket(self):
    [bucket] = _data({8: 1.0})[0].sets['names'].buckets
    self.assertEqual(bucket['text'].shape, (20, 8))
    self.assertTrue(bucket['valid'].all())

  def test_shorter_names_lie_in_shorter_buckets(self):
    short, long = _data({3: 0.8, 8: 0.2}, 100)[0].sets['names'].buckets
    self.assertEqual((short['text'].shape, long['text'].shape), ((80, 3), (20, 8)))
    self.assertTrue((short['text'][:, -1] == 2).all())  # each ends in eot

  def test_examples_have_classes_of_the_set(self):
    data, plan = _data({8: 1.0})
    fields = data.examples(plan.tasks[0]).make(np.array([0, 21, 63]), None)
    np.testing.assert_array_equal(fields['label'], [[0], [1], [3]])  # modulo 20
    self.assertEqual(fields['pixels'].shape, (3, 1, 4, 4, 1))


if __name__ == '__main__':
  absltest.main()
