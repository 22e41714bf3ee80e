"""Answers as VQA's evaluation compares them: every rule by hand."""

import pytest

from uni_moe_jax.data.pipeline.vqa_answers import normalize_answer


@pytest.mark.parametrize('text, compared', [
    ('  Yes ', 'yes'),
    ('A man on the\tbench', 'man on bench'),
    ('theatre and another', 'theatre and another'),  # an article is a word, not a beginning
    ('two', '2'), ('None', '0'), ('ten or eleven', '10 or eleven'), ('someone', 'someone'),
    ('U.S.A.', 'usa'), ('3.5 ft.', '3.5 ft'), ('on the shelf.', 'on shelf'),
    ('100,978', '100978'), ('red, white', 'red white'), ('red,white', 'red white'),
    ('t-shirt', 't shirt'), ('yes!', 'yes'), ('(left)', 'left'), ('and/or', 'and or'), ('"stop"', 'stop'),
    ('2:50 PM', '2:50 pm'), ("girl's", "girl's"), ('50%', '50%'), ('$5', '$5'),
    ("dont know", "don't know"), ("isnt", "isn't"), ("Whats up", "what's up"), ("12 oclock", "12 o'clock"), ('its', 'its'),
    ('the', ''),
])
def test_answers_differ_in_what_they_say_alone(text, compared):
  assert normalize_answer(text) == compared


@pytest.mark.parametrize('text', ['2 dogs', "don't know", '100978', '3.5', ''])
def test_what_is_compared_stays_what_it_is(text):
  assert normalize_answer(text) == text
