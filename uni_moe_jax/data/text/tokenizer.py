"""Tokenizers: the interface, and a SentencePiece tokenizer whose special tokens no text can spell."""

import hashlib
import io
import itertools
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import sentencepiece

from uni_moe_jax.io import storage
from uni_moe_jax.utils.errors import MissingFileError, UsageError

_MAX_TRAINED_BYTES = 1 << 20  # of a text; the trainer drops longer ones silently
# Trainer settings. With them, equal texts and size give an equal model, byte for byte.
_TRAINER = dict(
    # On 50 thousand paragraphs: 4 s, and 3 % fewer tokens than bpe, which takes half a second.
    model_type='unigram',
    normalization_rule_name='nmt_nfkc_cf',  # unlike nfkc_cf it treats tabs and line ends as spaces
    character_coverage=0.9999,  # the default, 0.9995, makes '!' unknown
    pad_id=0, unk_id=1, bos_id=-1, eos_id=-1,
    pad_piece='<pad>', unk_piece='<unk>',
    control_symbols=['<spe>', '<eot>'],  # control: text with these letters never becomes these ids
    max_sentence_length=_MAX_TRAINED_BYTES,
    num_threads=2,  # fixed: it is stored in the model, and sums would be added in another order
    minloglevel=2,
)
# Letters of scripts that put no spaces between words: Thai, Lao, Tibetan; Myanmar; Khmer; Chinese and Japanese, in
# Unicode's order.
_WITHOUT_SPACES = re.compile(
    '[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff'
    '\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]')


class Tokenizer(Protocol):
  """Interface of a tokenizer.

  Whether texts can spell special tokens depends on the tokenizer: with `SentencePieceTokenizer` they cannot, with
  `ClipTokenizer` they can, as published.

  It can be pickled: a process reads its file again.

  Attributes:
    fingerprint: Hex sha256 of the vocabulary.
    size: V, the number of ids.
    pad: Pads rows; 0. It may also be the id of a word: only a mask distinguishes padding from text.
    spe: Prefix, mask, caption query and answer slot.
    eot: Ends every text.
    special_ids: Ids that are no part of a word: `spe`, `eot`, and where they exist `pad`, `unk` and others.
    word_start: bool [V], whether a piece starts a unit of whole-word masking: a word, punctuation (separate from the
      word before it), or a special token.
    word_end: bool [V], whether a piece ends a unit. A piece starts a unit if it is a start or follows an end:
      vocabularies mark one or the other.
  """
  fingerprint: str
  size: int
  pad: int
  spe: int
  eot: int
  special_ids: frozenset[int]
  word_start: np.ndarray
  word_end: np.ndarray

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without special tokens around it."""

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text before the first `eot`, without special tokens, normalized as by `encode`."""

  def detokenize(self, text: str) -> str:
    """Returns a decoded text with its words as people write them; a tokenizer that keeps spaces has nothing to do."""
    return text


class SentencePieceTokenizer(Tokenizer):
  """A `Tokenizer` over NFKC case-folded text; a character that did not occur in training is `unk`."""

  def __init__(self, model_file: str | os.PathLike[str]):
    """Reads a model that `train` wrote. Raises MissingFileError; UsageError if it lacks one of the special tokens."""
    if not storage.path(model_file).is_file():
      raise MissingFileError(f'No tokenizer {model_file}. SentencePieceTokenizer.train makes one from texts.')
    model = storage.path(model_file).read_bytes()
    self._file, self.fingerprint = model_file, hashlib.sha256(model).hexdigest()
    self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
    self.size = self._model.get_piece_size()
    pieces = [self._model.id_to_piece(i) for i in range(self.size)]
    special = ('<pad>', '<unk>', '<spe>', '<eot>')
    if missing := [piece for piece in special if piece not in pieces]:
      raise UsageError(f'The tokenizer {model_file} has no {missing[0]}. SentencePieceTokenizer.train adds it.')
    self.pad, self.unk, self.spe, self.eot = map(pieces.index, special)
    self.special_ids = frozenset((self.pad, self.unk, self.spe, self.eot))
    # Pieces do not mark the ends of words. Where no space marks their starts either, a piece is a unit by itself: a
    # whole clause would hardly ever fit into the budget of masked tokens.
    self.word_end = np.array([bool(_WITHOUT_SPACES.search(piece)) for piece in pieces])
    self.word_start = self.word_end | np.array([
        i in self.special_ids or piece.startswith('▁') or not any(map(str.isalnum, piece))
        for i, piece in enumerate(pieces)])

  def __reduce__(self):
    return type(self), (self._file,)

  @staticmethod
  def train(
      texts: Iterable[str], model_file: str | os.PathLike[str], vocab_size: int, allow_smaller_vocab: bool = False,
  ) -> 'SentencePieceTokenizer':
    """Trains on texts, writes `model_file` atomically and reads it.

    Raises:
      UsageError: The texts cannot give `vocab_size` pieces and `allow_smaller_vocab` is False, or they need more; the
        message contains the bound.
    """
    model, options = io.BytesIO(), {'hard_vocab_limit': False} if allow_smaller_vocab else {}
    model_file = pathlib.Path(model_file)
    model_file.parent.mkdir(parents=True, exist_ok=True)
    # Processes on several hosts may train the same tokenizer at the same time: each writes in a folder of its own.
    with tempfile.TemporaryDirectory(dir=model_file.parent) as folder:
      try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain.from_iterable(map(trained_parts, texts)), model_writer=model,
            vocab_size=vocab_size, **_TRAINER, **options)
      except RuntimeError as error:
        raise UsageError(f'These texts cannot give a vocabulary of {vocab_size} pieces: {error}') from error
      unfinished = pathlib.Path(folder) / model_file.name
      unfinished.write_bytes(model.getvalue())
      unfinished.replace(model_file)
    return SentencePieceTokenizer(model_file)

  def encode(self, text: str) -> list[int]:
    return self._model.encode(text)

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return self._model.encode(list(texts))

  def decode(self, ids: Iterable[int]) -> str:
    return self._model.decode([i for i in before_eot(ids, self.eot) if i not in self.special_ids])


def trained_parts(text: str) -> Iterator[str]:
  """Yields a text; one that the trainer would drop, such as a book, in parts that end before spaces."""
  size = _MAX_TRAINED_BYTES // 4  # a character has at most four bytes
  if len(text) <= size or len(text.encode()) <= _MAX_TRAINED_BYTES:
    size = len(text)
  start = 0
  while len(text) - start > size:
    space = text.rfind(' ', start + 1, start + size + 1)
    stop = space if space > 0 else start + size
    yield text[start:stop]
    start = stop
  yield text[start:]


def before_eot(ids: Iterable[int], eot: int) -> list[int]:
  """Returns the ids before the first `eot`."""
  return list(itertools.takewhile(lambda i: i != eot, map(int, ids)))
