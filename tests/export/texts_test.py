"""Texts of an exported model: templates are filled and captions are decoded as in training."""

import gzip
import json
import pathlib
import sys
import types

import numpy as np
import pytest

from tests.helpers import small_model, tiny
from uni_moe_jax.data.text.clip_tokenizer import ClipTokenizer
from uni_moe_jax.data.text.templates import fill_template, template_parts
from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from uni_moe_jax.export import artifact, contents
from uni_moe_jax.export.programs import ExportedTask
from uni_moe_jax.export.texts import Texts

_LENGTH = 16
_LONG = 'a small shape moves over every line and returns its value'


def _texts(folder: pathlib.Path, tokenizer: Tokenizer, file: pathlib.Path, template: str = '', tokens=()) -> Texts:
  """Texts of a model with one task, which always returns the same ids."""
  manifest = {'tasks': {'answer': {'template_parts': template_parts(template), 'max_len': _LENGTH}},
              'tokenizer': artifact.write_tokenizer(folder, tokenizer, file)}
  manifest = json.loads(json.dumps(manifest))  # as read from its file
  return Texts(types.SimpleNamespace(manifest=manifest, folder=folder,
                                     run=lambda *_, **__: {'tokens': np.array(tokens)}))


@pytest.mark.parametrize('template', ['{text_a} <eot> <spe> , {text_b} <eot>', '{text_a|no_stop} it is <spe> <eot>'])
@pytest.mark.parametrize('a', ['a', 'a.', _LONG])
@pytest.mark.parametrize('b', ['a shape', _LONG])
def test_a_template_is_filled_as_in_training(tmp_path, template, a, b):
  file = pathlib.Path(tiny.tokenizer_file())
  tokenizer = SentencePieceTokenizer(file)
  words = _texts(tmp_path, tokenizer, file, template)
  filled = words.fill('answer', **{name: x for name, x in (('text_a', a), ('text_b', b)) if name in template})
  row, slot, _ = fill_template(tokenizer, template, {'text_a': a, 'text_b': b}, _LENGTH)
  assert filled['text'].tolist() == [row] and filled['position'].tolist() == [[slot]]
  assert filled['text_valid'].tolist() == [[True] * len(row)]
  assert (len(row) == _LENGTH) == (a == _LONG)  # the first text gets the tokens that the last leaves


def test_a_column_may_have_any_name(tmp_path):
  file = pathlib.Path(tiny.tokenizer_file())
  tokenizer = SentencePieceTokenizer(file)
  template, row = '{task} in {self} <spe> <eot>', {'task': 'a shape', 'self': 'line'}
  filled = _texts(tmp_path, tokenizer, file, template).fill('answer', **row)
  assert filled['text'].tolist() == [fill_template(tokenizer, template, row, _LENGTH).ids]


def test_no_text_gives_rows_of_no_text(tmp_path):
  file = pathlib.Path(tiny.tokenizer_file())
  words = _texts(tmp_path, SentencePieceTokenizer(file), file)
  for texts in ([], ['a', 'a shape']):
    tokens = words.tokens(texts, 5)
    assert tokens['text'].shape == tokens['text_valid'].shape == (len(texts), 5)
    assert (tokens['text'].dtype, tokens['text_valid'].dtype) == (np.int32, bool)


def test_every_mask_is_one_token(tmp_path):
  file = pathlib.Path(tiny.tokenizer_file())
  tokenizer = SentencePieceTokenizer(file)
  encode, spe, eot = tokenizer.encode, tokenizer.spe, tokenizer.eot
  words = _texts(tmp_path, tokenizer, file)
  masked = words.masked('a [mask] shape[mask]', _LENGTH)
  row = [*encode('a'), spe, *encode('shape'), spe, eot]
  assert masked['text'].tolist() == [row] and masked['text_valid'].tolist() == [[True] * len(row)]
  assert masked['position'].tolist() == [[len(encode('a')), len(row) - 2]]
  cut = words.masked(f'[mask] {_LONG} [mask]', 4)  # the last mask is beyond the length
  assert cut['text'].tolist() == [[spe, *encode(_LONG)[:2], eot]] and cut['position'].tolist() == [[0]]


def test_captions_in_the_clip_vocabulary_are_decoded_without_a_library(tmp_path, monkeypatch):
  file = tmp_path / 'merges.txt.gz'
  file.write_bytes(gzip.compress(b'#version: a test\nt h\nth e</w>\n'))
  tokenizer = ClipTokenizer(file)
  # The first bytes of the third are not a valid character; the last ends at once.
  rows = [tokenizer.encode("The theatre's 2nd, Анна!"), [tokenizer.spe, *tokenizer.encode('dé')], [132, 7, 0],
          [tokenizer.eot]]
  tokens = [(row + [tokenizer.eot, 5, 5, 5] * 9)[:24] for row in rows]
  folder = tmp_path / 'model'
  folder.mkdir()
  for library in ('sentencepiece', 'ftfy', 'regex', 'tokenizers'):
    monkeypatch.setitem(sys.modules, library, None)  # an import of it fails
  words = _texts(folder, tokenizer, file, tokens=tokens)
  captions = words.captions('answer', None)
  assert captions == [tokenizer.detokenize(tokenizer.decode(row)) for row in tokens]
  examples = contents._answers(
      types.SimpleNamespace(captions=lambda *_: list(map(tokenizer.decode, tokens))), tokenizer,
      ExportedTask(small_model.task_spec('image_caption')), {}, {'pixels': np.zeros(len(tokens))})
  assert examples == captions
  assert captions[0] == "the theatre's 2nd, анна!" and '\ufffd' in captions[2]
  assert (folder / 'tokenizer.txt.gz').read_bytes() == file.read_bytes()
  with pytest.raises(ValueError, match=rf'your texts with the merges of tokenizer.txt.gz .* {tokenizer.eot}\.'):
    words.tokens(['a text'], 8)
