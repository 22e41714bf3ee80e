import pathlib
import pydoc_data.topics
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from uni_moe_jax.data.pipeline import tokenizer
from uni_moe_jax.data.pipeline.tokenizer import SentencePieceTokenizer

_TOPICS = sorted(pydoc_data.topics.topics.items())
_TEXTS = [line for _, text in _TOPICS for line in text.split('\n')][:4000]
_SIZE = 400


class SentencePieceTokenizerTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = absltest.get_default_test_tmpdir()
    cls.file = pathlib.Path(folder, 'tokenizer_test', 'words.model')
    cls.tokenizer = SentencePieceTokenizer.train(_TEXTS, cls.file, _SIZE)

  def test_training_twice_gives_the_same_bytes(self):
    again = self.file.with_name('again.model')
    SentencePieceTokenizer.train(iter(_TEXTS), again, _SIZE)
    self.assertEqual(again.read_bytes(), self.file.read_bytes())

  def test_special_ids(self):
    t = self.tokenizer
    self.assertEqual(t.size, _SIZE)
    self.assertEqual(t.pad, 0)
    self.assertLen({t.pad, t.unk, t.spe, t.eot}, 4)
    self.assertEqual(t.special_ids, {t.pad, t.unk, t.spe, t.eot})

  @parameterized.parameters('<spe>', '<eot>', '<pad>', 'a<eot>b <spe>', '▁<spe>▁')
  def test_no_text_spells_a_special_token(self, text):
    t = self.tokenizer
    ids = t.encode(text)
    self.assertNotEmpty(ids)
    self.assertTrue(t.special_ids.isdisjoint(set(ids) - {t.unk}), ids)

  def test_training_on_special_spellings_adds_no_piece_for_them(self):
    t = SentencePieceTokenizer.train(
        _TEXTS + ['<spe> it is <eot>'] * 500, self.file.with_name('spelt.model'), _SIZE)
    self.assertTrue({t.spe, t.eot}.isdisjoint(t.encode('<spe> it is <eot>')))

  @parameterized.parameters(
      ('The Value of the Object.', 'the value of the object.'),
      ('ﬁnal\tＶＡＬＵＥ', 'final value'),
      ('  the  value\n', 'the value'),
      ('', ''),
  )
  def test_decoding_gives_the_folded_text(self, text, folded):
    self.assertEqual(self.tokenizer.decode(self.tokenizer.encode(text)), folded)

  def test_decoding_stops_at_eot_and_drops_specials(self):
    t = self.tokenizer
    value, other = t.encode('the value'), t.encode('another')
    ids = [t.spe, *value, t.pad, t.unk, t.eot, *other, t.eot]
    self.assertEqual(t.decode(np.array(ids, np.int32)), 'the value')

  def test_a_batch_is_each_text(self):
    found = self.tokenizer.encode_batch(np.array(['the value', '', 'an object']))
    self.assertEqual(
        found, [self.tokenizer.encode('the value'), [], self.tokenizer.encode('an object')])

  def test_an_unseen_character_is_unknown(self):
    self.assertIn(self.tokenizer.unk, self.tokenizer.encode('字'))
    self.assertNotIn(self.tokenizer.unk, self.tokenizer.encode('the value'))

  def test_words_and_punctuation_start_units(self):
    t = self.tokenizer
    self.assertEqual(t.word_start.shape, (_SIZE,))
    self.assertEqual(t.word_start.dtype, bool)
    ids = t.encode('unforgettable, zebra')  # no such words in the texts: several pieces each
    comma = ids.index(t.encode('the,')[-1])
    starts = t.word_start[ids]
    self.assertEqual(list(np.flatnonzero(starts)), [0, comma, comma + 1])
    self.assertGreater(comma, 1)
    self.assertGreater(len(ids), comma + 2)
    self.assertTrue(t.word_start[list(t.special_ids)].all())

  def test_reading_gives_the_same_tokenizer(self):
    again = SentencePieceTokenizer(self.file)
    self.assertEqual(again.encode('the value'), self.tokenizer.encode('the value'))

  def test_a_missing_file_is_named(self):
    with self.assertRaisesRegex(FileNotFoundError, 'no_such.model'):
      SentencePieceTokenizer('no_such.model')

  def test_a_model_without_special_tokens_is_refused(self):
    other = self.file.with_name('plain.model')
    with mock.patch.dict(tokenizer._TRAINER, control_symbols=['<eot>']):
      with self.assertRaisesRegex(ValueError, r'plain\.model has no <spe>'):
        SentencePieceTokenizer.train(_TEXTS, other, _SIZE)

  def test_too_large_a_vocabulary_says_the_bound_and_leaves_no_file(self):
    file = self.file.with_name('large.model')
    with self.assertRaisesRegex(ValueError, r'vocabulary of 5000 pieces.*<= \d+'):
      SentencePieceTokenizer.train(['a few words', 'and a few more'], file, 5000)
    self.assertFalse(file.exists())

  def test_fewer_pieces_will_do_where_asked_and_of_enough_text_none_are_missing(self):
    few = SentencePieceTokenizer.train(['a few words', 'and a few more'], self.file.with_name('few.model'), 5000, allow_smaller_vocab=True)
    self.assertLess(few.size, 50)
    self.assertEqual(few.decode(few.encode('a few words')), 'a few words')
    enough = SentencePieceTokenizer.train(_TEXTS, self.file.with_name('enough.model'), _SIZE, allow_smaller_vocab=True)
    self.assertEqual([enough.encode(t) for t in _TEXTS], [self.tokenizer.encode(t) for t in _TEXTS])


class PackTest(parameterized.TestCase):

  def test_texts_end_in_eot_and_fill_rows(self):
    rows = tokenizer.pack_tokens([[5, 6], [7], [8, 9, 10]], length=4, eot=3)
    # 5 6 3 7 | 3 8 9 10 | 3 (left out)
    np.testing.assert_array_equal(rows, [[5, 6, 3, 7], [3, 8, 9, 10]])
    self.assertEqual(rows.dtype, np.int32)

  def test_less_than_a_row_is_refused(self):
    with self.assertRaisesRegex(ValueError, '3 tokens do not fill a row of length 4'):
      tokenizer.pack_tokens([[5, 6]], length=4, eot=3)


if __name__ == '__main__':
  absltest.main()
