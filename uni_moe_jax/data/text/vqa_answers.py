"""Normalization and scores of answers for VQA evaluation.

The published rules (Antol et al., 2015, arXiv 1505.00468; visualqa.org/evaluation). Normalization: lower case; no
periods except in decimals; no commas within numbers; other punctuation becomes spaces; number words become digits;
articles are removed; contractions get their apostrophe.
"""

import re

# Punctuation that becomes spaces; apostrophe, colon, $ and % carry meaning and stay.
_PUNCTUATION = str.maketrans(dict.fromkeys(';/[]"{}()=+\\_-><@`,?!', ' '))
_DIGITS = {word: str(i) for i, word in enumerate(
    'zero one two three four five six seven eight nine ten'.split())} | {'none': '0'}
_ARTICLES = ('a', 'an', 'the')
# Ending → beginnings. Left out: words that without the apostrophe are another word (its, ill, well, were, id, shed).
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


def soft_score(same: int, people: int) -> float:
  """Returns the official score of an answer that `same` of a number of people gave, in [0, 1].

  It is the mean over people of min(1, others who gave the same answer / 3): 0.3, 0.6, 0.9 and 1 for an answer of one,
  two, three, or more of ten. Of fewer than four people nobody has three others: it is the share that gave the answer,
  as the official score is of four.
  """
  if people < 4:
    return same / people
  # Who gave this answer has one fewer of it among the others.
  mine, others = min(1.0, (same - 1) / 3), min(1.0, same / 3)
  return (same * mine + (people - same) * others) / people


def normalize_answer(text: str) -> str:
  """Normalizes an answer for comparison: 'The  Two dogs.' → '2 dogs'."""
  text = re.sub(r'(?<=\d),(?=\d)', '', text.lower())
  words = re.sub(r'\.(?!\d)', '', text.translate(_PUNCTUATION)).split()
  return ' '.join(_CONTRACTIONS.get(w, _DIGITS.get(w, w)) for w in words if w not in _ARTICLES)
