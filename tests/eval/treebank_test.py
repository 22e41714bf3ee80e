"""Words of captions: what the COCO caption toolkit makes of its own examples, and of texts for each rule."""

import json
import pathlib

import pytest

from uni_moe_jax.eval import treebank

_GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / 'golden' / 'treebank.json').read_text())


@pytest.mark.parametrize('caption, tokens', _GOLDEN['coco'])
def test_the_toolkits_own_examples(caption, tokens):
  assert treebank.words(caption) == tuple(token for token in tokens.split() if token not in '.,')


@pytest.mark.parametrize('text, words', _GOLDEN['texts'])
def test_a_text_has_the_words_that_the_toolkit_finds(text, words):
  assert ' '.join(treebank.words(text)) == words


@pytest.mark.parametrize('text, words', [
    ("The man's dogs aren't here", "the man 's dogs are n't here"), ('cannot wanna', 'can not wan na'),
    ('half-full, and/or 1,000.5!', 'half-full and/or 1,000.5'), ('at 5 p.m. on Main St.', 'at 5 p.m. on main st.'),
    ('a dog.', 'a dog'), ('(5%)', '-lrb- 5 % -rrb-')])
def test_conventions_of_the_treebank(text, words):
  assert ' '.join(treebank.words(text)) == words


def test_a_text_may_have_no_words():
  assert treebank.words('') == treebank.words(' . ?') == ()
