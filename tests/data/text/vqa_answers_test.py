"""Normalization of VQA answers, every published rule, and their scores."""

import pytest

from uni_moe_jax.data.text.vqa_answers import normalize_answer, soft_score


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


@pytest.mark.parametrize('people', [4, 5, 10])
def test_the_soft_score_is_the_mean_over_people_of_how_many_others_agree(people):
  for same in range(people + 1):
    gave = [i < same for i in range(people)]
    others = [sum(gave[:i] + gave[i + 1:]) for i in range(people)]
    assert soft_score(same, people) == pytest.approx(sum(min(1, n / 3) for n in others) / people, abs=1e-12)


def test_scores_of_ten_people_are_the_official_ones_to_the_bit():
  scores = [soft_score(same, 10) for same in range(11)]
  assert scores[:4] == pytest.approx([0, 0.3, 0.6, 0.9], abs=1e-12) and scores[4:] == [1.0] * 7
  assert [score.hex() for score in scores[1:4]] == [
      '0x1.3333333333333p-2', '0x1.3333333333333p-1', '0x1.ccccccccccccdp-1']


@pytest.mark.parametrize('same, people, score', [
    (1, 1, 1), (0, 1, 0), (2, 2, 1), (1, 2, 0.5), (3, 3, 1), (2, 3, 2 / 3), (1, 3, 1 / 3), (0, 3, 0),
    (4, 4, 1), (3, 4, 0.75), (2, 4, 0.5), (1, 4, 0.25)])
def test_an_answer_of_all_people_scores_one_of_a_few_people_too(same, people, score):
  assert soft_score(same, people) == pytest.approx(score, abs=1e-12)
