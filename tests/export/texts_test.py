"""Texts of an exported model: templates filled, and captions written, as in training."""

import pathlib
import types

import pytest

from tests import tiny
from uni_moe_jax.data.templates import fill_template
from uni_moe_jax.data.tokenizer import SentencePieceTokenizer
from uni_moe_jax.export.texts import Texts

_LENGTH = 16
_LONG = 'a small shape moves over every line and returns its value'


def _texts(template: str = '') -> tuple[Texts, SentencePieceTokenizer]:
  """Texts of a model with one task, and its tokenizer."""
  file = pathlib.Path(tiny.tokenizer_file())
  tokenizer = SentencePieceTokenizer(file)
  facts = {'kind': 'sentencepiece', 'file': file.name, 'spe': tokenizer.spe, 'eot': tokenizer.eot}
  manifest = {'tasks': {'answer': {'template': template, 'length': _LENGTH}}, 'tokenizer': facts}
  return Texts(types.SimpleNamespace(manifest=manifest, folder=file.parent)), tokenizer


@pytest.mark.parametrize('template', ['{text_a} <eot> <spe> , {text_b} <eot>', '{text_a} it is <spe> <eot>'])
@pytest.mark.parametrize('a', ['a', _LONG])
@pytest.mark.parametrize('b', ['a shape', _LONG])
def test_a_template_is_filled_as_in_training(template, a, b):
  words, tokenizer = _texts(template)
  found = words.fill('answer', **{name: x for name, x in (('text_a', a), ('text_b', b)) if name in template})
  row, slot = fill_template(tokenizer, template, {'text_a': tokenizer.encode(a), 'text_b': tokenizer.encode(b)}, _LENGTH)
  assert found['text'].tolist() == [row] and found['position'].tolist() == [[slot]]
  assert found['text_valid'].tolist() == [[True] * len(row)]
  assert (len(row) == _LENGTH) == (a == _LONG)  # the first text gets the room that the last leaves
