"""Subjects are chosen by name; a name that is none is told with the nearest ones."""

from absl.testing import absltest

from uni_moe_jax.tools.bench import settings, suites


class ChooseTest(absltest.TestCase):

  def test_all_where_none_is_named(self):
    self.assertEqual(settings.choose([]), tuple(settings.SUITES))

  def test_the_order_is_the_benchmarks_and_compiling_comes_last(self):
    self.assertEqual(settings.choose(['compile', 'mixed', 'routers', 'mixed']), ('routers', 'mixed', 'compile'))

  def test_an_unknown_name_is_told_with_the_nearest(self):
    with self.assertRaisesRegex(ValueError, "--suites: 'decodin' is unknown; did you mean 'decoding'"):
      settings.choose(['routers', 'decodin'])

  def test_every_subject_is_measured_by_a_function(self):
    self.assertEqual(list(suites.MEASURE), list(settings.SUITES))
    self.assertLessEqual(set(settings.FROM_CONFIG), set(settings.SUITES))

  def test_only_the_quick_benchmark_is_reduced(self):
    self.assertTrue(settings.QUICK.reduced)
    self.assertFalse(settings.FULL.reduced)


if __name__ == '__main__':
  absltest.main()
