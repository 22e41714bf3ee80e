"""The published vocabulary: byte-pair encoding of lower-cased text, with five special tokens last.

Byte-pair encoding: Sennrich et al., 2016 (arXiv 1508.07909). This vocabulary: CLIP, Radford et al., 2021 (arXiv
2103.00020), to which Uni-Perceiver added three tokens. A converted checkpoint needs exactly these ids, so cleaning,
splitting and merging match the published system, including its odd cases.

In contrast to `SentencePieceTokenizer`, a text can spell special tokens. '<|endoftext|>', '<|spe|>', '<|gen|>' and
'<|startoftext|>' become their ids, in upper or lower case, unless other punctuation directly precedes them; published
captions and templates are written so. To prevent this in untrusted texts, remove '<|' from them first. '<|mask|>' and
the bare word 'spe' are ordinary text.
"""

import functools
import gzip
import hashlib
import html
import os
import re
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from uni_moe_jax.data.text.tokenizer import Tokenizer, before_eot
from uni_moe_jax.io import storage
from uni_moe_jax.utils.errors import MissingFileError, UsageError

MAX_MERGES = 48894  # of the published vocabulary; the published file has more, which are not used
SPECIAL_TOKENS = ('<|startoftext|>', '<|endoftext|>', '<|mask|>', '<|gen|>', '<|spe|>')  # in the order of their ids
VOCAB_SIZE = 2 * 256 + MAX_MERGES + len(SPECIAL_TOKENS)  # V of the published vocabulary
_END = '</w>'  # suffix of pieces that end a word
# How text is split into words: four special tokens, English endings, letters, one digit, a run of anything else but
# spaces. At each position the first alternative that matches is taken; spaces are dropped.
_WORD = r"<\|(?:startoftext|endoftext|gen|spe)\|>|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_CACHED_WORDS = 1 << 16
# Spaces that `detokenize` removes, in this order: between digits; in o'clock; before endings; at punctuation; around
# what joins words; inside numbers and initials.
SURPLUS_SPACES = tuple(map(re.compile, (
    r'(?<=\d) (?=\d)', r"(?<=\bo) (?=' clock\b)|(?<=\bo ') (?=clock\b)",
    r"(?<=\w) (?='(?:s|t|re|ve|m|ll|d)\b)|(?<=\d) (?=(?:st|nd|rd|th|s)\b)",
    r"(?<=\S) (?=[.,!?;:)\]%'])|(?<=[($#\[]) ", r'(?<=\w) (?=[-/] \w)|(?<=\w [-/]) (?=\w)',
    r'(?<=\d[.:]) (?=\d)|(?<=\d,) (?=\d{3}\b)|(?<=\b[a-z]\.) (?=[a-z]\.)')))


class ClipTokenizer(Tokenizer):
  """A `Tokenizer` over repaired, lower-cased text. It can encode every text: there is no `unk`.

  Ids: 256 bytes, 256 bytes that end a word, one per merge, `SPECIAL_TOKENS`. `pad` is 0 as published, which is also the
  id of a piece ('!' inside a word): only a mask distinguishes text from padding.

  Attributes:
    fingerprint: Hex sha256 of the merges in use, independent of the compression of their file.
    pieces: Bytes of every id that is not special; those that end a word end with a space.
  """

  def __init__(self, merges_file: str | os.PathLike[str]):
    """Reads a merges file: text, plain or gzipped, a version comment, then one merge per line ('th e</w>').

    Merges are in the order in which they were learned. The published file is CLIP's bpe_simple_vocab_16e6.txt.gz. A
    shorter one gives a smaller vocabulary.

    Raises:
      MissingFileError: The file does not exist.
      UsageError: It is not a merges file (the message names the line), or a library of the extra `clip` is missing.
    """
    try:
      import ftfy
      import regex
      from tokenizers import models
    except ModuleNotFoundError as error:  # they are an optional extra
      raise UsageError(
          f"config.tokenizer.type='clip' requires pip install '.[clip]': {error.name} is not installed.") from error
    self._file, self._symbol = merges_file, _byte_symbols()
    pieces = [symbol + end for end in ('', _END) for symbol in self._symbol.values()]
    merges = _read_merges(merges_file, pieces)
    pieces += map(''.join, merges)
    self.size = len(pieces) + len(SPECIAL_TOKENS)
    self._special = {token: len(pieces) + i for i, token in enumerate(SPECIAL_TOKENS)}
    self.pad, self.eot, self.spe = 0, self._special['<|endoftext|>'], self._special['<|spe|>']
    self.special_ids = frozenset(self._special.values())
    self.word_start = np.arange(self.size) >= len(pieces)
    self.word_end = np.array([p.endswith(_END) for p in pieces] + [True] * len(SPECIAL_TOKENS))
    self.fingerprint = hashlib.sha256('\n'.join(f'{a} {b}' for a, b in merges).encode()).hexdigest()
    byte = {symbol: bytes([b]) for b, symbol in self._symbol.items()}
    self.pieces = [b''.join(map(byte.get, p.removesuffix(_END))) + b' ' * p.endswith(_END) for p in pieces]
    self._fix_text = ftfy.fix_text
    # IGNORECASE matters for lower-cased text, too: the long s is its own lower case, and matches an s of the pattern.
    self._split = regex.compile(_WORD, regex.IGNORECASE).findall
    self._bpe = models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, end_of_word_suffix=_END)
    self._encode_word = functools.lru_cache(_CACHED_WORDS)(self._encode_word_uncached)

  def __reduce__(self):
    return type(self), (self._file,)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, and of special tokens that it spells (see the module docstring)."""
    # Entities are unescaped twice, as published. The published normalization of spaces has no effect: they are dropped.
    clean = html.unescape(html.unescape(self._fix_text(text))).lower()
    return [i for word in self._split(clean) for i in self._encode_word(word)]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text before the first `eot`, without special tokens, one space between words."""
    pieces = [self.pieces[i] for i in before_eot(ids, self.eot) if i not in self.special_ids]
    # A model may join bytes that are not a character together: they become U+FFFD.
    return b''.join(pieces).decode(errors='replace').strip()

  def detokenize(self, text: str) -> str:
    """Returns a decoded text with its words as people write them.

    "the dog 's 2 nd black - and - white bowl , 1 , 0 0 0 times ." → "the dog's 2nd black-and-white bowl, 1,000 times."
    """
    for surplus in SURPLUS_SPACES:
      text = surplus.sub('', text)
    return text

  def _encode_word_uncached(self, word: str) -> tuple[int, ...]:
    if word in self._special:  # never '<|mask|>': it is split into three words
      return (self._special[word],)
    return tuple(token.id for token in self._bpe.tokenize(''.join(self._symbol[b] for b in word.encode())))


def _byte_symbols() -> dict[int, str]:
  """Returns {byte: the character that represents it in merges files}, in the order of ids.

  Bytes that are printable in Latin-1 come first and represent themselves; the n-th of the others is chr(256 + n).
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in printable]
  return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def _read_merges(merges_file: str | os.PathLike[str], pieces: Sequence[str]) -> list[tuple[str, str]]:
  """Reads the first `MAX_MERGES` merges of a file; each joins two earlier pieces into a new one."""
  field = f'config.tokenizer.merges_path={os.fspath(merges_file)!r}'
  path = storage.path(merges_file)
  if not path.is_file():
    raise MissingFileError(f"{field} is not a file; give the path of CLIP's bpe_simple_vocab_16e6.txt.gz.")
  content = path.read_bytes()
  try:
    lines = (gzip.decompress(content) if content[:2] == b'\x1f\x8b' else content).decode().splitlines()
  except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
    raise UsageError(f'{field} is neither gzipped nor plain UTF-8 text ({error}); download it again.') from error
  # Without this check, a file without the comment would lose a merge, and every later id would be one too small.
  if not lines or '#version' not in lines[0]:
    raise UsageError(f"{field}: line 1 must be the version comment, such as '#version: 0.2', not {lines[:1]}.")
  known, merges = set(pieces), []
  for number, line in enumerate(lines[1:MAX_MERGES + 1], start=2):
    pair = tuple(line.split(' '))
    if len(pair) != 2 or not known.issuperset(pair) or pair[0].endswith(_END) or ''.join(pair) in known:
      raise UsageError(f'{field}: line {number}, {line!r}, must be two earlier pieces that make a new one; the first '
                       'must not end a word.')
    known.add(''.join(pair))
    merges.append(pair)
  return merges
