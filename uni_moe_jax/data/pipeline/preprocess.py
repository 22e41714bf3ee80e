"""Operations on batches of examples, as plain TensorFlow functions: masking words, moving pictures.

Every random choice is a function of the example's hash and a purpose, so that the batch of a step does not depend on
what was read before it.
"""

import tensorflow as tf

from uni_moe_jax.data.pipeline import hashing
from uni_moe_jax.data.pipeline.tokenizer import Tokenizer

MASK_RATE = 0.15  # of the tokens
MASKED, RANDOM = 0.8, 0.1  # of the picked words: replaced by `spe`, by random words; the rest is kept (BERT)


def mask_words(
    text: tf.Tensor, valid: tf.Tensor, hashes: tf.Tensor, *, word_start: tf.Tensor, word_end: tf.Tensor,
    ordinary: tf.Tensor, spe: int, picks: int, always_mask: bool) -> dict[str, tf.Tensor]:
  """Whole-word masking with a fixed number of picks.

  Words are taken in random order as long as all their tokens fit into the budget of 15 % of the row's tokens.

  Args:
    text: int32 [n, S]. valid: bool [n, S].
    hashes: uint64 [n], see `hashing.example_hash`.
    word_start: bool [V], pieces that begin a word. word_end: bool [V], pieces after which another word begins.
    ordinary: int32 [V'], ids that may stand in as random words.
    spe: id of the mask token.
    picks: M.
    always_mask: replace every picked token by `spe` (evaluation: with the training mixture, copying would pay).

  Returns:
    text int32 [n, S] with words replaced; position, label int32 [n, M]; weight f32 [n, M], 0 for unused picks.
  """
  after_end = tf.pad(tf.gather(word_end, text)[:, :-1], [[0, 0], [1, 0]])
  begins = tf.gather(word_start, text) | after_end
  word = tf.cumsum(tf.cast(begins, tf.int64), axis=1)  # equal for the tokens of one word
  per_word = hashing.mix_tensor(hashes[:, None], word)

  def draw(purpose):
    return hashing.uniform(hashing.mix_tensor(per_word, purpose))

  order = tf.where(valid, draw('pick'), 2.0)
  count = tf.reduce_sum(tf.cast(valid, tf.float32), axis=1)
  budget = tf.clip_by_value(tf.round(MASK_RATE * count), 1.0, float(picks))
  # Tokens of words that come no later than this token's word, itself and its whole word included.
  so_far = tf.reduce_sum(tf.cast(order[:, None, :] <= order[:, :, None], tf.float32), axis=2)
  picked = valid & (so_far <= budget[:, None])
  position = tf.argsort(tf.cast(~picked, tf.int32), axis=1, stable=True)[:, :picks]
  weight = tf.cast(tf.gather(picked, position, batch_dims=1), tf.float32)
  position = tf.where(weight > 0, position, 0)
  label = tf.gather(text, position, batch_dims=1)
  if always_mask:
    replaced = tf.where(picked, spe, text)
  else:
    fate = draw('fate')
    index = tf.range(tf.shape(text)[1], dtype=tf.int64)[None]
    stand_in = hashing.mix_tensor(hashing.mix_tensor(hashes[:, None], index), 'stand in')
    stand_in = tf.gather(ordinary, hashing.below(stand_in, tf.size(ordinary)))
    replaced = tf.where(picked & (fate < MASKED), spe, text)
    replaced = tf.where(picked & (fate >= MASKED) & (fate < MASKED + RANDOM), stand_in, replaced)
  return dict(text=replaced, position=position, label=label, weight=weight)


def word_tables(tokenizer: Tokenizer, specials: bool) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
  """(word_start, word_end bool [V], ids that may stand in as random words; special ones among them or not)."""
  excluded = set() if specials else tokenizer.special_ids
  ordinary = sorted(set(range(tokenizer.size)) - excluded)
  return tf.constant(tokenizer.word_start), tf.constant(tokenizer.word_end), tf.constant(ordinary, tf.int32)


def shift(pixels: tf.Tensor, hashes: tf.Tensor, most: int) -> tf.Tensor:
  """Moves every other clip by up to `most` pixels both ways, zeros entering: uint8 [n, T, H, W, C], all frames alike.

  Half of them stay where they are: if all moved, a short training would hardly begin to see shapes.
  """
  if not most:
    return pixels
  n, H, W = tf.shape(pixels)[0], pixels.shape[2], pixels.shape[3]
  padded = tf.pad(pixels, [[0, 0], [0, 0], [most, most], [most, most], [0, 0]])
  down = hashing.below(hashing.mix_tensor(hashes, 'shift down'), 2 * most + 1)
  right = hashing.below(hashing.mix_tensor(hashes, 'shift right'), 2 * most + 1)
  stays = hashing.uniform(hashing.mix_tensor(hashes, 'shift at all')) < 0.5
  down, right = tf.where(stays, most, down), tf.where(stays, most, right)
  rows = down[:, None] + tf.range(H)[None]
  columns = right[:, None] + tf.range(W)[None]
  T = pixels.shape[1]
  padded = tf.gather(padded, tf.broadcast_to(rows[:, None], [n, T, H]), axis=2, batch_dims=2)
  return tf.gather(padded, tf.broadcast_to(columns[:, None, None], [n, T, H, W]), axis=3, batch_dims=3)


def colours(pixels: tf.Tensor, channels: int) -> tf.Tensor:
  """Grey [..., H, W] to [..., H, W, channels] by repetition."""
  return tf.repeat(pixels[..., None], channels, axis=-1)
