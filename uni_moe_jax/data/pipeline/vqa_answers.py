"""Answers as VQA's evaluation compares them.

Its published rules (Antol et al., 2015, arXiv 1505.00468; visualqa.org/evaluation): small letters, no full stops but in decimals,
no comma within a number, other marks become blanks, number words become digits, articles go, contractions get their apostrophe.
"""

import re

_MARKS = str.maketrans(dict.fromkeys(';/[]"{}()=+\\_-><@`,?!', ' '))  # an apostrophe and a colon say something, $ and % too
_DIGITS = {word: str(i) for i, word in enumerate('zero one two three four five six seven eight nine ten'.split())} | {'none': '0'}
_ARTICLES = ('a', 'an', 'the')
# Ending → beginnings; what without its apostrophe is another word (its, ill, well, were, id, shed) is not here.
_CONTRACTED = {
    't': 'ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn shouldn wasn weren won wouldn',
    's': 'everyone he here how let nobody she somebody someone something that there what when where who why',
    've': 'could i might must should they we who would you',
    're': 'they what who you',
    'd': 'he how they who you',
    'll': 'he how it that they what who you',
    'm': 'i',
    'am': 'ma',
    'clock': 'o',
    'all': 'y',
}
_CONTRACTIONS = {start + end: f"{start}'{end}" for end, starts in _CONTRACTED.items() for start in starts.split()}


def answer(text: str) -> str:
  """An answer in the form in which answers are compared: 'The  Two dogs.' → '2 dogs'."""
  text = re.sub(r'(?<=\d),(?=\d)', '', text.lower())
  words = re.sub(r'\.(?!\d)', '', text.translate(_MARKS)).split()
  words = [_CONTRACTIONS.get(w, _DIGITS.get(w, w)) for w in words if w not in _ARTICLES]
  return ' '.join(words)
