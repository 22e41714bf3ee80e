"""Normalization of VQA answers: every published rule."""

import pytest

from uni_moe_jax.data.pipeline.vqa_answers import normalize_answer


@pytest.mark.parametrize('text, normalized', [
    ('  Yes ', 'yes'),
    ('A man on the\tbench', 'man on bench'),
    ('theatre and another', 'theatre and another'),  # an article is a word, not a prefix
    ('two', '2'), ('None', '0'), ('ten or eleven', '10 or eleven'), ('someone', 'someone'),
    ('U.S.A.', 'usa'), ('3.5 ft.', '3.5 ft'), ('on the shelf.', 'on shelf'),
    ('100,978', '100978'), ('red, white', 'red white'), ('red,white', 'red white'),
    ('t-shirt', 't shirt'), ('yes!', 'yes'), ('(left)', 'left'), ('and/or', 'and or'), ('"stop"', 'stop'),
    ('2:50 PM', '2:50 pm'), ("girl's", "girl's"), ('50%', '50%'), ('$5', '$5'),
    ('dont know', "don't know"), ('isnt', "isn't"), ('Whats up', "what's up"), ('12 oclock', "12 o'clock"),
    ('its', 'its'), ('the', ''),
    *[(text, text) for text in ('2 dogs', "don't know", '100978', '3.5', '')],  # already normalized
])
def test_answers_are_normalized(text, normalized):
  assert normalize_answer(text) == normalized
