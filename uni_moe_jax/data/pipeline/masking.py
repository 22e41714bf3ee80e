"""Whole-word masking of token batches, in TensorFlow ops."""

import dataclasses

import tensorflow as tf

from uni_moe_jax.data.pipeline import hashing
from uni_moe_jax.data.pipeline.tokenizer import Tokenizer

MASK_RATE = 0.15  # of the tokens
MASKED, RANDOM = 0.8, 0.1  # of the selected words: replaced by `spe`, by random tokens; the rest is kept (BERT)


@dataclasses.dataclass(frozen=True)
class WordTables:
  """Vocabulary tables for masking.

  Attributes:
    word_start: bool [V], pieces that start a word.
    word_end: bool [V], pieces that end a word, so that the next piece starts another.
    random_ids: int32 [V'], ids that may replace a token at random.
    spe: Id of the mask token.
  """
  word_start: tf.Tensor
  word_end: tf.Tensor
  random_ids: tf.Tensor
  spe: int


def word_tables(tokenizer: Tokenizer, random_special_tokens: bool) -> WordTables:
  """Returns a tokenizer's tables; `random_special_tokens`: random tokens may be special ones."""
  excluded = frozenset() if random_special_tokens else tokenizer.special_ids
  random_ids = sorted(set(range(tokenizer.size)) - excluded)
  return WordTables(tf.constant(tokenizer.word_start), tf.constant(tokenizer.word_end),
                    tf.constant(random_ids, tf.int32), tokenizer.spe)


def mask_words(
    text: tf.Tensor, valid: tf.Tensor, hashes: tf.Tensor, tables: WordTables, *, max_predictions: int,
    always_mask: bool) -> dict[str, tf.Tensor]:
  """Masks whole words at a fixed number of positions.

  Words are selected in random order while all their tokens fit into the budget of 15 % of the row's tokens.

  Args:
    text: int32 [n, S].
    valid: bool [n, S].
    hashes: uint64 [n], see `hashing.example_hash`.
    tables: Vocabulary tables of the tokenizer.
    max_predictions: M.
    always_mask: Replace every selected token by `spe`. Used in evaluation: with the training mixture, a model that
      copies its input would score.

  Returns:
    text int32 [n, S] with replaced words; position, label int32 [n, M]; weight f32 [n, M], 0 for unused positions.
  """
  follows_end = tf.pad(tf.gather(tables.word_end, text)[:, :-1], [[0, 0], [1, 0]])
  starts = tf.gather(tables.word_start, text) | follows_end
  word = tf.cumsum(tf.cast(starts, tf.int64), axis=1)  # equal for the tokens of one word
  per_word = hashing.mix_tensor(hashes[:, None], word)

  def draw(purpose):
    return hashing.uniform(hashing.mix_tensor(per_word, purpose))

  order = tf.where(valid, draw('pick'), 2.0)
  num_tokens = tf.reduce_sum(tf.cast(valid, tf.float32), axis=1)
  budget = tf.clip_by_value(tf.round(MASK_RATE * num_tokens), 1.0, float(max_predictions))
  # Number of tokens of all words up to and including the word of this token, in selection order.
  num_so_far = tf.reduce_sum(tf.cast(order[:, None, :] <= order[:, :, None], tf.float32), axis=2)
  selected = valid & (num_so_far <= budget[:, None])
  position = tf.argsort(tf.cast(~selected, tf.int32), axis=1, stable=True)[:, :max_predictions]
  weight = tf.cast(tf.gather(selected, position, batch_dims=1), tf.float32)
  position = tf.where(weight > 0, position, 0)
  label = tf.gather(text, position, batch_dims=1)
  if always_mask:
    masked_text = tf.where(selected, tables.spe, text)
  else:
    fate = draw('fate')
    index = tf.range(tf.shape(text)[1], dtype=tf.int64)[None]
    random_hash = hashing.mix_tensor(hashing.mix_tensor(hashes[:, None], index), 'stand in')
    random_token = tf.gather(tables.random_ids, hashing.randint(random_hash, tf.size(tables.random_ids)))
    masked_text = tf.where(selected & (fate < MASKED), tables.spe, text)
    masked_text = tf.where(selected & (fate >= MASKED) & (fate < MASKED + RANDOM), random_token, masked_text)
  return dict(text=masked_text, position=position, label=label, weight=weight)
