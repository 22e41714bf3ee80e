"""Extracts English paragraphs from docstrings: no markup, code, tables or formulas."""

import re
import unicodedata
from collections.abc import Iterator

MIN_WORDS = 9
MIN_SUMMARY_WORDS = 4  # "Computes the mean along an axis." is enough for a question about what follows
MAX_CHARS = 500  # longer paragraphs keep their first sentences: a unicode array is as wide as its longest text

# Roles of a paragraph in its document.
SUMMARY = 'summary'  # the document's first paragraph
BODY = 'body'  # a later one at the margin
ITEM = 'item'  # indented or listed: the description of an argument, a note, a list item


def extract_paragraphs(document: str) -> list[tuple[str, str]]:
  """Returns (text, role) of the paragraphs of a dedented docstring that read as English, without markup, in order.

  They have at least `MIN_WORDS` words, a summary `MIN_SUMMARY_WORDS`, and at most `MAX_CHARS` characters.
  """
  paragraphs = []
  for index, (at_margin, raw) in enumerate(_blocks(document)):
    role = ITEM if not at_margin else BODY if index else SUMMARY
    text = _shorten(_remove_markup(raw))
    if reads_as_english(text, MIN_SUMMARY_WORDS if role == SUMMARY else MIN_WORDS):
      paragraphs.append((text, role))
  return paragraphs


_BULLET = re.compile(r'\s*(?:[-*+•]|\(?(?:\d{1,2}|[a-z])[.)])\s+')
# "axis: The axis to …", "values (optional): An …", "Note: This …"
_LABEL = re.compile(r'\s*([*\w., ]{0,39}[*\w])(?: ?\([^()]{1,60}\))?:\s+(?=[A-Z])')
# "ValueError: If x is negative." is half a sentence.
_ERROR = re.compile(r'(?:Error|Exception|Warning)s?$')
_UNDERLINE = re.compile(r'\s*([-=~^"\'*#])\1{2,}\s*$')


def _blocks(document: str) -> Iterator[tuple[bool, str]]:
  """Yields blocks of lines with the same indentation, or a list item with its continuation lines.

  Yields (whether the block is at the margin, its lines joined by spaces).
  """
  # State of the current block; `hang` is the indentation of an item's second line.
  lines, start, hang, marker, heads_error = [], 0, None, None, None
  for line in document.split('\n') + ['']:
    indent = len(line) - len(line.lstrip())
    underline = _UNDERLINE.match(line)
    new_marker = _BULLET.match(line) or _LABEL.match(line)
    if marker:
      deep_enough = indent > start or (marker.re is _BULLET and indent == start)
      belongs = deep_enough and hang in (None, indent)
    else:
      belongs = indent == start
    if lines and (new_marker or underline or not line.strip() or not belongs):
      if not heads_error and not underline:  # an underlined block is a heading
        yield start == 0 and not marker, ' '.join(lines)
      lines = []
    if not line.strip() or underline:
      continue
    if lines:
      hang = indent
      lines.append(line.strip())
    else:
      start, hang, marker = indent, None, new_marker
      heads_error = marker and marker.re is _LABEL and _ERROR.search(marker[1])
      lines = [line[marker.end():] if marker else line.strip()]


_MARKUP = (
    (re.compile(r'\s*\[[\w.-]+\]_'), ''),  # citations: [1]_
    (re.compile(r':[A-Za-z][\w.:+-]*:(?=`)'), ''),  # roles: :func:`name`
    (re.compile(r'\[([^\[\]]+)\]\([^()\s]*\)'), r'\1'),  # Markdown links
    (re.compile(r'`([^`<>]+?)\s*<[^`<>]+>`_{0,2}'), r'\1'),  # links and titled roles
    (re.compile(r'(``|`)[~!.]?([^`]*?)\1_{0,2}'), r'\2'),  # code and references
    (re.compile(r'(\*\*|\*)(?=\S)([^*]*?)(?<=\S)\1'), r'\2'),  # emphasis
)
_QUOTES = str.maketrans({'’': "'", '‘': "'", '“': '"', '”': '"'})


def _remove_markup(text: str) -> str:
  text = unicodedata.normalize('NFKC', text).translate(_QUOTES)
  for pattern, replacement in _MARKUP:
    text = pattern.sub(replacement, text)
  return ' '.join(text.split())


def _shorten(text: str) -> str:
  if len(text) <= MAX_CHARS:
    return text
  ends = [match.end() for match in re.finditer(r'[a-z)][.!?](?= [A-Z])', text[:MAX_CHARS])]
  return text[:ends[-1]] if ends else ''


_FORBIDDEN = re.compile(r'[{}<>|\\^~=@#$*+`\[\]]|\.\.|::|https?:|www\.|//|--|__')
_START = re.compile(r'["\'(]?[A-Z]')
_END = re.compile(r'[.!?]["\')]*$')
# "If the file is missing." is incomplete; "If the file is missing, it is made." is a sentence.
_CLAUSE_ONLY = re.compile(r'(?:If|When|Whenever|Unless|Because)\b(?![^.!?]*, (?!or |and |if |but |when ))')
_WORD = re.compile(r"(?:[A-Z]?[a-z]+|[A-Z]{1,5}s?)(?:['-](?:[A-Z]?[a-z]+|[A-Z]{1,5}))*$")
_NUMBER = re.compile(r'\d[\d.,]*%?$')
_FUNCTION_WORDS = frozenset(
    'a all also an and any are as at be been but by can could did do does each for from had has have if in into is it '
    'its may must no not of on only or should such than that the their them then there these they this those to used '
    'using was were when where which while who will with would you your'.split())


def reads_as_english(text: str, min_words: int = MIN_WORDS) -> bool:
  """Returns whether a text looks like English sentences: letters, words, a beginning and an end."""
  words = [word.strip('.,;:!?()"\'') for word in text.split()]
  n = len(words)
  if n < min_words or not _START.match(text) or not _END.search(text):
    return False
  if _FORBIDDEN.search(text) or _CLAUSE_ONLY.match(text):
    return False
  if text.count('(') != text.count(')') or text.count('"') % 2:
    return False  # cut out of a longer sentence
  plain = sum(bool(_WORD.match(word)) for word in words)
  numbers = sum(bool(_NUMBER.match(word)) for word in words)
  symbols = sum(len(word) == 1 and word not in 'aAI' for word in words)
  function = sum(word.lower() in _FUNCTION_WORDS for word in words)
  letters = sum(char.isalpha() or char == ' ' for char in text)
  return (
      plain >= 0.88 * n and n - plain - numbers <= 0.1 * n  # the rest are names from code
      and symbols <= 0.06 * n and function >= 0.2 * n and letters >= 0.93 * len(text))
