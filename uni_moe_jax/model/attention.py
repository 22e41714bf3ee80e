"""Multi-head attention of all sequences: within segments, between them, and to caches and prompts."""

from typing import Any

import jax
import jax.numpy as jnp

from uni_moe_jax.kernels import attention as kernels
from uni_moe_jax.kernels.attention import heads_first, parts
from uni_moe_jax.kernels.attention.parts import KeysValues
from uni_moe_jax.model import masks
from uni_moe_jax.model.prompts import prompt_table
from uni_moe_jax.model.sequences import EmbeddedSequence, KVCache
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
          queries[i] = q, y
        else:
          y, usage = routing.apply(x, kv_only)
          k, v = y[:, :, 0], y[:, :, 1]
          if i == layout.readout_segment:
            routings[i] = routing.take(rows, sequence.tokens(i, readout_only=True)['valid'])
            y, repeated = routings[i].apply(rows(x), q_only)
            queries[i] = y[:, :, 0], None
            usages.append((condition, repeated))
        kv.append((k, v))
        usages.append((condition, usage))

      for i, (q, own_qkv) in queries.items():
        ys[i] = self._attend(q, own_qkv, kv, extra_kv, i, sequence)
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

  def _attend(
      self, q: jax.Array, qkv: jax.Array | None, kv: list[tuple[jax.Array, jax.Array]], extra_kv: list[KeysValues],
      index: int, sequence: EmbeddedSequence) -> jax.Array:
    """Attention of one segment's queries [B, Q, N, H] over its visible keys and extra ones → [B, Q, N, H].

    qkv: [B, S, 3, N, H] of the segment, of which q is a part; None: q are the rows of the readout alone.
    """
    layout = sequence.layout
    visible = masks.visible_segments(layout.masks, index)
    k, v = (kv[visible[0]] if len(visible) == 1 else
            tuple(jnp.concatenate([kv[i][j] for i in visible], axis=1) for j in (0, 1)))
    queries_only = qkv is None and layout.readout == 'queries'
    mask = masks.attention_mask(layout.masks, index, sequence.lengths, sequence.valid, queries_only)
    if extra_kv:
      return parts.attend(q, [*extra_kv, (heads_first(k), heads_first(v), mask)])
    if layout.masks[index] != 'full':
      return kernels.reference(q, k, v, mask)
    implementation = kernels.choose(
        self.spec.attention_impl, q, k, self.mesh, within=qkv is not None and visible == (index,),
        padding_trails=all(sequence.valid[i] is None for i in visible[:-1]))
    valid = None if mask is None else mask[:, 0, 0]
    return kernels.attend(q, k, v, valid, implementation, self.mesh, qkv)
