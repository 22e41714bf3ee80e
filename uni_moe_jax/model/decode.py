"""Greedy caption decoding with cached keys and values, as one jitted loop.

The caption text never changes what the picture's tokens are, so the picture is encoded once. Then each pass sends two
tokens through the layers: the word just chosen, whose keys and values are kept, and the query for the next one.
Equal, token for token, to the two-stream forward of training on the words chosen so far.
"""

import dataclasses

import jax
import jax.numpy as jnp

from uni_moe_jax.model.similarity import normalise
from uni_moe_jax.model.streams import READ_NOTHING, Layout, Past
from uni_moe_jax.model.uni_perceiver import Sequence, UniPerceiver
from uni_moe_jax.tasks import Kind


def prefill_layout(kind: Kind) -> Layout:
  """The segments that a two-stream caption sees from outside: encoded once, only their keys and values matter."""
  whole = Layout.of_kind(kind)
  full = [i for i, m in enumerate(whole.masks) if m == 'full']
  return Layout(tuple(whole.conditions[i] for i in full), tuple(whole.masks[i] for i in full), READ_NOTHING)


def pass_layout(kind: Kind) -> Layout:
  """One decoding pass, [word | query]: both under the caption's condition, the query sees the word."""
  whole = Layout.of_kind(kind)
  text = whole.masks.index('two_stream')
  return Layout((whole.conditions[text],), ('causal',), 'queries', prefixed=False)


def collected_past(collected, stream: int, valid: jax.Array, room: int) -> Past:
  """Keys and values of a stream's arrays, joined along tokens, with `room` empty slots after them."""

  def joined(out, which):
    parts = [kv[which] for kv in out['kv'][stream]]
    axis = parts[0].ndim - 3
    padding = jnp.zeros(parts[0].shape[:axis] + (room,) + parts[0].shape[axis + 1:], parts[0].dtype)
    return jnp.concatenate([*parts, padding], axis=axis)

  kv = {sub: tuple((joined(out, 0), joined(out, 1)) for out in collected[sub]) for sub in ('blocks', 'tail')}
  empty = jnp.zeros((valid.shape[0], room), bool)
  return Past(kv, jnp.concatenate([valid, empty], axis=1))


def greedy(
    model: UniPerceiver, params, kind: Kind, pixels: jax.Array, words: jax.Array, *, temperature: str, spe: int,
    eot: int, length: int) -> tuple[jax.Array, jax.Array]:
  """Most likely next words until `eot`.

  Args:
    model, params: of a trained model. kind: a caption kind.
    pixels: [B, T, H, W, C].
    words: [V, D] normalised features of the vocabulary.
    temperature: its group. spe, eot: ids. length: n, words at most, `eot` included.

  Returns:
    (tokens int32 [B, n], `eot` from the first `eot` on; log-probabilities f32 [B, n], 0 after it).
  """
  B = pixels.shape[0]
  ids = jnp.arange(B, dtype=jnp.uint32)
  picture = Sequence(layout=prefill_layout(kind), ids=ids, pixels=pixels)
  collected = model.apply({'params': params}, (picture,), keys=True, method='encode').collected
  tokens_seen = sum(k.shape[-3] for k, _ in collected['tail'][0]['kv'][0])
  past = collected_past(collected, 0, jnp.ones((B, tokens_seen), bool), length)
  scale = model.apply({'params': params}, temperature, method='scale')
  layout = pass_layout(kind)

  def next_words(past: Past, word: jax.Array, t: jax.Array):
    """(logits [B, V], past with the word's keys and values) of the query at position t after `word` at t - 1."""
    slot = jnp.maximum(t - 1, 0)
    there = jnp.broadcast_to(t > 0, (B, 1))  # the first query follows no word
    sequence = Sequence(
        layout=layout, ids=ids, text=jnp.stack([word, jnp.full_like(word, spe)], axis=1),
        text_valid=jnp.concatenate([there, jnp.ones((B, 1), bool)], axis=1),
        text_positions=jnp.stack([slot, t]), past=past)

    def run(m):
      encoded = m.encode((sequence,), keys=True)
      return normalise(m.features(encoded.rows[0][:, 0])), encoded.collected

    features, new = model.apply({'params': params}, method=run)

    def keep(old, out, which):
      fresh = out['kv'][0][0][which]
      axis = fresh.ndim - 3
      fresh = jax.lax.slice_in_dim(fresh, 0, 1, axis=axis)
      return jax.lax.dynamic_update_slice_in_dim(old, fresh, tokens_seen + slot, axis=axis)

    kv = {sub: tuple((keep(k, out, 0), keep(v, out, 1)) for (k, v), out in zip(past.kv[sub], new[sub]))
          for sub in ('blocks', 'tail')}
    valid = jax.lax.dynamic_update_slice_in_dim(past.valid, there, tokens_seen + slot, axis=1)
    return scale * features @ words.T, Past(kv, valid)

  def go_on(carry: _Carry):
    return (carry.t < length) & ~carry.done.all()

  def step(carry: _Carry):
    logits, past = next_words(carry.past, carry.word, carry.t)
    log_p = jax.nn.log_softmax(logits)
    word = jnp.where(carry.done, eot, jnp.argmax(log_p, axis=-1).astype(jnp.int32))
    chosen = jnp.take_along_axis(log_p, word[:, None], axis=1)[:, 0]
    chosen = jnp.where(carry.done, 0.0, chosen)
    return _Carry(
        carry.t + 1, word, carry.done | (word == eot), past,
        jax.lax.dynamic_update_slice_in_dim(carry.tokens, word[:, None], carry.t, axis=1),
        jax.lax.dynamic_update_slice_in_dim(carry.log_p, chosen[:, None], carry.t, axis=1))

  start = _Carry(
      jnp.int32(0), jnp.full((B,), eot, jnp.int32), jnp.zeros((B,), bool), past,
      jnp.full((B, length), eot, jnp.int32), jnp.zeros((B, length), jnp.float32))
  end = jax.lax.while_loop(go_on, step, start)
  return end.tokens, end.log_p


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
  """t: position of the next query; word [B]: chosen last; done [B]; tokens, log_p: [B, n] so far."""
  t: jax.Array
  word: jax.Array
  done: jax.Array
  past: Past
  tokens: jax.Array
  log_p: jax.Array
