"""The SentencePiece tokenizer: training, encoding, special tokens, word boundaries; and packing of tokens."""

import pydoc_data.topics

import numpy as np
import pytest

from uni_moe_jax.data.text import tokenizer
from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer
from uni_moe_jax.data.text.words import number_words

_TEXTS = [line for _, text in sorted(pydoc_data.topics.topics.items()) for line in text.split('\n')][:4000]
_SIZE = 400


@pytest.fixture(name='model_file', scope='module')
def _model_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('tokenizer') / 'new folder' / 'words.model'
  SentencePieceTokenizer.train(_TEXTS, path, _SIZE)
  return path


@pytest.fixture(name='words')
def _words(model_file):
  return SentencePieceTokenizer(model_file)


def test_training_twice_gives_the_same_bytes_and_the_same_tokenizer(model_file, words, tmp_path):
  again = SentencePieceTokenizer.train(iter(_TEXTS), tmp_path / 'again.model', _SIZE)
  assert (tmp_path / 'again.model').read_bytes() == model_file.read_bytes()
  assert again.encode('the value') == words.encode('the value')


def test_special_ids_are_distinct(words):
  assert (words.size, words.pad, len(words.special_ids)) == (_SIZE, 0, 4)
  assert words.special_ids == {words.pad, words.unk, words.spe, words.eot}


@pytest.mark.parametrize('text', ['<spe>', '<eot>', '<pad>', 'a<eot>b <spe>', '▁<spe>▁'])
def test_no_text_spells_a_special_token(words, text):
  ids = words.encode(text)
  assert ids
  assert words.special_ids.isdisjoint(set(ids) - {words.unk}), ids


def test_training_on_spelled_special_tokens_adds_no_piece_for_them(tmp_path):
  t = SentencePieceTokenizer.train(_TEXTS + ['<spe> it is <eot>'] * 500, tmp_path / 'spelled.model', _SIZE)
  assert {t.spe, t.eot}.isdisjoint(t.encode('<spe> it is <eot>'))


@pytest.mark.parametrize('text, normalized', [
    ('The Value of the Object.', 'the value of the object.'),
    ('ﬁnal\tＶＡＬＵＥ', 'final value'),
    ('  the  value\n', 'the value'),
    ('', ''),
])
def test_decoding_gives_the_normalized_text(words, text, normalized):
  assert words.decode(words.encode(text)) == normalized


def test_decoding_stops_at_eot_and_drops_special_tokens(words):
  value, other = words.encode('the value'), words.encode('another')
  ids = [words.spe, *value, words.pad, words.unk, words.eot, *other, words.eot]
  assert words.decode(np.array(ids, np.int32)) == 'the value'


def test_a_batch_is_encoded_text_by_text_and_an_unseen_character_is_unknown(words):
  ids = words.encode_batch(np.array(['the value', '', '字']))
  assert ids == [words.encode('the value'), [], words.encode('字')]
  assert words.unk not in ids[0] and words.unk in ids[2]


def test_words_and_punctuation_start_units(words):
  assert (words.word_start.shape, words.word_start.dtype) == ((_SIZE,), bool)
  ids = words.encode('unforgettable, zebra')  # not in the training texts: several pieces per word
  comma = ids.index(words.encode('the,')[-1])
  assert np.flatnonzero(words.word_start[ids]).tolist() == [0, comma, comma + 1]
  assert 1 < comma < len(ids) - 2
  assert words.word_start[list(words.special_ids)].all()


def test_where_a_script_has_no_spaces_every_piece_is_a_unit(tmp_path):
  """Pieces are words of such a script, more or less; a Latin word among them is one unit, of however many pieces."""
  texts = ['東京は日本の首都', 'กรุงเทพฯ', 'ab ba jaxb'] * 50
  t = SentencePieceTokenizer.train(texts, tmp_path / 'mixed.model', 30, allow_smaller_vocab=True)
  ids = t.encode('首都jaxb東京')
  latin = [i for i, one in enumerate(ids) if t.decode([one]).isascii() and t.decode([one])]
  assert len(latin) > 1 and latin == list(range(latin[0], latin[-1] + 1)) and 0 < latin[0] and latin[-1] < len(ids) - 1
  units = number_words(np.array([ids]), t).numpy()[0].tolist()
  assert len(set(units[latin[0]:latin[-1] + 1])) == 1 and len(set(units)) == len(ids) - len(latin) + 1
  thai = t.encode('กรุงเทพ')[1:]  # after the piece of a beginning
  assert len(thai) > 1 and len(set(number_words(np.array([thai]), t).numpy()[0].tolist())) == len(thai)


def test_a_missing_file_and_a_model_without_special_tokens_are_refused(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match='no_such.model'):
    SentencePieceTokenizer('no_such.model')
  monkeypatch.setitem(tokenizer._TRAINER, 'control_symbols', ['<eot>'])
  with pytest.raises(ValueError, match=r'plain\.model has no <spe>'):
    SentencePieceTokenizer.train(_TEXTS, tmp_path / 'plain.model', _SIZE)


def test_a_too_large_vocabulary_names_the_bound_and_leaves_no_file(tmp_path):
  with pytest.raises(ValueError, match=r'vocabulary of 5000 pieces.*<= \d+'):
    SentencePieceTokenizer.train(['a few words', 'and a few more'], tmp_path / 'large.model', 5000)
  assert not (tmp_path / 'large.model').exists()


def test_a_smaller_vocabulary_is_allowed_on_request_and_used_only_if_necessary(words, tmp_path):
  small = SentencePieceTokenizer.train(
      ['a few words', 'and a few more'], tmp_path / 'small.model', 5000, allow_smaller_vocab=True)
  assert small.size < 50
  assert small.decode(small.encode('a few words')) == 'a few words'
  full = SentencePieceTokenizer.train(_TEXTS, tmp_path / 'full.model', _SIZE, allow_smaller_vocab=True)
  assert [full.encode(t) for t in _TEXTS] == [words.encode(t) for t in _TEXTS]


@pytest.mark.parametrize('separator', [' ', ''])
def test_a_text_of_any_length_trains(tmp_path, monkeypatch, separator):
  """A book of 36 kB where the trainer takes texts of up to 2 kB, beside a name that it must not be alone with."""
  monkeypatch.setattr(tokenizer, '_MAX_TRAINED_BYTES', 2000)
  monkeypatch.setitem(tokenizer._TRAINER, 'max_sentence_length', 2000)
  book = separator.join(['größere', 'Häuser', '𝔚älder'] * 500)
  t = SentencePieceTokenizer.train(['name', book], tmp_path / 'book.model', 60, allow_smaller_vocab=True)
  assert t.unk not in t.encode(book) and t.decode(t.encode('größere Häuser')) == 'größere häuser'
  if separator:  # no word is cut
    assert [len(t.encode(word)) for word in ('größere', 'Häuser', '𝔚älder')] == [1, 1, 1]
  parts = list(tokenizer.trained_parts(book))
  assert len(parts) > 3 and ''.join(parts) == book and max(len(part.encode()) for part in parts) <= 2000
  assert list(tokenizer.trained_parts(short := 'ä ' * 600)) == [short] and list(tokenizer.trained_parts('')) == ['']
