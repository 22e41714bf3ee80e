from absl.testing import absltest, parameterized

from uni_moe_jax.data.pipeline.templates import fill_template


class _Letters:
  """Each word of fixed text is the number of its letters plus 100."""
  spe, eot = 2, 3

  def encode(self, text):
    return [100 + len(word) for word in text.split()]


def _fill(template, length, **texts):
  return fill_template(_Letters(), template, texts, length)


class FillTemplateTest(parameterized.TestCase):

  def test_one_text(self):
    ids, slot = _fill('{a} <eot> it is <spe> . <eot>', 20, a=[11, 12])
    self.assertEqual(ids, [11, 12, 3, 102, 102, 2, 101, 3])
    self.assertEqual(slot, 5)

  def test_two_texts(self):
    ids, slot = _fill('{a} <eot> <spe> , {b} <eot>', 20, a=[11], b=[21, 22])
    self.assertEqual(ids, [11, 3, 2, 101, 21, 22, 3])
    self.assertEqual(slot, 2)

  @parameterized.named_parameters(
      # 9 - 4 fixed tokens = 5: b at most 5 // 2 = 2, a the rest.
      ('both_long', 9, 8, 8, 3, 2),
      ('short_b_leaves_more_to_a', 9, 8, 1, 4, 1),
      ('short_a_leaves_nothing_to_b', 9, 1, 8, 1, 2),
      ('smallest', 6, 8, 8, 1, 1),
      ('exact', 10, 3, 3, 3, 3),
  )
  def test_texts_are_cut_before_filling(self, length, a, b, kept_a, kept_b):
    ids, slot = _fill('{a} <eot> <spe> , {b} <eot>', length, a=[11] * a, b=[21] * b)
    self.assertEqual(ids, [11] * kept_a + [3, 2, 101] + [21] * kept_b + [3])
    self.assertEqual(slot, kept_a + 1)

  @parameterized.named_parameters(
      ('no_slot', '{a} <eot>', "has 0 slots <spe>"),
      ('two_slots', '{a} <spe> <spe> <eot>', "has 2 slots <spe>"),
      ('no_end', '{a} <spe> .', "must end in <eot>"),
      ('unknown_field', '{txt_a} <spe> <eot>', "'txt_a', which the texts lack; did you mean 'text_a'"),
      ('stray_brace', '{a b} <spe> <eot>', 'brace that encloses no field'),
  )
  def test_refused(self, template, message):
    with self.assertRaisesRegex(ValueError, message):
      _fill(template, 20, a=[11], text_a=[11])

  def test_too_small_a_length_says_what_is_needed(self):
    with self.assertRaisesRegex(ValueError, 'length 5 is too small .* needs at least 6'):
      _fill('{a} <eot> <spe> , {b} <eot>', 5, a=[11], b=[21])


if __name__ == '__main__':
  absltest.main()
