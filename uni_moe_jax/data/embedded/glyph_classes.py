"""Classes of characters, derived from their Unicode names.

Characters that look like those of another class (a mathematical bold A is an A in a bold face, a roman numeral
one is an I) get no class: they train captions and retrieval only.
"""

import functools
import re

UNLABELED = ''  # class of a character that matches no rule, or a rule for homoglyphs of other classes

# Marks that are visible beside a letter; a hook or a stroke changes the letter itself.
_ACCENTS = (
    'acute|grave|circumflex|diaeresis|macron|breve|caron|tilde|dot above|dot below|ring above'
    '|ring below|ogonek|cedilla|hook above|line above|line below|comma above|comma below|horn')

# Class, pattern of lower-cased names. The first rule whose pattern matches from the start of the name decides.
_RULES = (
    # Copies of other characters in another style, size or place.
    (UNLABELED, r'(latin|greek) (letter small capital|subscript)|latin letter|superscript|subscript|modifier'),
    (UNLABELED, r'(small )?roman numeral|lisu|coptic|old italic|mathematical .*digit|arabic mathematical'),
    # Mathematical letters with their own shapes.
    ('double-struck letter', r'(mathematical )?double-struck (italic )?(capital|small)'),
    ('fraktur letter', r'mathematical (bold )?fraktur|black-letter'),
    ('script letter', r'mathematical (bold )?script|script (capital|small)'),
    (UNLABELED, r'mathematical (bold|italic|sans-serif|monospace)'),
    # Scripts.
    ('accented latin capital letter', rf'latin capital letter .*\bwith .*\b({_ACCENTS})\b'),
    ('accented latin small letter', rf'latin small letter .*\bwith .*\b({_ACCENTS})\b'),
    *((f'{script} {case} letter', f'{script} {case} (letter|ligature)')
      for script in ('latin', 'greek', 'cyrillic', 'armenian', 'georgian') for case in ('capital', 'small')),
    *((f'{script} letter', f'{script} (letter|ligature)') for script in ('georgian', 'hebrew', 'arabic')),
    ('nko character', r'nko'),
    ('tifinagh letter', r'tifinagh letter'),
    ('ogham letter', r'ogham letter'),
    ('lao character', r'lao'),
    ('canadian syllable', r'canadian syllabics'),
    # Systematically drawn sets.
    ('braille pattern', r'braille pattern'),
    ('box drawing', r'box drawings'),
    ('block element', r'.*\bblock$|quadrant|(light|medium|dark) shade'),
    *((name, name) for name in ('domino tile', 'hexagram', 'tetragram', 'playing card')),
    ('apl symbol', r'apl functional symbol'),
    ('circled letter', r'circled latin'),
    ('circled number', r'(dingbat )?(negative )?circled (sans-serif )?(digit|number)'),
    ('fraction', r'(vulgar )?fraction(?! slash)'),
    ('face', r'.*\bface\b(?!-)'),
    # Arrows, by direction.
    ('harpoon', r'.*\bharpoon\b'),
    ('two-way arrow', r'.*\b(left right|up down)\b.*\barrow|.*s arrow.* (over|of) .*wards arrow'),
    ('diagonal arrow', r'.*\b(north|south) (east|west)\b.*arrow'),
    (UNLABELED, r'.*(clockwise|curved|corner|tip).*\barrow|.*\barrow.* (curving|tip) '),
    ('rightwards arrow', r'.*\bright(wards)?\b.*arrow'),
    ('leftwards arrow', r'.*\bleft(wards)?\b.*arrow'),
    ('vertical arrow', r'.*\b(up|down)(wards)?\b.*arrow'),
    # Mathematics.
    ('circle', r'circled '),
    ('integral', r'.*\b(integral|integration)\b'),
    ('union or intersection', r'.*\b(union|intersection)\b'),
    ('bracket', r'.*\b(bracket|parenthesis|ceiling|floor)\b'),
    ('inequality', r'.*\b(less|greater)-than\b'),
    ('subset or superset', r'.*\b(subset|superset)\b'),
    ('membership relation', r'.*\b(element of|contains|contain)\b'),
    # Relations with the same few strokes, and signs that are part of many others.
    (UNLABELED, r'.*\b(precedes?|succeeds?|equals?|equivalent|identical|congruent|tilde|similar|plus|minus)\b'),
    (UNLABELED, r'.*\b(quotation mark|logical|tack|angle)\b|square (root|cap|cup|image|original)'),
    # Shapes.
    ('triangle', r'.*\btriangle\b'),
    ('diamond', r'.*\b(diamond|lozenge)\b'),
    ('square', r'.*\bsquared?\b'),
    ('circle', r'.*\bcircle\b(?! (above|below))'),
    ('star or asterisk', r'.*\b(star|asterisk|snowflake|florette)\b'),
)
# Every class, in the order of the rules, which is the order of a classifier's outputs.
CLASSES = tuple(dict.fromkeys(label for label, _ in _RULES if label != UNLABELED))


@functools.cache
def class_of(name: str) -> str:
  """Returns the class of the character with this lower-cased Unicode name; '' if it has none."""
  return next((label for label, pattern in _RULES if re.match(pattern, name)), UNLABELED)
