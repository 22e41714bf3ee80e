"""Texts to token ids and back; what is asked of a tokenizer, and one whose special tokens no text can spell."""

import io
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import sentencepiece

from uni_moe_jax.utils.errors import MissingFileError, UsageError

# What the trainer is told apart from texts and size: the same texts give the same bytes.
_TRAINER = dict(
    # On 50 thousand paragraphs: 4 s, and 3 % fewer tokens than bpe, which takes half a second.
    model_type='unigram',
    normalization_rule_name='nmt_nfkc_cf',  # unlike nfkc_cf it takes tabs and line ends for blanks
    character_coverage=0.9999,  # the default, 0.9995, makes '!' unknown
    pad_id=0, unk_id=1, bos_id=-1, eos_id=-1,
    pad_piece='<pad>', unk_piece='<unk>',
    control_symbols=['<spe>', '<eot>'],  # control: text with these letters never becomes these ids
    max_sentence_length=1 << 20,  # bytes; longer texts would be left out without a word
    num_threads=2,  # fixed: it is stored in the model, and sums would be added in another order
    minloglevel=2,
)


class Tokenizer(Protocol):
  """What the rest of the project asks of a tokenizer.

  Whether texts can spell special tokens is each tokenizer's own contract: `SentencePieceTokenizer`'s cannot,
  `ClipTokenizer`'s can, as published.

  Attributes:
    size: V, the number of ids.
    pad: fills rows; 0. It may be the id of a word: only a mask tells filling from text.
    spe: prefix, mask, caption query and answer slot.
    eot: ends every text.
    special_ids: the ids that no part of a word has: `spe`, `eot`, and where there are such `pad`,
      `unk` and others.
    word_start: bool [V], whether a piece begins a unit of whole-word masking: a word, punctuation
      (the stop after a word is not part of it), or a special token.
    word_end: bool [V], whether a piece ends a unit, so that the next one begins another. A piece
      begins a unit if it is a start or follows an end: vocabularies mark one or the other.
  """
  size: int
  pad: int
  spe: int
  eot: int
  special_ids: frozenset[int]
  word_start: np.ndarray
  word_end: np.ndarray

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without special tokens around it."""

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of every text."""

  def decode(self, ids: Iterable[int]) -> str:
    """The text before the first `eot`, without special tokens, folded as `encode` folds it."""


class SentencePieceTokenizer:
  """A `Tokenizer` over NFKC case-folded text; a character that training did not see is `unk`."""

  def __init__(self, model_file: str | os.PathLike[str]):
    """Reads a model that `train` wrote.

    Raises:
      MissingFileError: there is no such file.
      UsageError: the model lacks one of the special tokens.
    """
    if not pathlib.Path(model_file).is_file():
      raise MissingFileError(
          f'No tokenizer {model_file}. SentencePieceTokenizer.train makes one from texts.')
    self._model = sentencepiece.SentencePieceProcessor(model_file=os.fspath(model_file))
    self.size = self._model.get_piece_size()
    self.pad, self.unk, self.spe, self.eot = (
        self._special(piece, model_file) for piece in ('<pad>', '<unk>', '<spe>', '<eot>'))
    self.special_ids = frozenset((self.pad, self.unk, self.spe, self.eot))
    pieces = [self._model.id_to_piece(i) for i in range(self.size)]
    self.word_start = np.array([
        i in self.special_ids or piece.startswith('▁') or not any(map(str.isalnum, piece))
        for i, piece in enumerate(pieces)
    ])
    self.word_end = np.zeros(self.size, bool)  # pieces do not know where their word ends

  @staticmethod
  def train(
      texts: Iterable[str], model_file: str | os.PathLike[str], vocab_size: int, fewer: bool = False,
  ) -> 'SentencePieceTokenizer':
    """Learns pieces from texts, writes `model_file` (whole or not at all) and reads it.

    Raises:
      UsageError: these texts cannot give `vocab_size` pieces, and fewer will not do, or they need more; says the bound.
    """
    model, soft = io.BytesIO(), {'hard_vocab_limit': False} if fewer else {}
    try:
      sentencepiece.SentencePieceTrainer.train(
          sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, **_TRAINER, **soft)
    except RuntimeError as error:
      raise UsageError(
          f'These texts cannot give a vocabulary of {vocab_size} pieces: {error}') from error
    model_file = pathlib.Path(model_file)
    model_file.parent.mkdir(parents=True, exist_ok=True)
    partial = model_file.with_name(f'.{model_file.name}.{os.getpid()}')
    partial.write_bytes(model.getvalue())
    partial.replace(model_file)
    return SentencePieceTokenizer(model_file)

  def encode(self, text: str) -> list[int]:
    return self._model.encode(text)

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return self._model.encode(list(texts))

  def decode(self, ids: Iterable[int]) -> str:
    ids = [int(i) for i in ids]
    if self.eot in ids:
      ids = ids[:ids.index(self.eot)]
    return self._model.decode([i for i in ids if i not in self.special_ids])

  def _special(self, piece: str, model_file: str | os.PathLike[str]) -> int:
    found = self._model.piece_to_id(piece)
    if self._model.id_to_piece(found) != piece:
      raise UsageError(
          f'The tokenizer {model_file} has no {piece}. SentencePieceTokenizer.train adds it.')
    return found


def pack(token_lists: Iterable[Sequence[int]], length: int, eot: int) -> np.ndarray:
  """Texts, each ended by `eot`, one after the other, cut into full rows.

  Args:
    token_lists: ids per text, without `eot`.
    length: tokens per row.
    eot: id that ends a text.

  Returns:
    int32 [N, length]. The last tokens, that fill no row, are left out.

  Raises:
    UsageError: the texts do not fill one row.
  """
  flat = np.array([token for ids in token_lists for token in (*ids, eot)], np.int32)
  if len(flat) < length:
    raise UsageError(
        f'{len(flat)} tokens do not fill a row of length {length}; '
        'give more text or a smaller length.')
  return flat[:len(flat) // length * length].reshape(-1, length)
