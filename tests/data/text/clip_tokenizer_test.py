"""CLIP's tokenizer: ids computed by hand with four merges, cleaning and splitting of text, invalid files.

Ids of bytes: the printable bytes 33…126, 161…172, 174…255 have the ids 0…187, the others follow. The id of a byte below
127 is its code - 33; from 161 on, code - 67; from 174 on, code - 68. At the end of a word 256 is added.
  a 64, e 68, h 71, p 79, s 82, t 83; . 13; ! 0; & 5; < 27
Merges: 512 th, 513 the</w>, 514 sp, 515 spe</w>. Specials: 516 start, 517 end of text, 518 mask, 519 gen, 520 spe.
"""

import gzip
import pathlib
import sys
from unittest import mock

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from uni_moe_jax.data.text import clip_tokenizer
from uni_moe_jax.data.text.clip_tokenizer import ClipTokenizer

_MERGES = '#version: 0.2\nt h\nth e</w>\ns p\nsp e</w>\n'
_PACKED = gzip.compress(_MERGES.encode(), mtime=0)  # no time stamp, which would change the names of tests
END = 256  # added to the id of a byte that ends a word
THE, SPE_WORD = 513, 515
EOT, SPE = 517, 520


@pytest.fixture(name='clip')
def _clip(tmp_path):
  return ClipTokenizer(_written(tmp_path, _MERGES))


def _written(folder: pathlib.Path, text: str | bytes) -> pathlib.Path:
  path = folder / 'merges.txt'
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return path


def test_the_vocabulary_is_bytes_word_ends_merges_and_five_specials(clip):
  assert clip.size == 256 + 256 + 4 + 5
  assert (clip.eot, clip.spe, clip.pad) == (EOT, SPE, 0)
  assert clip.special_ids == {516, 517, 518, 519, 520}


@pytest.mark.parametrize('text, ids', [
    # Merges apply in order and only where they match.
    ('the', [THE]),  # t h → th, th e</w> → the</w>
    ('thea', [512, 68, 64 + END]),  # th is merged; the e does not end a word, so 'th e</w>' does not apply
    ('he', [71, 68 + END]),
    ('ththe', [512, THE]),
    ('spspe', [514, SPE_WORD]),
    ('stp', [82, 83, 79 + END]),
    ('', []),
    # Other alphabets are encoded as bytes. é is C3 A9: 195 - 68 = 127, and 169 - 67 = 102 at the end of the word.
    ('é', [127, 102 + END]),
    # 字 is E5 AD 97: 229 - 68 = 161. AD is not printable: with 33 below 33 and 34 in 127…160, it is the last of 68
    # such bytes, 188 + 67 = 255. 97 (151) is number 33 + 24 = 57 of them: 188 + 57 = 245.
    ('字', [161, 255, 245 + END]),
    ('Éé', [127, 102, 127, 102 + END]),
    # A text can spell four of the special tokens.
    ('<|spe|>', [SPE]),
    ('the<|SPE|>the', [THE, SPE, THE]),
    ('the <|endoftext|>', [THE, EOT]),
    ('<|startoftext|><|gen|>', [516, 519]),
    ('<|spe|>.', [SPE, 13 + END]),
    ('&lt;|spe|&gt;', [SPE]),
    # The mask token is not among them: '<|', 'mask', '|>'; m 76, k 74; | 91, > 29. Neither is the word 'spe'.
    ('<|mask|>', [27, 91 + END, 76, 64, 82, 74 + END, 91, 29 + END]),
    ('spe', [SPE_WORD]),
    # Matching proceeds from the left: '.<|', 'spe', '|>'. Punctuation before a special token absorbs its bracket.
    ('.<|spe|>', [13, 27, 91 + END, SPE_WORD, 91, 29 + END]),
    ('!!', [0, END]),
])
def test_a_text_is_encoded_as(clip, text, ids):
  assert clip.encode(text) == ids


def test_the_earlier_merge_wins(tmp_path):
  # In 'ath', 'a t' comes first in one file, 't h</w>' in the other.
  first, second = (ClipTokenizer(_written(tmp_path, f'#version: 0\n{m}\n')) for m in ('a t\nt h</w>', 't h</w>\na t'))
  assert first.encode('ath') == [512, 71 + END]  # at h
  assert second.encode('ath') == [64, 512]  # a th


def test_the_alphabet_equals_that_of_byte_level_tokenizers():
  symbols = clip_tokenizer._byte_symbols()
  assert sorted(symbols.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
  assert [symbols[0], symbols[32], symbols[173]] == ['Ā', 'Ġ', 'Ń']  # 256 + 0, 256 + 32, 256 + 67


@pytest.mark.parametrize('text, same', [
    ('The tHE', 'the the'),
    (' \tthe\n\u2003 the\u00a0', 'the the'),
    ('&amp;', '&'),
    # With a '<' in the text, ftfy does not unescape entities: of three levels, two are unescaped and one remains.
    ('< &amp;amp;', '< &'),
    ('< &amp;amp;amp;', '< & amp;'),
    ('the&eacute;', 'theé'),
    ('thÃ©', 'thé'),  # UTF-8 read as Latin-1
    ('the’s', "the's"),
    ('ﬁ', 'fi'),
    ('e\u0301', 'é'),
])
def test_a_text_is_repaired_and_lower_cased_before_it_is_split(clip, text, same):
  assert clip.encode(text) == clip.encode(same)


@pytest.mark.parametrize('text, words', [
    ("it's", ['it', "'s"]),
    ("they'll've", ['they', "'ll", "'ve"]),
    ("'top'", ["'t", 'op', "'"]),  # an English ending, regardless of what follows
    ("it'ſ", ['it', "'ſ"]),  # the long s is an s
    ('a1234b', ['a', '1', '2', '3', '4', 'b']),
    ('the, end...!', ['the', ',', 'end', '...!']),
    ('naïve字', ['naïve字']),
    ('a_b', ['a', '_', 'b']),
])
def test_words_are_letters_single_digits_endings_and_punctuation_runs(clip, text, words):
  assert clip.decode(clip.encode(text)) == ' '.join(words)


def test_a_batch_is_encoded_text_by_text(clip):
  assert clip.encode_batch(np.array(['the', '', 'spe <|spe|>'])) == [[THE], [], [SPE_WORD, SPE]]


@pytest.mark.parametrize('text', [
    'the spe of a thing', "don 't , ever ...", '!! ! a', 'naïve 字 😀 \u200d', 'a < / w > b'])
def test_decoding_restores_a_split_text(clip, text):
  assert clip.decode(clip.encode(text)) == text


@pytest.mark.parametrize('ids, text', [
    ([SPE, THE, 516, 518, 519, SPE_WORD, EOT, THE, EOT, 0], 'the spe'),
    ([0, END, EOT, 0, 0], '!!'),  # before `eot`, a pad is the piece with its id
    ([127, THE, EOT], '�the'),  # C3 without its second byte
])
def test_decoding_stops_at_eot_drops_special_tokens_and_replaces_invalid_bytes(clip, ids, text):
  assert clip.decode(np.array(ids, np.int32)) == text


def test_a_masking_unit_ends_where_a_word_ends(clip):
  for table in (clip.word_start, clip.word_end):
    assert (table.shape, table.dtype) == ((521,), bool)
  # t h e a | the | . . | <|spe|> | a
  ids = clip.encode('thea the .. <|spe|> a')
  assert clip.word_end[ids].tolist() == [False, False, True, True, False, True, True, True]
  assert clip.word_start[ids].tolist() == [False] * 6 + [True, False]


@pytest.mark.parametrize('content', [_PACKED, _MERGES.replace('\n', '\r\n')], ids=['gzipped', 'Windows line ends'])
def test_the_same_merges_in_another_file_give_the_same_tokenizer(clip, tmp_path, content):
  other = ClipTokenizer(_written(tmp_path, content))
  assert other.encode('the spe') == [THE, SPE_WORD]
  assert other.fingerprint == clip.fingerprint


def test_other_merges_have_another_fingerprint(clip, tmp_path):
  other = ClipTokenizer(_written(tmp_path, _MERGES.replace('s p\nsp e</w>', 'p s\nps e</w>')))
  assert other.size == clip.size
  assert other.fingerprint != clip.fingerprint


def test_merges_beyond_the_48894_of_the_published_vocabulary_are_ignored(clip, tmp_path):
  with mock.patch.object(clip_tokenizer, 'MAX_MERGES', 2):
    short = ClipTokenizer(_written(tmp_path, _MERGES + 'no merge at all\n'))
  assert short.size == clip.size - 2
  assert short.encode('the spe') == [THE, 82, 79, 68 + END]
  assert (clip_tokenizer.MAX_MERGES, clip_tokenizer.VOCAB_SIZE) == (48894, 49411)


def test_a_missing_file_is_named_with_its_field(tmp_path):
  message = r"config\.tokenizer\.merges_path='.*no\.txt' is not a file; give the path"
  with pytest.raises(FileNotFoundError, match=message):
    ClipTokenizer(tmp_path / 'no.txt')


@pytest.mark.parametrize('content, message', [
    ('', r'line 1 must be the version comment'),
    ('t h\nth e</w>\n', r"line 1 must be the version comment, such as '#version: 0\.2', not \['t h'\]"),
    (_MERGES + 'one\n', r"line 6, 'one', must be two earlier pieces"),
    (_MERGES + 'a b c\n', r"line 6, 'a b c', must be two earlier pieces"),
    (_MERGES + '\n' + 'a b\n', r"line 6, '', must be two earlier pieces"),
    (_MERGES + 'th ey\n', r"line 6, 'th ey', must be two earlier pieces"),
    (_MERGES + 'a </w>\n', r"line 6, 'a </w>', must be two earlier pieces"),
    (_MERGES + 'the</w> a\n', r"line 6, 'the</w> a', .* the first must not end a word"),
    (_MERGES + 't h\n', r"line 6, 't h', .* that make a new one"),
    (b'\xff\xfe\x00t', r'is neither gzipped nor plain UTF-8 text \(.*\); download it again'),
    (_PACKED[:-9], r'is neither gzipped nor plain UTF-8 text \(.*ended'),
    (_PACKED[:10] + b'garbled', r'is neither gzipped nor plain UTF-8 text \(.*decompressing'),
    (_PACKED[:-8] + b'checksum', r'is neither gzipped nor plain UTF-8 text \(CRC'),
])
def test_an_invalid_file_is_named_with_field_and_line(tmp_path, content, message):
  with pytest.raises(ValueError, match=r'config\.tokenizer\.merges_path=.*merges\.txt.*' + message):
    ClipTokenizer(_written(tmp_path, content))


@pytest.mark.parametrize('library', ['ftfy', 'regex', 'tokenizers'])
def test_a_missing_library_is_named_with_the_command_to_install_it(tmp_path, library):
  message = r"config\.tokenizer\.type='clip' requires pip install '\.\[clip\]': .*" + library
  with mock.patch.dict(sys.modules, {library: None}), pytest.raises(ValueError, match=message):
    ClipTokenizer(_written(tmp_path, _MERGES))


@pytest.mark.parametrize('text', [
    "the man's dog isn't here, they'd say.", 'in 2011, 3 men (of 1,000) paid $2.5!', 'a black-and-white cat and/or dog',
    "the 2nd train at 10:30 a.m. or 5 o'clock; the 80s", "50% of the boys' bikes: #5?"])
def test_a_detokenized_text_is_as_people_write_it(clip, text):
  decoded = clip.decode(clip.encode(text))
  assert clip.detokenize(decoded) == text != decoded


def test_of_two_texts_with_equal_tokens_the_usual_one_is_restored(clip):
  assert clip.encode('a - b 1 2') == clip.encode('a-b 12')
  assert clip.detokenize(clip.decode(clip.encode('a - b 1 2'))) == 'a-b 12'
