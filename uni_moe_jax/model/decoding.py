"""Caption decoding with cached keys and values, greedy or by beam search, as one jitted loop.

The caption text never changes what the picture's tokens are, so the picture is encoded once. Then each pass sends two
tokens through the layers: the word just chosen, whose keys and values are kept, and the query for the next one.
Equal, token for token, to the two-stream forward of training on the words chosen so far.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp

from uni_moe_jax.model import merging
from uni_moe_jax.model.attention import heads_first
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.sequences import READ_NOTHING, KVCache, Layout
from uni_moe_jax.model.trie import Trie, allowed, follow
from uni_moe_jax.model.uni_perceiver import Sequence, UniPerceiver
from uni_moe_jax.tasks.task_types import TaskType


def prefill_layout(kind: TaskType) -> Layout:
  """The segments that a two-stream caption sees from outside: encoded once, only their keys and values matter."""
  whole = Layout.of_task_type(kind)
  full = [i for i, m in enumerate(whole.masks) if m == 'full']
  return Layout(tuple(whole.conditions[i] for i in full), tuple(whole.masks[i] for i in full), READ_NOTHING)


def step_layout(kind: TaskType) -> Layout:
  """One decoding pass, [word | query]: both under the caption's condition, the query sees the word."""
  whole = Layout.of_task_type(kind)
  text = whole.masks.index('two_stream')
  return Layout((whole.conditions[text],), ('causal',), 'queries', prefixed=False, prompted=whole.conditions[0])


def prefill(model: UniPerceiver, params, kind: TaskType, pixels: jax.Array, room: int) -> KVCache:
  """What a caption looks back at: keys and values of pictures [B, T, H, W, C], and `room` empty slots for its words."""
  B = pixels.shape[0]
  picture = Sequence(layout=prefill_layout(kind), ids=jnp.arange(B, dtype=jnp.uint32), pixels=pixels)
  collected = model.apply({'params': params}, picture, keys=True, method='encode').collected

  def joined(out, which):  # the segments of a picture, along tokens
    return heads_first(jnp.concatenate([kv[which] for kv in out['kv'][0]], axis=-3))

  blocks = {sub: collected[sub] for sub in ('blocks', 'tail')}
  seen = {sub: tuple((joined(out, 0), joined(out, 1)) for out in outs) for sub, outs in blocks.items()}
  empty = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-2], room, x.shape[-1]), x.dtype), seen)
  pools = {sub: tuple(out['pools'][0] for out in outs) for sub, outs in blocks.items()}
  return KVCache(seen, empty, jnp.zeros((B, room), bool), pools)


def decode_step(
    model: UniPerceiver, params, kind: TaskType, past: KVCache, word: jax.Array, t: jax.Array, *, spe: int
) -> tuple[jax.Array, KVCache]:
  """One decoding pass: reads the word at position t - 1, asks for the one at t.

  Args:
    past: see `prefill`. word: int32 [B], any where t is 0: the first query follows no word. t: int32 scalar.
    spe: id of the query.

  Returns:
    (features [B, D] of the query, normalised; past with the word's keys and values).
  """
  B, slot = word.shape[0], jnp.maximum(t - 1, 0)
  there = jnp.broadcast_to(t > 0, (B, 1))
  sequence = Sequence(
      layout=step_layout(kind), ids=jnp.arange(B, dtype=jnp.uint32), text=jnp.stack([word, jnp.full_like(word, spe)], axis=1),
      text_valid=jnp.concatenate([there, jnp.ones((B, 1), bool)], axis=1), text_positions=jnp.stack([slot, t]), past=past)

  def run(m):
    encoded = m.encode(sequence, keys=True)
    return normalize(m.features(encoded.hidden[:, 0])), encoded.collected

  features, new = model.apply({'params': params}, method=run)

  def keep(old, out, which):
    fresh = heads_first(jax.lax.slice_in_dim(out['kv'][0][0][which], 0, 1, axis=-3))
    return jax.lax.dynamic_update_slice_in_dim(old, fresh, slot, axis=-2)

  words = {sub: tuple((keep(k, out, 0), keep(v, out, 1)) for (k, v), out in zip(past.words[sub], new[sub]))
           for sub in ('blocks', 'tail')}
  return features, past.replace(words=words, valid=jax.lax.dynamic_update_slice_in_dim(past.valid, there, slot, axis=1))


@flax.struct.dataclass
class Captions:
  """The k best captions of each picture, best first.

  Attributes:
    tokens: int32 [B, k, n], `eot` from the first `eot` on.
    log_p: f32 [B, k, n] of each token, 0 after `eot`.
    scores: f32 [B, k], Σ log_p, divided by (words + 1)^length_penalty.
    candidates: f32 [n, B, k + 1], the best sums of log-probabilities at each step, the first that was left out included;
      -inf where there are not as many, and after the end.
  """
  tokens: jax.Array
  log_p: jax.Array
  scores: jax.Array
  candidates: jax.Array


@flax.struct.dataclass
class _Carry:
  """t: position of the next query. word, done [B, k]: chosen last. score [B, k]. words, valid as in `KVCache`, others as in `Captions`."""
  t: jax.Array
  word: jax.Array
  done: jax.Array
  score: jax.Array
  words: Any
  valid: jax.Array
  tokens: jax.Array
  log_p: jax.Array
  candidates: jax.Array


def beam_search(
    model: UniPerceiver, params, kind: TaskType, pixels: jax.Array, words: jax.Array, *, temperature: str, spe: int,
    eot: int, max_len: int, beam_size: int = 1, length_penalty: float = 0.0, trie: Trie | None = None) -> Captions:
  """The most likely captions that a beam of hypotheses finds; with one beam, the greedy caption.

  A hypothesis that has ended keeps its place and its score. The loop stops when all have ended.

  Args:
    model, params: of a trained model. kind: a caption kind.
    pixels: [B, T, H, W, C].
    words: [V, D] normalised features of the vocabulary.
    temperature: its group. spe, eot: ids. max_len: n, words at most, `eot` included.
    beam_size: k, hypotheses that are kept of each picture.
    length_penalty: at the end, scores are divided by (number of words without `eot` + 1)^length_penalty.
    trie: only its sequences are answers; None: every sequence.
  """
  B, V = pixels.shape[0], words.shape[0]
  past = _repeat(prefill(model, params, kind, pixels, max_len), beam_size, shared=model.mesh is None)
  passes = step_layout(kind)
  spec, merged = merging.for_conditions(model.spec, params, (*passes.conditions, passes.prompt_condition))
  reader = model.clone(spec=spec)
  scale = model.apply({'params': params}, temperature, method='scale')

  def next_words(past: KVCache, word: jax.Array, t: jax.Array):
    """(logits [B, k, V], past with the word's keys and values) of the query at position t after `word` at t - 1."""
    features, past = decode_step(reader, merged, kind, past, word, t, spe=spe)
    return (scale * features @ words.T).reshape(B, beam_size, V), past

  def go_on(carry: tuple[_Carry, jax.Array]):
    return (carry[0].t < max_len) & ~carry[0].done.all()

  def step(carry: tuple[_Carry, jax.Array]):
    c, node = carry
    logits, new = next_words(past.replace(words=c.words, valid=c.valid), c.word.reshape(-1), c.t)
    log_p = jax.nn.log_softmax(logits)
    if trie is not None:
      log_p = jnp.where(allowed(trie, node, V), log_p, -jnp.inf)
    # A hypothesis that has ended goes on in one way alone: `eot`, at no cost.
    ended = jnp.where(jnp.arange(V) == eot, 0.0, -jnp.inf)[None, None]
    log_p = jnp.where(c.done[..., None], ended, log_p)
    sums = (c.score[..., None] + log_p).reshape(B, beam_size * V)
    best, index = jax.lax.top_k(sums, min(beam_size + 1, beam_size * V))
    index = index[:, :beam_size]
    parent, word = index // V, (index % V).astype(jnp.int32)
    chosen = jnp.take_along_axis(log_p.reshape(B, beam_size * V), index, axis=1)
    done = _take(c.done, parent)

    def put(rows, value):
      return jax.lax.dynamic_update_slice_in_dim(_take(rows, parent), value[..., None], c.t, axis=2)

    going_on = _Carry(
        # Where answers run out, a hypothesis that is none ends, too.
        c.t + 1, word, done | (word == eot) | jnp.isneginf(best[:, :beam_size]), best[:, :beam_size],
        _reorder(new.words, parent), new.valid, put(c.tokens, word), put(c.log_p, chosen),
        c.candidates.at[c.t, :, :best.shape[1]].set(best))
    return going_on, (node if trie is None else follow(trie, _take(node, parent), word, done))

  empty = jnp.zeros((B, beam_size), jnp.int32)
  start = _Carry(
      t=jnp.int32(0), word=jnp.full_like(empty, eot), done=jnp.zeros((B, beam_size), bool),
      # All hypotheses of a picture are one until the first word is chosen.
      score=jnp.broadcast_to(jnp.where(jnp.arange(beam_size) == 0, 0.0, -jnp.inf), (B, beam_size)), words=past.words, valid=past.valid,
      tokens=jnp.full((B, beam_size, max_len), eot, jnp.int32), log_p=jnp.zeros((B, beam_size, max_len)),
      candidates=jnp.full((max_len, B, beam_size + 1), -jnp.inf))
  end, _ = jax.lax.while_loop(go_on, step, (start, empty))
  count = (end.tokens != eot).sum(-1)
  scores = end.score / (count + 1.0) ** length_penalty
  order = jnp.argsort(-scores, axis=1, stable=True)
  return Captions(_take(end.tokens, order), _take(end.log_p, order), _take(scores, order), end.candidates)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  """Hypotheses [B, k, …] in another order: index int32 [B, k]."""
  return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def _repeat(past: KVCache, beam_size: int, shared: bool) -> KVCache:
  """Words of every row of the batch `beam_size` times in a row.

  shared: all hypotheses of a picture look back at one copy of it. On a mesh each has its own: XLA's partitioner (jaxlib 0.10.2) crashes
  where unevenly laid rows are joined for that.
  """
  repeated = lambda tree, axis: jax.tree.map(lambda x: jnp.repeat(x, beam_size, axis=x.ndim + axis), tree)
  past = past.replace(words=repeated(past.words, -4), valid=repeated(past.valid, -2), pools=repeated(past.pools, -2))
  return past if shared else past.replace(seen=repeated(past.seen, -4))


def _reorder(words, parent: jax.Array):
  """Each hypothesis takes over its parent's words."""
  B, beam_size = parent.shape
  if beam_size == 1:
    return words
  rows = (parent + beam_size * jnp.arange(B)[:, None]).reshape(-1)
  return jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - 4), words)
