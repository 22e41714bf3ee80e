"""Rows of tokens: texts tokenized, cut and padded to one length."""

from collections.abc import Sequence

import numpy as np

from uni_moe_jax.data.text.templates import CHARS_PER_TOKEN, first_tokens
from uni_moe_jax.data.text.tokenizer import Tokenizer


def pad_tokens(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
  """Pads rows of tokens: (ids int32 [U, S], valid bool [U, S])."""
  ids, valid = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    ids[i, :len(row)], valid[i, :len(row)] = row, True
  return ids, valid


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> list[list[int]]:
  """Returns the tokens of each text, truncated to `length`, with `eot` as the last one."""
  is_long = [len(text) > CHARS_PER_TOKEN * length for text in texts]  # perhaps a document
  rows = tokenizer.encode_batch(['' if long else text for text, long in zip(texts, is_long, strict=True)])
  return [(first_tokens(tokenizer, text, length - 1) if long else row[:length - 1]) + [tokenizer.eot]
          for text, long, row in zip(texts, is_long, rows, strict=True)]


def distinct_rows(
    texts: Sequence[str], tokenizer: Tokenizer, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Rows of tokens of texts; those with the same tokens, cut to `length`, have one row.

  Returns:
    (tokens int32 [U, S], valid bool [U, S], int32 [n], the row of each text), in the order of the texts.
  """
  rows = list(map(tuple, encode_texts(texts, tokenizer, length)))
  index = {row: i for i, row in enumerate(dict.fromkeys(rows))}
  return *pad_tokens(list(index), length, tokenizer.pad), np.array([index[row] for row in rows], np.int32)
