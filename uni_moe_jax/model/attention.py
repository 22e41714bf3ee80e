"""Attention over separate parts of keys and values: of a cache, of prompts, of the tokens themselves."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from uni_moe_jax.kernels import attention as attention_kernels
from uni_moe_jax.kernels.attention import heads_first
from uni_moe_jax.kernels.attention import short as short_attention
from uni_moe_jax.model import masks
from uni_moe_jax.model.prompts import prompt_table
from uni_moe_jax.model.sequences import EmbeddedSequence, KeysValues, KVCache
from uni_moe_jax.model.sublayer import Context, Hidden, MergedRouting, Pools, Sublayer, output_projection
from uni_moe_jax.moe.layers import Projection, xavier_uniform


class Attention(Sublayer):
  """Multi-head attention within each sequence. All projections of a segment share one routing."""

  SUBLAYER = 'attention'

  def setup(self):
    spec = self.spec
    width, heads = {'embed': spec.width}, {'heads': spec.num_heads, 'head_dim': spec.head_dim}
    init = xavier_uniform(spec.width, spec.width)
    self.router = self.make_router()
    self.qkv = self.make_projection(width, {'qkv': 3, **heads}, init)
    self.attention_out = self.make_projection(heads, width, init)

  def __call__(
      self, hidden: Hidden, scale: jax.Array, prompts: dict[str, jax.Array], caches: tuple[KVCache | None, ...],
      pools: Pools, context: Context) -> tuple[Hidden, dict[str, Any]]:
    """Attends in every sequence.

    Args:
      hidden: normalized, f32. scale: f32 [D], LayerScale of the outputs.
      prompts: normalized deep prompts [1, P, D] by table.
      caches: of this layer. pools: see `Sublayer.pool`.

    Returns:
      (outputs, {'router_stats', 'token_routing', 'kv'}). With `context.readout_only`, outputs are of readout rows.
    """
    merged = self.merge_routing(context)
    coef = None if merged is None else merged.coef
    qkv = self.qkv(coef)
    # Sliced once: each slice would add a padded copy to the gradient of the kernels.
    q_only, kv_only = qkv.slice(slice(0, 1)), qkv.slice(slice(1, None))
    out, scale = output_projection(self.attention_out, coef, scale, context)
    outputs, all_kv, usages, token_routing = [], [], [], []
    for sequence, segments, cache, pool in zip(context.sequences, hidden, caches, pools, strict=True):
      layout, rows = sequence.layout, sequence.take_readout
      extra_kv = [] if cache is None else cache.parts(sequence.cache_valid)
      table = prompt_table(self.spec, layout.is_target)
      if table in prompts:
        part, usage = self._prompt_kv(prompts[table], merged, kv_only, sequence, pool, context)
        extra_kv.append(part)
        usages.append((layout.prompt_condition, usage))

      routings, queries, kv, ys = [], {}, [], [None] * len(segments)
      for i, (x, condition) in enumerate(zip(segments, layout.conditions, strict=True)):
        routing = self.route(x, merged, condition, sequence.tokens(i), pool, context)
        routings.append(routing)
        if not context.readout_only:
          y, usage = routing.apply(x, qkv)
          q, k, v = (y[:, :, j] for j in range(3))
          if not extra_kv and self._is_short(q, i, sequence):
            ys[i] = short_attention.attend(y, sequence.valid[i], self.mesh)
          else:
            queries[i] = q
        else:
          y, usage = routing.apply(x, kv_only)
          k, v = y[:, :, 0], y[:, :, 1]
          if i == layout.readout_segment:
            routings[i] = routing.take(rows, sequence.tokens(i, readout_only=True)['valid'])
            y, repeated = routings[i].apply(rows(x), q_only)
            queries[i] = y[:, :, 0]
            usages.append((condition, repeated))
        kv.append((k, v))
        usages.append((condition, usage))

      for i, q in queries.items():
        ys[i] = self._attend(q, kv, extra_kv, i, sequence, context.readout_only)
      outputs.append(tuple(
          None if y is None else scale * routing.apply(y, out)[0] for y, routing in zip(ys, routings, strict=True)))
      all_kv.append(tuple(kv))
      token_routing.append(tuple(r.output for r in routings))
    collected = self.collect(merged, usages, token_routing, context)
    return tuple(outputs), {**collected, 'kv': tuple(all_kv)}

  def _prompt_kv(
      self, prompts: jax.Array, merged: MergedRouting | None, kv_only: Projection, sequence: EmbeddedSequence,
      pool: dict[str, jax.Array], context: Context):
    """(keys and values, usage) of deep prompts [1, P, D], under the sequence's prompt condition."""
    if merged is None:  # a token router routes them for each example
      prompts = jnp.broadcast_to(prompts, (sequence.ids.shape[0], *prompts.shape[1:]))
    tokens = sequence.prompt_tokens(prompts.shape[1])
    routing = self.route(prompts, merged, sequence.layout.prompt_condition, tokens, pool, context)
    y, usage = routing.apply(prompts, kv_only)
    return (heads_first(y[:, :, 0]), heads_first(y[:, :, 1]), None), usage

  def _is_short(self, q: jax.Array, index: int, sequence: EmbeddedSequence) -> bool:
    """Whether a segment attends within itself alone, by the kernel for short sequences."""
    visible = masks.visible_segments(sequence.layout.masks, index)
    return sequence.layout.masks[index] == 'full' and visible == (index,) and (
        attention_kernels.serves_short(self.spec.attention_impl, q, self.mesh))

  def _attend(
      self, q: jax.Array, kv: list[tuple[jax.Array, jax.Array]], extra_kv: list[KeysValues], index: int,
      sequence: EmbeddedSequence, readout_only: bool) -> jax.Array:
    """Attention of one segment's queries [B, Q, N, H] over its visible keys and extra ones → [B, Q, N, H]."""
    layout = sequence.layout
    visible = masks.visible_segments(layout.masks, index)
    k, v = (kv[visible[0]] if len(visible) == 1 else
            tuple(jnp.concatenate([kv[i][j] for i in visible], axis=1) for j in (0, 1)))
    queries_only = readout_only and layout.readout == 'queries'
    mask = masks.attention_mask(layout.masks, index, sequence.lengths, sequence.valid, queries_only)
    if extra_kv:
      return attend(q, [*extra_kv, (heads_first(k), heads_first(v), mask)])
    if layout.masks[index] == 'full':
      padding_trails = all(sequence.valid[i] is None for i in visible[:-1])
      implementation = attention_kernels.choose(self.spec.attention_impl, q, k, padding_trails, self.mesh)
      if implementation != attention_kernels.XLA:
        valid = None if mask is None else mask[:, 0, 0]
        return attention_kernels.attend(q, k, v, valid, implementation, self.mesh)
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def attend(q: jax.Array, parts: Sequence[KeysValues]) -> jax.Array:
  """softmax(q kᵀ / √H) v over the keys of all parts together, scores and sums in float32.

  Concatenation would copy a cache for every decoded word. Instead each part has its own scores, under one softmax.

  q and the result are [B, Q, N, H] of one type; every query must see a key of some part.
  """
  scores = [_scores(q, k) for k, _, _ in parts]
  scores = [s if mask is None else jnp.where(mask, s, -jnp.inf) for s, (_, _, mask) in zip(scores, parts, strict=True)]
  top = jax.lax.stop_gradient(jnp.stack([s.max(-1) for s in scores]).max(0))[..., None]
  weights = [jnp.exp(s - top) for s in scores]
  out = sum(_weighted(w, v) for w, (_, v, _) in zip(weights, parts, strict=True))
  total = sum(w.sum(-1) for w in weights)  # [B, N, Q]
  return (out / total.swapaxes(1, 2)[..., None]).astype(q.dtype)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
  """q [B, Q, N, H], k [b, N, S, H] → f32 [B, N, Q, S]."""
  k = _per_example(k, q.shape[0])
  (B, Q, N, H), (b, _, S, _) = q.shape, k.shape
  s = jnp.einsum('bqnh,bnsh->bnqs', q.reshape(b, -1, N, H), k, preferred_element_type=jnp.float32) / H**0.5
  return s.reshape(b, N, B // b, Q, S).swapaxes(1, 2).reshape(B, N, Q, S)


def _weighted(w: jax.Array, v: jax.Array) -> jax.Array:
  """w f32 [B, N, Q, S], v [b, N, S, H] → f32 [B, Q, N, H]."""
  v = _per_example(v, w.shape[0])
  (B, N, Q, S), (b, _, _, H) = w.shape, v.shape
  w = w.astype(v.dtype).reshape(b, B // b, N, Q, S).swapaxes(1, 2).reshape(b, N, -1, S)
  # Transposed afterwards: of 'bqnh' einsum makes a product of transposed operands, for which XLA's CPU backend has only
  # a loop, ten times as slow.
  y = jnp.einsum('bnqs,bnsh->bnqh', w, v, preferred_element_type=jnp.float32)
  return y.swapaxes(1, 2).reshape(B, Q, N, H)


def _per_example(x: jax.Array, batch: int) -> jax.Array:
  """Repeats a part that all examples share: a mesh must not join uneven rows (see `decoding._repeat`).

  In float32, as the gradient of a shared part is a sum over examples.
  """
  if x.shape[0] != 1:  # symbolic sizes have no order
    return x
  return jnp.broadcast_to(x.astype(jnp.float32), (batch, *x.shape[1:])).astype(x.dtype)
