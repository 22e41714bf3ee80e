"""ROUGE-L and CIDEr-D against numbers worked out by hand, in the comments, and against the COCO caption toolkit."""

import math

from absl.testing import absltest, parameterized

from uni_moe_jax.eval import caption_metrics

_BOTH = (('rouge_l', caption_metrics.rouge_l), ('cider_d', caption_metrics.cider_d))


class RougeTest(parameterized.TestCase):

  @parameterized.parameters(
      # "a c d" is common: P = 3/3, R = 3/4; 2.44 · 1 · .75 / (.75 + 1.44 · 1).
      ('a c d', ['a b c d'], 2.44 * .75 / (.75 + 1.44)),
      # Order counts: of "b a" one word is common, P = R = 1/2, and so is the score.
      ('b a', ['a b'], .5),
      # P = 1/2 of the first, R = 1/1 of the second reference: each the best on its own.
      ('a b', ['a x y z', 'b'], 2.44 * .5 * 1 / (1 + 1.44 * .5)),
      ('a b', ['c d'], 0.), ('', ['a'], 0.),
  )
  def test_by_hand(self, prediction, references, expected):
    self.assertAlmostEqual(caption_metrics.rouge_l([prediction], [references])[0], expected)

  def test_every_example_has_its_own(self):
    self.assertEqual(caption_metrics.rouge_l(['a', 'b a'], ['a', 'a b']).tolist(), [1., .5])


class CiderTest(parameterized.TestCase):

  def test_equal_texts_score_ten(self):
    # Every n-gram up to four words is there, and none is in every example.
    texts = ['a b c d', 'e f g h']
    self.assertAlmostEqual(caption_metrics.cider_d(texts, texts).mean(), 10.)

  def test_ngrams_that_a_text_is_too_short_for_score_nothing(self):
    # One word of two examples: cosine 1 for n = 1, none for 2, 3, 4: 10 · 1/4. "b" scores nothing.
    self.assertAlmostEqual(caption_metrics.cider_d(['a', 'b'], ['a', 'c']).mean(), 10 / 4 / 2)

  def test_rare_words_weigh_more_and_length_fades(self):
    # Three examples; a is in 2 of 3 references, b in 1, so with u = log(3/2), w = log 3, n = 1: prediction
    # "a" = (u, 0), reference "a b" = (u, w), cosine u / √(u² + w²); no longer n-gram. One word too short:
    # exp(-1 / 72). The others: 0.
    u, w = math.log(3 / 2), math.log(3)
    expected = 10 * u / math.hypot(u, w) / 4 * math.exp(-1 / 72) / 3
    self.assertAlmostEqual(caption_metrics.cider_d(['a', 'x', 'x'], ['a b', 'a', 'c']).mean(), expected)

  def test_repeating_a_word_is_clipped_at_the_reference(self):
    # n = 1: prediction 3w, reference w, clipped to w · w / (3w · w) = 1/3, where a cosine would be 1. n = 2: "a a" is
    # in no reference. Two words too long: exp(-4 / 72). Mean over n: / 4, over two examples: / 2.
    self.assertAlmostEqual(
        caption_metrics.cider_d(['a a a', 'x'], ['a', 'b']).mean(), 10 / 3 / 4 * math.exp(-4 / 72) / 2)

  def test_several_references_are_averaged_and_count_an_ngram_once(self):
    # "a" is in both references of the first example: still one example of two, weight log 2 like "c". Reference "a":
    # 10/4. Reference "a c": cosine 1/√2 for n = 1, one word too short. Mean over references: / 2, over examples: / 2.
    expected = (10 / 4 + 10 / 4 / math.sqrt(2) * math.exp(-1 / 72)) / 2 / 2
    self.assertAlmostEqual(caption_metrics.cider_d(['a', 'x'], [['a', 'a c'], ['b']]).mean(), expected)

  def test_words_of_every_example_carry_no_information(self):
    self.assertEqual(caption_metrics.cider_d(['a', 'a'], ['a', 'a']).tolist(), [0., 0.])


class BothTest(parameterized.TestCase):

  def test_numbers_of_the_coco_caption_toolkit(self):
    # pycocoevalcap 1.2, `Cider()` and `Rouge()`, on the same texts (lower case, no punctuation).
    predictions = ['a small red star on the left', 'two discs move to the right', 'a bar', 'the the the star of a']
    references = [['a red star on the left', 'one small star'], ['two discs go right', 'discs that move to the right'],
                  ['a long bar at the left'], ['the star', 'a star of the left', 'a big star']]
    self.assertAlmostEqual(caption_metrics.cider_d(predictions, references).mean(), 2.652638653975, places=9)
    self.assertAlmostEqual(caption_metrics.rouge_l(predictions, references).mean(), 0.694397720125, places=9)

  @parameterized.named_parameters(*_BOTH)
  def test_case_and_punctuation_do_not_count_and_words_do(self, metric):
    plain, spoken, other = 'a red star , on the left', 'A red star on the LEFT.', 'A red disc on the LEFT.'
    of = lambda text: metric([text, 'x'], [plain, 'b']).mean()
    self.assertAlmostEqual(of(spoken), of('a red star on the left'))
    self.assertLess(of(other), of(spoken) - .05)

  @parameterized.named_parameters(*_BOTH)
  def test_letters_beyond_ascii_are_words(self, metric):
    self.assertGreater(metric(['größe λ', 'x'], ['größe λ', 'b'])[0], metric(['größe μ', 'x'], ['größe λ', 'b'])[0])

  @parameterized.named_parameters(*_BOTH)
  def test_nothing_to_score_is_an_error(self, metric):
    with self.assertRaisesRegex(ValueError, 'no examples'):
      metric([], [])
    with self.assertRaisesRegex(ValueError, 'example 1 has no reference'):
      metric(['a', 'b'], ['a', []])


if __name__ == '__main__':
  absltest.main()
