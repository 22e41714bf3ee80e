"""Questions about glyphs, made from the characters' names: an image, a question and its one-word answer.

Each image has one question, drawn among those that its name answers. The images are those of `glyphs`, in the same
splits, so that the characters or faces of test questions are new.
"""

import hashlib
import re
from collections.abc import Callable, Iterator

import numpy as np

from uni_moe_jax.data.embedded import glyphs
from uni_moe_jax.data.shards.writer import Columns, Split

_SCRIPTS = ('latin', 'greek', 'cyrillic', 'armenian', 'georgian', 'hebrew', 'arabic', 'tifinagh', 'lao', 'canadian')
# Marks above a letter as names call them, and the answer.
_MARKS = {'acute': 'acute', 'grave': 'grave', 'circumflex': 'circumflex', 'diaeresis': 'diaeresis', 'macron': 'macron',
          'breve': 'breve', 'caron': 'caron', 'tilde': 'tilde', 'dot above': 'dot', 'ring above': 'ring'}
_NOTHING = 'nothing'
_DIRECTIONS = ('left', 'right', 'up', 'down')
ANSWERS = (*_SCRIPTS, 'yes', 'no', *_MARKS.values(), _NOTHING, *_DIRECTIONS)


def _script(name: str) -> str:
  match = re.match(rf'({"|".join(_SCRIPTS)}) (capital |small )?(letter|ligature|syllabics)', name)
  return match.group(1) if match and 'small capital' not in name else ''


def _is_capital(name: str) -> str:
  match = re.match(r'(?:latin|greek|cyrillic|armenian|georgian) (capital|small) letter', name)
  return {'capital': 'yes', 'small': 'no'}[match.group(1)] if match and 'small capital' not in name else ''


def _mark_above(name: str) -> str:
  match = re.match(r'latin (?:capital|small) letter ([a-z])(?: with ([a-z ]+))?$', name)
  if not match or (match.group(1) in 'ij' and not match.group(2)):  # a dot of their own
    return ''
  return _MARKS.get(match.group(2), '') if match.group(2) else _NOTHING


def _direction(name: str) -> str:
  directions = re.findall(r'\b(left|right|up|down)wards\b', name)
  return directions[0] if len(directions) == 1 and name.startswith(directions[0]) and 'arrow' in name else ''


# Question → the answer by the name of a character, '' where the name has none.
QUESTIONS: dict[str, Callable[[str], str]] = {
    'which script is it ?': _script,
    'is it a capital ?': _is_capital,
    'what stands above it ?': _mark_above,
    'where does it point ?': _direction,
}


def question_of(name: str, face: str) -> tuple[str, str]:
  """(question, answer) for the image of a character in a face, always the same one; ('', '') if the name has none."""
  known = [(question, answer) for question, of in QUESTIONS.items() if (answer := of(name))]
  digest = hashlib.sha256(f'glyph question {name} {face}'.encode()).digest()
  return known[int.from_bytes(digest[:4], 'little') % len(known)] if known else ('', '')


def splits(images: Callable[[str], Columns], report: Callable[[str], None] = print) -> Iterator[Split]:
  """Yields `glyphs.SPLITS`: pixels uint8 [N, 32, 32], and name, question, answer as text [N]. images: of a split."""
  for split in glyphs.SPLITS:
    columns = images(split)
    names_and_faces = zip(columns['name'].tolist(), columns['face'].tolist(), strict=True)
    pairs = np.array([question_of(*both) for both in names_and_faces])
    chosen = np.flatnonzero(pairs[:, 0] != '')
    report(f'questions: {split} has {len(chosen)} questions')
    yield split, {'pixels': columns['pixels'][chosen], 'name': columns['name'][chosen],
                  'question': pairs[chosen, 0], 'answer': pairs[chosen, 1]}, {'answer': ANSWERS}
