"""Classes of characters, derived from their Unicode names.

A rule is a class and a pattern of lower-cased names; the first rule whose pattern matches from the start of the name
decides. Characters that look like those of another class (a mathematical bold A is an A in a bold face, a roman numeral
one is an I) get no class: they train captions and retrieval only.
"""

import functools
import re

UNLABELED = ''  # class of a character that matches no rule, or a rule for homoglyphs of other classes

# Marks that are visible beside a letter; a hook or a stroke changes the letter itself.
_ACCENTS = (
    'acute|grave|circumflex|diaeresis|macron|breve|caron|tilde|dot above|dot below|ring above'
    '|ring below|ogonek|cedilla|hook above|line above|line below|comma above|comma below|horn')

# The first matching rule decides.
_RULES = (
    # Copies of other characters in another style, size or place.
    (UNLABELED, r'(latin|greek) (letter small capital|subscript)|latin letter'),
    (UNLABELED, r'superscript|subscript'),
    (UNLABELED, r'modifier|roman numeral|small roman numeral|lisu|coptic|old italic'),
    (UNLABELED, r'mathematical .*digit|arabic mathematical'),
    # Mathematical letters with their own shapes.
    ('double-struck letter', r'(mathematical )?double-struck (italic )?(capital|small)'),
    ('fraktur letter', r'mathematical (bold )?fraktur|black-letter'),
    ('script letter', r'mathematical (bold )?script|script (capital|small)'),
    (UNLABELED, r'mathematical (bold|italic|sans-serif|monospace)'),
    # Scripts.
    ('accented latin capital letter', rf'latin capital letter .*\bwith .*\b({_ACCENTS})\b'),
    ('accented latin small letter', rf'latin small letter .*\bwith .*\b({_ACCENTS})\b'),
    ('latin capital letter', r'latin capital (letter|ligature)'),
    ('latin small letter', r'latin small (letter|ligature)'),
    ('greek capital letter', r'greek capital letter'),
    ('greek small letter', r'greek small letter'),
    ('cyrillic capital letter', r'cyrillic capital (letter|ligature)'),
    ('cyrillic small letter', r'cyrillic small (letter|ligature)'),
    ('armenian capital letter', r'armenian capital letter'),
    ('armenian small letter', r'armenian small (letter|ligature)'),
    ('georgian capital letter', r'georgian capital letter'),
    ('georgian small letter', r'georgian small letter'),
    ('georgian letter', r'georgian letter'),
    ('hebrew letter', r'hebrew (letter|ligature)'),
    ('arabic letter', r'arabic (letter|ligature)'),
    ('nko character', r'nko'),
    ('tifinagh letter', r'tifinagh letter'),
    ('ogham letter', r'ogham letter'),
    ('lao character', r'lao'),
    ('canadian syllable', r'canadian syllabics'),
    # Systematically drawn sets.
    ('braille pattern', r'braille pattern'),
    ('box drawing', r'box drawings'),
    ('block element', r'.*\bblock$|quadrant|(light|medium|dark) shade'),
    ('domino tile', r'domino tile'),
    ('hexagram', r'hexagram'),
    ('tetragram', r'tetragram'),
    ('playing card', r'playing card'),
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
    (UNLABELED, r'.*\b(precedes?|succeeds?|equals?|equivalent|identical|congruent)\b'),
    (UNLABELED, r'.*\b(tilde|similar|plus|minus|quotation mark|logical|tack|angle)\b'),
    (UNLABELED, r'square (root|cap|cup|image|original)'),
    # Shapes.
    ('triangle', r'.*\btriangle\b'),
    ('diamond', r'.*\b(diamond|lozenge)\b'),
    ('square', r'.*\bsquared?\b'),
    ('circle', r'.*\bcircle\b(?! (above|below))'),
    ('star or asterisk', r'.*\b(star|asterisk|snowflake|florette)\b'),
)
_COMPILED = tuple((label, re.compile(pattern)) for label, pattern in _RULES)

# Every class, in the order of the rules, which is the order of a classifier's outputs.
CLASSES = tuple(dict.fromkeys(label for label, _ in _RULES if label != UNLABELED))


@functools.cache
def class_of(name: str) -> str:
  """Returns the class of the character with this lower-cased Unicode name; '' if it has none."""
  return next((label for label, pattern in _COMPILED if pattern.match(name)), UNLABELED)
