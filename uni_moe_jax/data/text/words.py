"""Whole words of token batches: which tokens form one, and word dropout; in TensorFlow ops."""

import tensorflow as tf

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.data import hashing
from uni_moe_jax.data.text.tokenizer import Tokenizer

IN_FIELD = 'in_field'  # feature bool [n, S]: tokens that come from a field of a template; `drop_words` removes it


def number_words(text: tf.Tensor, tokenizer: Tokenizer) -> tf.Tensor:
  """Numbers the words of each row: int32 [n, S] → int64 [n, S], equal for the tokens of one word."""
  follows_end = tf.pad(tf.gather(tokenizer.word_end, text)[:, :-1], [[0, 0], [1, 0]])
  return tf.cumsum(tf.cast(tf.gather(tokenizer.word_start, text) | follows_end, tf.int64), axis=1)


def drop_words(
    features: dict[str, tf.Tensor], hashes: tf.Tensor, task: TaskSpec, tokenizer: Tokenizer) -> dict[str, tf.Tensor]:
  """Leaves out each word from a field of a template with probability `task.word_dropout`; later tokens move up.

  Args:
    features: text int32 [n, S], text_valid bool [n, S], position int32 [n, 1] and `IN_FIELD`; without the last they are
      returned as they are.
    hashes: uint64 [n], see `hashing.example_hash`.

  Returns:
    The features without `IN_FIELD`: those of a template that was filled with the other words.
  """
  if IN_FIELD not in features:
    return features
  text, valid = features['text'], features['text_valid']
  per_word = hashing.mix_tensor(hashing.mix_tensor(hashes[:, None], number_words(text, tokenizer)), 'word dropout')
  is_kept = valid & ((hashing.uniform(per_word) >= task.word_dropout) | ~features[IN_FIELD])
  order = tf.argsort(tf.cast(~is_kept, tf.int32), axis=1, stable=True)
  valid = tf.gather(is_kept, order, batch_dims=1)
  num_before = tf.cumsum(tf.cast(is_kept, tf.int32), axis=1, exclusive=True)
  return {name: value for name, value in features.items() if name != IN_FIELD} | {
      'text': tf.where(valid, tf.gather(text, order, batch_dims=1), tokenizer.pad), 'text_valid': valid,
      'position': tf.gather(num_before, features['position'], batch_dims=1)}
