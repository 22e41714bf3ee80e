"""BLEU-4, ROUGE-L, CIDEr-D against numbers worked out by hand, in the comments, and against COCO's caption toolkit."""

import functools
import json
import math
import pathlib

import pytest

from uni_moe_jax.eval.caption_metrics import bleu4, cider_d, rouge_l

approx = functools.partial(pytest.approx, rel=5e-9)
both = pytest.mark.parametrize('metric', [rouge_l, cider_d])


@pytest.mark.parametrize('prediction, references, expected', [
    # "a c d" is common: P = 3/3, R = 3/4; 2.44 · 1 · .75 / (.75 + 1.44 · 1).
    ('a c d', ['a b c d'], 2.44 * .75 / (.75 + 1.44)),
    # Order counts: of "b a" one word is common, P = R = 1/2, and so is the score.
    ('b a', ['a b'], .5),
    # P = 1/2 of the first, R = 1/1 of the second reference: each the best on its own.
    ('a b', ['a x y z', 'b'], 2.44 * .5 * 1 / (1 + 1.44 * .5)),
    ('a b', ['c d'], 0.), ('', ['a'], 0.)])
def test_rouge_by_hand(prediction, references, expected):
  assert rouge_l([prediction], [references]) == approx([expected])


def test_every_example_has_its_own_rouge():
  assert rouge_l(['a', 'b a'], ['a', 'a b']).tolist() == [1., .5]


_TEXTS = ['a b c d', 'e f g h']
_U, _W = math.log(3 / 2), math.log(3)


@pytest.mark.parametrize('predictions, references, expected', [
    # Equal texts score ten: every n-gram up to four words is there, and none is in every example.
    (_TEXTS, _TEXTS, 10.),
    # N-grams that a text is too short for score nothing. One word of two examples: cosine 1 for n = 1, none for 2, 3,
    # 4: 10 · 1/4. "b" scores nothing.
    (['a', 'b'], ['a', 'c'], 10 / 4 / 2),
    # Rare words weigh more and length fades. Three examples; a is in 2 of 3 references, b in 1, so with u = log(3/2),
    # w = log 3, n = 1: prediction "a" = (u, 0), reference "a b" = (u, w), cosine u / √(u² + w²); no longer n-gram. One
    # word too short: exp(-1 / 72). The others: 0.
    (['a', 'x', 'x'], ['a b', 'a', 'c'], 10 * _U / math.hypot(_U, _W) / 4 * math.exp(-1 / 72) / 3),
    # Repeating a word is clipped at the reference. n = 1: prediction 3w, reference w, clipped to w · w / (3w · w) =
    # 1/3, where a cosine would be 1. n = 2: "a a" is in no reference. Two words too long: exp(-4 / 72). Mean over n:
    # / 4, over two examples: / 2.
    (['a a a', 'x'], ['a', 'b'], 10 / 3 / 4 * math.exp(-4 / 72) / 2),
    # Several references are averaged and count an n-gram once. "a" is in both references of the first example: still
    # one example of two, weight log 2 like "c". Reference "a": 10/4. Reference "a c": cosine 1/√2 for n = 1, one word
    # too short. Mean over references: / 2, over examples: / 2.
    (['a', 'x'], [['a', 'a c'], ['b']], (10 / 4 + 10 / 4 / math.sqrt(2) * math.exp(-1 / 72)) / 2 / 2)])
def test_cider_by_hand(predictions, references, expected):
  assert cider_d(predictions, references).mean() == approx(expected)


def test_words_of_every_example_carry_no_information():
  assert cider_d(['a', 'a'], ['a', 'a']).tolist() == [0., 0.]


def test_numbers_of_the_coco_caption_toolkit():
  # pycocoevalcap 1.2, `Cider()` and `Rouge()`, on the same texts (lower case, no punctuation).
  predictions = ['a small red star on the left', 'two discs move to the right', 'a bar', 'the the the star of a']
  references = [['a red star on the left', 'one small star'], ['two discs go right', 'discs that move to the right'],
                ['a long bar at the left'], ['the star', 'a star of the left', 'a big star']]
  assert cider_d(predictions, references).mean() == pytest.approx(2.652638653975, rel=0, abs=5e-10)
  assert rouge_l(predictions, references).mean() == pytest.approx(0.694397720125, rel=0, abs=5e-10)


def test_numbers_of_the_toolkit_with_its_own_tokenizer():
  # Texts with clitics, hyphens, numbers, brackets and abbreviations.
  scored = json.loads((pathlib.Path(__file__).parents[1] / 'golden' / 'treebank.json').read_text())['scored']
  texts = scored['predictions'], scored['references']
  assert cider_d(*texts) == pytest.approx(scored['CIDEr-D'], rel=0, abs=1e-9)
  assert rouge_l(*texts) == pytest.approx(scored['ROUGE-L'], rel=0, abs=1e-9)
  assert bleu4(*texts) == pytest.approx(scored['BLEU-4'], rel=0, abs=1e-7)  # it adds 1e-9 to counts of n-grams


@pytest.mark.parametrize('predictions, references, expected', [
    # Precisions of 1- to 4-grams: 4/5, 3/4, 2/3, 1/2; product 1/5; equal lengths, so no penalty.
    (['greek small letter alpha x'], ['greek small letter alpha tonos'], .2 ** .25),
    # All n-grams right, 8 words against 12: exp(1 - 12/8). A mean of sentences would differ.
    (['a b c d e f', 'g h'], ['a b c d e f', 'g h i j k l'], math.exp(1 - 12 / 8)),
    # No 4-gram is right, or there is none. The toolkit: (1/4 · 1e-15)^(1/4) = 0.00013 and (1e-15 / 1e-9)^(1/4) = 0.032.
    (['a b c d'], ['a b c e'], 0.), (['a b c'], ['a b c'], 0.),
    # Unequally many references.
    (['a b c d', 'e f g h'], [['x y', 'a b c d'], 'e f g h'], 1.),
    # Four words on each side, not three and a full stop.
    (["the man's dog."], ["The man 's dog"], 1.)])
def test_bleu4_counts_over_the_corpus_and_punishes_brevity(predictions, references, expected):
  assert bleu4(predictions, references) == pytest.approx(expected, rel=0, abs=5e-7)


@both
def test_case_and_punctuation_do_not_count_and_words_do(metric):
  plain, spoken, other = 'a red star , on the left', 'A red star on the LEFT.', 'A red disc on the LEFT.'
  of = lambda text: metric([text, 'x'], [plain, 'b']).mean()
  assert of(spoken) == approx(of('a red star on the left'))
  assert of(other) < of(spoken) - .05


@both
def test_letters_beyond_ascii_are_words(metric):
  assert metric(['größe λ', 'x'], ['größe λ', 'b'])[0] > metric(['größe μ', 'x'], ['größe λ', 'b'])[0]


@both
def test_nothing_to_score_is_an_error(metric):
  with pytest.raises(ValueError, match='no examples'):
    metric([], [])
  with pytest.raises(ValueError, match='example 1 has no reference'):
    metric(['a', 'b'], ['a', []])
