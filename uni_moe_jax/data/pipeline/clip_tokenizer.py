"""The published vocabulary: byte pairs over lower-cased text, five special tokens last.

Byte-pair encoding: Sennrich et al., 2016 (arXiv 1508.07909). This vocabulary: CLIP, Radford et al., 2021 (arXiv
2103.00020), to which Uni-Perceiver added three tokens. A converted checkpoint needs exactly these ids, so cleaning,
splitting and merging do what the published system does, in odd cases, too.

That includes what `SentencePieceTokenizer` excludes: a text can spell special tokens. '<|endoftext|>', '<|spe|>',
'<|gen|>' and '<|startoftext|>' become their ids, in any case of letters, unless other punctuation stands directly
before them; published captions and templates are written so. To keep that out of foreign texts, remove '<|' from them
first. '<|mask|>' and the bare word 'spe' are ordinary text.
"""

import functools
import gzip
import hashlib
import html
import os
import pathlib
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from uni_moe_jax.utils.errors import MissingFileError, UsageError

MOST_MERGES = 48894  # of the published vocabulary; the published file goes on, and the rest is not used
SPECIALS = ('<|startoftext|>', '<|endoftext|>', '<|mask|>', '<|gen|>', '<|spe|>')  # in the order of their ids
_END = '</w>'  # suffix of pieces that end a word
# How a text falls into words: four specials, English endings, letters, one digit, a run of anything else but blanks. At
# each place the first alternative that fits counts; blanks are dropped.
_WORD = r"<\|(?:startoftext|endoftext|gen|spe)\|>|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_CACHED_WORDS = 1 << 16


class ClipTokenizer:
  """A `Tokenizer` over repaired, lower-cased text. It can write every text: there is no `unk`.

  Ids: 256 bytes, 256 bytes that end a word, one per merge, `SPECIALS`. `pad` is 0 as published, which is also the id of
  a piece ('!' inside a word): only a mask tells a row from its filling.

  Attributes:
    fingerprint: hex sha256 of the merges in use, however their file is packed.
    pieces: bytes of every id that is not special; those that end a word have a blank at their end.
  """

  def __init__(self, merges_file: str | os.PathLike[str]):
    """Reads a merges file.

    Args:
      merges_file: text, plain or gzipped: a version comment, then one merge per line ('th e</w>'), first learnt first.
        The published one is CLIP's bpe_simple_vocab_16e6.txt.gz. A shorter file gives a smaller vocabulary.

    Raises:
      MissingFileError: there is no such file.
      UsageError: it is no merges file (names the line), or a library of the extra `clip` is absent.
    """
    ftfy, regex, models = _libraries()
    self._symbol = _byte_symbols()
    symbols = list(self._symbol.values())
    merges = _read_merges(merges_file, symbols)
    pieces = [*symbols, *(s + _END for s in symbols), *(a + b for a, b in merges)]
    self.size = len(pieces) + len(SPECIALS)
    self._special = {text: len(pieces) + i for i, text in enumerate(SPECIALS)}
    self.pad, self.eot, self.spe = 0, self._special['<|endoftext|>'], self._special['<|spe|>']
    self.special_ids = frozenset(self._special.values())
    self.word_start = np.arange(self.size) >= len(pieces)
    self.word_end = np.array([p.endswith(_END) for p in pieces] + [True] * len(SPECIALS))
    self.fingerprint = hashlib.sha256('\n'.join(f'{a} {b}' for a, b in merges).encode()).hexdigest()
    byte = {symbol: bytes([b]) for b, symbol in self._symbol.items()}
    self.pieces = [b''.join(map(byte.get, p.removesuffix(_END))) + b' ' * p.endswith(_END) for p in pieces]
    self._repaired = ftfy.fix_text
    # IGNORECASE matters though the text is lower-cased: the long s is its own lower case, and an s to the pattern.
    self._words = regex.compile(_WORD, regex.IGNORECASE).findall
    self._bpe = models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, end_of_word_suffix=_END)
    self._ids = functools.lru_cache(_CACHED_WORDS)(self._ids_of_word)

  def encode(self, text: str) -> list[int]:
    """Ids of a text, those of special tokens among them where it spells them (see the module)."""
    # Two rounds of entities, as published. Its cleaning of blanks would change nothing: the split drops them.
    clean = html.unescape(html.unescape(self._repaired(text))).lower()
    return [i for word in self._words(clean) for i in self._ids(word)]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    """The text before the first `eot`, without special tokens; one blank between words and punctuation."""
    ids = [int(i) for i in ids]
    if self.eot in ids:
      ids = ids[:ids.index(self.eot)]
    # A model may join bytes that are no character together: they become U+FFFD.
    return b''.join(self.pieces[i] for i in ids if i not in self.special_ids).decode(errors='replace').strip()

  def _ids_of_word(self, word: str) -> tuple[int, ...]:
    if word in self._special:  # never '<|mask|>': the split takes it apart
      return (self._special[word],)
    return tuple(token.id for token in self._bpe.tokenize(''.join(self._symbol[b] for b in word.encode())))


def _libraries():
  """(ftfy, regex, tokenizers.models); imported late, so that nobody else needs them."""
  try:
    import ftfy  # pylint: disable=g-import-not-at-top
    import regex
    from tokenizers import models
  except ModuleNotFoundError as error:
    raise UsageError(
        f"config.tokenizer.type='clip' needs pip install '.[clip]': there is no {error.name}.") from error
  return ftfy, regex, models


def _byte_symbols() -> dict[int, str]:
  """{byte: the character that stands for it in merges files}, in the order of ids.

  Bytes that print as Latin-1 come first and stand for themselves; the n-th of the others is chr(256 + n).
  """
  printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in printed]
  return {b: chr(b) for b in printed} | {b: chr(256 + n) for n, b in enumerate(others)}


def _read_merges(merges_file: str | os.PathLike[str], symbols: Sequence[str]) -> list[tuple[str, str]]:
  """The first `MOST_MERGES` merges of a file, each of two pieces that exist before it, none twice."""
  field = f'config.tokenizer.merges_path={os.fspath(merges_file)!r}'
  path = pathlib.Path(os.path.expanduser(merges_file))
  if not path.is_file():
    raise MissingFileError(f"{field} is no file; give the path of CLIP's bpe_simple_vocab_16e6.txt.gz.")
  content = path.read_bytes()
  try:
    lines = (gzip.decompress(content) if content[:2] == b'\x1f\x8b' else content).decode().splitlines()
  except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
    raise UsageError(f'{field} is neither gzipped nor plain UTF-8 text ({error}); download it again.') from error
  # Without this look, a file that lacks the comment would lose a merge, and every later id would be one too small.
  if not lines or '#version' not in lines[0]:
    raise UsageError(f"{field}: line 1 must be the version comment, such as '#version: 0.2', not {lines[:1]}.")
  known, merges = {*symbols, *(s + _END for s in symbols)}, []
  for number, line in enumerate(lines[1:MOST_MERGES + 1], start=2):
    pair = tuple(line.split(' '))
    if len(pair) != 2 or not known.issuperset(pair) or pair[0].endswith(_END) or ''.join(pair) in known:
      raise UsageError(f'{field}: line {number}, {line!r}, must be two pieces that were made before it, the first not '
                       'the end of a word, and make a new one.')
    known.add(''.join(pair))
    merges.append(pair)
  return merges
