"""Questions about glyphs: which names answer which question, and that each image has one of them."""

import numpy as np
import pytest

from uni_moe_jax.data.embedded import glyph_questions, glyphs
from uni_moe_jax.data.embedded.glyph_questions import ANSWERS, QUESTIONS


@pytest.mark.parametrize('name, answers', [
    ('latin capital letter e with acute', ['latin', 'yes', 'acute', '']),
    ('latin small letter o', ['latin', 'no', 'nothing', '']),
    ('latin small letter i', ['latin', 'no', '', '']),  # its own dot stands above it
    ('latin small letter i with tilde', ['latin', 'no', 'tilde', '']),
    ('latin small letter s with dot below', ['latin', 'no', '', '']),
    ('latin small letter u with diaeresis and macron', ['latin', 'no', '', '']),
    ('latin letter small capital r', ['', '', '', '']),  # neither a capital nor small
    ('greek small letter alpha with tonos', ['greek', 'no', '', '']),
    ('canadian syllabics ke', ['canadian', '', '', '']),
    ('rightwards arrow from bar', ['', '', '', 'right']),
    ('leftwards arrow over rightwards arrow', ['', '', '', '']),
    ('left right arrow', ['', '', '', '']),
    ('rightwards harpoon with barb upwards', ['', '', '', '']),
    ('integral', ['', '', '', ''])])
def test_a_name_answers(name, answers):
  assert [answer(name) for answer in QUESTIONS.values()] == answers


def test_one_of_the_questions_that_a_name_answers_is_drawn_by_name_and_face():
  name = 'latin capital letter e with acute'
  drawn = {face: glyph_questions.question_of(name, face) for face in glyphs.FACES.values()}
  assert drawn == {face: glyph_questions.question_of(name, face) for face in drawn}
  expected = set(zip(QUESTIONS, ('latin', 'yes', 'acute')))
  assert set(drawn.values()) == expected
  assert glyph_questions.question_of('integral', 'regular sans') == ('', '')


def test_images_without_a_question_are_left_out():
  names = np.array(['integral', 'upwards arrow', 'hebrew letter alef'])
  images = {'pixels': np.arange(3, dtype=np.uint8).reshape(3, 1, 1), 'name': names,
            'face': np.array(['regular sans'] * 3), 'class': names}
  made = list(glyph_questions.splits(lambda split: images, lambda line: None))
  assert [split for split, *_ in made] == list(glyphs.SPLITS)
  _, columns, classes = made[0]
  assert {name: column.tolist() for name, column in columns.items()} == {
      'pixels': [[[1]], [[2]]], 'name': ['upwards arrow', 'hebrew letter alef'],
      'question': ['where does it point ?', 'which script is it ?'], 'answer': ['up', 'hebrew']}
  assert classes == {'answer': ANSWERS}
  assert len(set(ANSWERS)) == len(ANSWERS)
