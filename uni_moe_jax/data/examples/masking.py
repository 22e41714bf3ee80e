"""Whole-word masking of token batches, in TensorFlow ops."""

import tensorflow as tf

from uni_moe_jax.data import hashing
from uni_moe_jax.data.text import words
from uni_moe_jax.data.text.tokenizer import Tokenizer

MASK_RATE = 0.15  # of the tokens
MASKED, RANDOM = 0.8, 0.1  # of the selected words: replaced by `spe`, by random tokens; the rest is kept (BERT)


def mask_words(text: tf.Tensor, hashes: tf.Tensor, tokenizer: Tokenizer, *, max_predictions: int, always_mask: bool,
               random_special_tokens: bool) -> dict[str, tf.Tensor]:
  """Masks whole words at a fixed number of positions.

  Words are selected in random order while all their tokens fit into the budget of 15 % of the row's tokens.

  Args:
    text: int32 [n, S], full rows.
    hashes: uint64 [n], see `hashing.example_hash`.
    max_predictions: M.
    always_mask: Replace every selected token by `spe`. Used in evaluation: with the training mixture, a model that
      copies its input would score.
    random_special_tokens: Random tokens may be special ones.

  Returns:
    text int32 [n, S] with replaced words; position, label int32 [n, M]; weight f32 [n, M], 0 for unused positions.
  """
  length = tf.shape(text)[1]
  per_word = hashing.mix_tensor(hashes[:, None], words.number_words(text, tokenizer))
  order = hashing.uniform(hashing.mix_tensor(per_word, 'pick'))
  budget = tf.clip_by_value(tf.round(MASK_RATE * tf.cast(length, tf.float32)), 1.0, float(max_predictions))
  # Number of tokens of all words up to and including the word of this token, in selection order.
  num_so_far = tf.reduce_sum(tf.cast(order[:, None, :] <= order[:, :, None], tf.float32), axis=2)
  selected = num_so_far <= budget
  position = tf.argsort(tf.cast(~selected, tf.int32), axis=1, stable=True)[:, :max_predictions]
  weight = tf.cast(tf.gather(selected, position, batch_dims=1), tf.float32)
  position = tf.where(weight > 0, position, 0)
  label = tf.gather(text, position, batch_dims=1)
  if always_mask:
    text = tf.where(selected, tokenizer.spe, text)
  else:
    excluded = frozenset() if random_special_tokens else tokenizer.special_ids
    random_ids = tf.constant([i for i in range(tokenizer.size) if i not in excluded], tf.int32)
    random_hash = hashing.mix_tensor(
        hashing.mix_tensor(hashes[:, None], tf.range(length, dtype=tf.int64)[None]), 'stand in')
    random_token = tf.gather(random_ids, hashing.randint(random_hash, tf.size(random_ids)))
    fate = hashing.uniform(hashing.mix_tensor(per_word, 'fate'))
    text = tf.where(selected & (fate < MASKED), tokenizer.spe, text)
    text = tf.where(selected & (fate >= MASKED) & (fate < MASKED + RANDOM), random_token, text)
  return dict(text=text, position=position, label=label, weight=weight)
