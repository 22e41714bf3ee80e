"""Caption decoding with cached keys and values, greedy or by beam search, as one jitted loop.

A caption never changes the tokens of its image, so the image is encoded once. Then each step sends two tokens through
the layers: the word just chosen, whose keys and values are cached, and the query for the next one. The result equals,
token for token, the two-stream forward pass of training on the words chosen so far.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp

from uni_moe_jax.kernels.attention import heads_first
from uni_moe_jax.model import merging
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.sequences import NO_WORD, READ_NOTHING, InputSequence, KVCache, Layout
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.moe.precision import EXACT
from uni_moe_jax.tasks.task_types import TaskType

_STACKS = 'blocks', 'tail'


def prefill_layout(task_type: TaskType) -> Layout:
  """The segments that a two-stream caption attends to; only their keys and values are used."""
  layout = Layout.of_task_type(task_type)
  full = [i for i, m in enumerate(layout.masks) if m == 'full']
  return Layout(tuple(layout.conditions[i] for i in full), tuple(layout.masks[i] for i in full), READ_NOTHING)


def step_layout(task_type: TaskType) -> Layout:
  """One decoding step, [word | query]: both under the caption's condition, the query sees the word."""
  layout = Layout.of_task_type(task_type)
  text = layout.masks.index('two_stream')
  return Layout((layout.conditions[text],), ('causal',), 'queries', prefixed=False, prompted=layout.conditions[0])


def prefill(model: UniPerceiver, params, task_type: TaskType, pixels: jax.Array, max_len: int) -> KVCache:
  """The cache of images [B, T, H, W, C], with empty slots for `max_len` words."""
  B = pixels.shape[0]
  image = InputSequence(layout=prefill_layout(task_type), ids=jnp.arange(B, dtype=jnp.uint32), pixels=pixels)
  collected = model.apply({'params': params}, image, keys=True, method='encode').collected

  def joined(out, which):  # the segments of an image, along tokens
    return heads_first(jnp.concatenate([kv[which] for kv in out['kv'][0]], axis=-3))

  fixed = {sub: tuple((joined(out, 0), joined(out, 1)) for out in collected[sub]) for sub in _STACKS}
  words = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-2], max_len, x.shape[-1]), x.dtype), fixed)
  pools = {sub: tuple(out['pools'][0] for out in collected[sub]) for sub in _STACKS}
  n = model.spec.word_neighbors
  recent = jnp.full((B, n), NO_WORD, jnp.int32) if n else None
  return KVCache(fixed, words, jnp.zeros((B, max_len), bool), pools, recent)


def decode_step(
    model: UniPerceiver, params, task_type: TaskType, kv_cache: KVCache, word: jax.Array, t: jax.Array, *, spe: int
) -> tuple[jax.Array, KVCache]:
  """One decoding step: reads the word at position t - 1 and queries position t.

  Args:
    kv_cache: see `prefill`. word: int32 [B], arbitrary if t is 0: no word precedes the first query. t: int32 scalar.
    spe: id of the query.

  Returns:
    (features [B, D] of the query, normalized; cache with the word's keys and values).
  """
  B, slot = word.shape[0], jnp.maximum(t - 1, 0)
  word_valid = jnp.broadcast_to(t > 0, (B, 1))
  recent = before = None
  if kv_cache.recent is not None:
    recent = jnp.where(word_valid, jnp.concatenate([word[:, None], kv_cache.recent[:, :-1]], axis=1), NO_WORD)
    before = jnp.stack([kv_cache.recent, recent], axis=1)
  sequence = InputSequence(
      layout=step_layout(task_type), ids=jnp.arange(B, dtype=jnp.uint32),
      text=jnp.stack([word, jnp.full_like(word, spe)], axis=1),
      text_valid=jnp.concatenate([word_valid, jnp.ones((B, 1), bool)], axis=1), text_positions=jnp.stack([slot, t]),
      text_before=before, kv_cache=kv_cache)

  def run(m):
    encoded = m.encode(sequence, keys=True)
    return normalize(m.features(encoded.hidden[:, 0])), encoded.collected

  features, collected = model.apply({'params': params}, method=run)

  def insert(cached, out, which):
    new = heads_first(jax.lax.slice_in_dim(out['kv'][0][0][which], 0, 1, axis=-3))
    return jax.lax.dynamic_update_slice_in_dim(cached, new, slot, axis=-2)

  words = {
      sub: tuple((insert(k, out, 0), insert(v, out, 1)) for (k, v), out in zip(kv_cache.words[sub], collected[sub]))
      for sub in _STACKS}
  valid = jax.lax.dynamic_update_slice_in_dim(kv_cache.valid, word_valid, slot, axis=1)
  return features, kv_cache.replace(words=words, valid=valid, recent=recent)


@flax.struct.dataclass
class Captions:
  """The k best captions of each image, best first."""
  tokens: jax.Array  # int32 [B, k, n], `eot` from the first `eot` on
  log_p: jax.Array  # f32 [B, k, n] of each token, 0 after `eot`
  scores: jax.Array  # f32 [B, k], Σ log_p, divided by (words + 1)^length_penalty
  # f32 [n, B, k + 1], the best sums of log-probabilities at each step, the first discarded one included; -inf if there
  # are fewer, and after the end.
  candidates: jax.Array


@flax.struct.dataclass
class _Carry:
  """State of the loop. words, valid, recent: as in `KVCache`; tokens, log_p, candidates: as in `Captions`."""
  t: jax.Array  # position of the next query
  word: jax.Array  # [B, k], last word of each hypothesis
  done: jax.Array  # [B, k], whether it has ended
  score: jax.Array  # [B, k], Σ log_p
  words: Any
  valid: jax.Array
  recent: jax.Array | None
  tokens: jax.Array
  log_p: jax.Array
  candidates: jax.Array


@flax.struct.dataclass
class Decoder:
  """A captioning model with one kernel per condition: its experts are merged once for any number of searches."""
  task_type: TaskType = flax.struct.field(pytree_node=False)
  prefill_model: UniPerceiver = flax.struct.field(pytree_node=False)
  step_model: UniPerceiver = flax.struct.field(pytree_node=False)
  prefill_params: Any
  step_params: Any

  @classmethod
  def of(cls, model: UniPerceiver, params, task_type: TaskType) -> 'Decoder':
    """Of a model with experts, or of one that is merged already or cannot be merged, which stays as it is."""
    # One model for both would copy the kernel of its condition out of an array at every word.
    (image, image_params), (word, word_params) = (
        merging.merge_experts(
            model.spec, params, layout.conditions + (layout.prompt_condition,) * (model.spec.num_deep_prompts > 0))
        for layout in (prefill_layout(task_type), step_layout(task_type)))
    return cls(task_type, model.clone(spec=image), model.clone(spec=word), image_params, word_params)


def beam_search(
    decoder: Decoder, pixels: jax.Array, words: jax.Array, *, temperature: str, spe: int, eot: int, max_len: int,
    beam_size: int = 1, length_penalty: float = 0.0) -> Captions:
  """The most likely captions by beam search; with one beam, the greedy caption.

  A hypothesis that has ended stays in the beam with its score. The loop stops when all have ended.

  Args:
    pixels: [B, T, H, W, C]; on a mesh B is a multiple of the batch shards.
    words: [V, D] normalized features of the vocabulary.
    temperature: temperature group. spe, eot: token ids. max_len: n, number of words with `eot`.
    beam_size: k, hypotheses per image.
    length_penalty: at the end, scores are divided by (number of words without `eot` + 1)^length_penalty.
  """
  B, V, model = pixels.shape[0], words.shape[0], decoder.step_model
  kv_cache = prefill(decoder.prefill_model, decoder.prefill_params, decoder.task_type, pixels, max_len)
  kv_cache = _repeat(kv_cache, beam_size, shared=model.mesh is None)
  scale = model.apply({'params': decoder.step_params}, temperature, method='scale')

  def next_words(c: _Carry):
    """(logits [B, k, V] of the query at position t, cache with the word at t - 1)."""
    cache = kv_cache.replace(words=c.words, valid=c.valid, recent=c.recent)
    features, cache = decode_step(
        model, decoder.step_params, decoder.task_type, cache, c.word.reshape(-1), c.t, spe=spe)
    return jnp.matmul(scale * features, words.T, precision=EXACT).reshape(B, beam_size, V), cache

  def step(c: _Carry) -> _Carry:
    logits, cache = next_words(c)
    log_p = jax.nn.log_softmax(logits)
    # A hypothesis that has ended continues with `eot` only, at no cost.
    only_eot = jnp.where(jnp.arange(V) == eot, 0.0, -jnp.inf)[None, None]
    log_p = jnp.where(c.done[..., None], only_eot, log_p)
    sums = (c.score[..., None] + log_p).reshape(B, beam_size * V)
    # The barrier keeps slices away: XLA's CPU backend sorts all sums where values and indices are cut differently.
    # One barrier per array: where the module is partitioned, XLA aborts at a barrier of what top_k returns.
    best, index = map(jax.lax.optimization_barrier, jax.lax.top_k(sums, min(beam_size + 1, beam_size * V)))
    index = index[:, :beam_size]
    parent, word = index // V, (index % V).astype(jnp.int32)
    chosen = jnp.take_along_axis(log_p.reshape(B, beam_size * V), index, axis=1)

    def put(rows, value):
      return jax.lax.dynamic_update_slice_in_dim(_take(rows, parent), value[..., None], c.t, axis=2)

    return _Carry(
        t=c.t + 1, word=word, done=_take(c.done, parent) | (word == eot), score=best[:, :beam_size],
        words=_reorder(cache.words, parent), valid=cache.valid, recent=_reorder(cache.recent, parent, axis=-2),
        tokens=put(c.tokens, word), log_p=put(c.log_p, chosen),
        candidates=c.candidates.at[c.t, :, :best.shape[1]].set(best))

  start = _Carry(
      t=jnp.int32(0), word=jnp.full((B, beam_size), eot, jnp.int32), done=jnp.zeros((B, beam_size), bool),
      # All hypotheses of an image are equal until the first word: only one of them counts.
      score=jnp.broadcast_to(jnp.where(jnp.arange(beam_size) == 0, 0.0, -jnp.inf), (B, beam_size)),
      words=kv_cache.words, valid=kv_cache.valid, recent=kv_cache.recent,
      tokens=jnp.full((B, beam_size, max_len), eot, jnp.int32), log_p=jnp.zeros((B, beam_size, max_len)),
      candidates=jnp.full((max_len, B, beam_size + 1), -jnp.inf))
  end = jax.lax.while_loop(lambda c: (c.t < max_len) & ~c.done.all(), step, start)
  num_words = (end.tokens != eot).sum(-1)
  scores = end.score / (num_words + 1.0) ** length_penalty
  order = jnp.argsort(-scores, axis=1, stable=True)
  return Captions(_take(end.tokens, order), _take(end.log_p, order), _take(scores, order), end.candidates)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  """Reorders hypotheses [B, k, …] by index int32 [B, k]."""
  return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def _repeat(kv_cache: KVCache, beam_size: int, shared: bool) -> KVCache:
  """Repeats the words of every example `beam_size` times in a row.

  shared: all hypotheses of an image attend to one copy of its keys. On a mesh each has its own copy: XLA's partitioner
  (jaxlib 0.10.2) crashes if it must join unevenly sharded rows.
  """
  repeated = lambda tree, axis: jax.tree.map(lambda x: jnp.repeat(x, beam_size, axis=x.ndim + axis), tree)
  kv_cache = kv_cache.replace(
      words=repeated(kv_cache.words, -4), valid=repeated(kv_cache.valid, -2), pools=repeated(kv_cache.pools, -2),
      recent=repeated(kv_cache.recent, -2))
  return kv_cache if shared else kv_cache.replace(fixed=repeated(kv_cache.fixed, -4))


def _reorder(words, parent: jax.Array, axis: int = -4):
  """Gives each hypothesis its parent's words. axis: of the hypotheses."""
  B, beam_size = parent.shape
  if beam_size == 1:
    return words
  rows = (parent + beam_size * jnp.arange(B)[:, None]).reshape(-1)
  return jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim + axis), words)
