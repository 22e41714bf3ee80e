"""One encoder block over many streams: decisions and merged kernels once, attention per array, FFN.

Pre-norm, fused qkv, LayerScale, stochastic depth, exact GELU (Uni-Perceiver-MoE section 3; published code: one
decision for qkv and attention out, one for both FFN projections). Arrays stay separate; only keys and values join.
"""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uni_moe_jax.model import masks
from uni_moe_jax.model.attention import Part, attend, heads_first
from uni_moe_jax.model.prompts import DeepPrompts, prompt_table
from uni_moe_jax.model.routing import SALTS, FixedWays, TokenWays, Ways
from uni_moe_jax.model.sequences import EmbeddedSequence, take_rows
from uni_moe_jax.model.spec import ROUTER_PARAMS, ModelSpec
from uni_moe_jax.moe import layers, routers
from uni_moe_jax.moe.token_routers import TokenRouter
from uni_moe_jax.parallel import sharding

NORM_EPSILON = 1e-5
# Salts that separate the uses of one (step, layer) key, beside those of the routers.
ATTENTION_PATH, FFN_PATH = 2, 3


@flax.struct.dataclass
class Context:
  """What every block needs beside the arrays: the streams' padding, positions and ids, and static choices.

  Attributes:
    streams: the streams with `arrays` emptied.
    past_valid: bool [B, room] per stream, which words of its past are there, or None.
    key: random key of this step, or None at evaluation.
    rows: distinct router inputs of the streams.
    all_rows: compute every row in the last block too.
    taps: return the arrays after this block, and what routers chose for their tokens.
    keys: return keys, values and context pools of the streams' arrays.
    mesh: on which all of it lies; None: on one device.
  """
  streams: tuple[EmbeddedSequence, ...]
  past_valid: tuple[jax.Array | None, ...]
  key: jax.Array | None
  rows: tuple[Any, ...] = flax.struct.field(pytree_node=False)
  all_rows: bool = flax.struct.field(pytree_node=False, default=False)
  taps: bool = flax.struct.field(pytree_node=False, default=False)
  keys: bool = flax.struct.field(pytree_node=False, default=False)
  mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)


def layer_norm(name: str, dtype) -> nn.LayerNorm:
  """LayerNorm with statistics in float32 and eps 1e-5, as everywhere in the published system."""
  return nn.LayerNorm(
      epsilon=NORM_EPSILON, dtype=dtype, use_fast_variance=False, name=name,
      scale_init=nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('embed',)))


def drop_path(x: jax.Array, key: jax.Array | None, ids: jax.Array, rate: float) -> jax.Array:
  """Drops the whole branch [B, S, D] of a sample with probability `rate`; keyed by example id, so that any mesh and
  any order of the batch draws the same."""
  if key is None or rate == 0:
    return x
  keep = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate))(ids)
  return x * (keep / (1 - rate)).astype(x.dtype)[:, None, None]


class Block(nn.Module):
  """One layer. `parts` names the projections that have experts; `last` marks the final layer of the encoder."""
  spec: ModelSpec
  parts: tuple[str, ...]
  last: bool = False

  @nn.compact
  def __call__(self, arrays, layer: jax.Array, past: tuple[Any, ...], context: Context):
    """Runs the block on every stream.

    Args:
      arrays: per stream, per segment: [B, S, D].
      layer: scalar int32, the layer's index (it keys noise; a scanned input).
      past: per stream a `KVCache` of this layer alone, without `valid`, or None.
      context: see `Context`.

    Returns:
      (arrays, out): in the last block, without `all_rows`, a stream's arrays are only the rows of its readout, under
      the index of the readout array (others None). `out` holds decisions, and what the context asks for.
    """
    spec = self.spec
    key = None if context.key is None else jax.random.fold_in(context.key, layer)
    ways, decisions = self._ways(key, context)
    conditional = {p: spec.num_experts if p in self.parts else 0 for p in ('attention', 'mlp')}
    D, N, H, F = spec.width, spec.num_heads, spec.head_dim, spec.mlp_dim

    def linear(name, part, in_, out, init):
      dense = layers.MoeDense(
          tuple(in_.values()), tuple(out.values()), tuple(in_), tuple(out), init, conditional[part], spec.dtype,
          context.mesh, name=name)
      return layers.Projection(*dense(decisions.get(part)), tuple(in_), tuple(out))

    square = layers.xavier_uniform(D, D)
    qkv_init = layers.mimetic_query_key(square) if spec.mimetic_init else square
    heads = {'heads': N, 'head_dim': H}
    qkv = linear('qkv', 'attention', {'embed': D}, {'qkv': 3, **heads}, qkv_init)
    out = linear('attention_out', 'attention', heads, {'embed': D}, square)
    ffn_in = linear('ffn_in', 'mlp', {'embed': D}, {'mlp': F}, layers.xavier_uniform(D, F))
    ffn_out = linear('ffn_out', 'mlp', {'mlp': F}, {'embed': D}, layers.xavier_uniform(F, D))
    norm1, norm2 = layer_norm('norm1', spec.dtype), layer_norm('norm2', spec.dtype)
    scale1, scale2 = (
        sharding.as_used(self.param(
            name, nn.with_logical_partitioning(nn.initializers.constant(spec.layer_scale_init), ('embed',)), (D,)), ('embed',), context.mesh)
        for name in ('scale1', 'scale2'))
    if key is not None:  # training; elsewhere few tokens may pass, for which weights would be multiplied again and again
      out, ffn_out, scale1, scale2 = out.scaled(scale1), ffn_out.scaled(scale2), 1, 1
    else:
      scale1, scale2 = (s.astype(spec.dtype)[None, None] for s in (scale1, scale2))

    only_q, only_kv = qkv.part(slice(0, 1)), qkv.part(slice(1, None))

    prompts = DeepPrompts(spec, name='prompts')() if spec.num_deep_prompts else {}

    new_arrays, all_kv, all_pools = [], [], []
    for stream, xs, before, past_valid in zip(context.streams, arrays, past, context.past_valid, strict=True):
      layout = stream.layout
      normed = [norm1(x) for x in xs]
      all_pools.append(ways.enter(stream, normed, None if before is None else before.pools))
      apart: list[Part] = [] if before is None else before.parts(past_valid)
      table = prompt_table(spec, layout.is_target)
      if table in prompts:
        h, way = ways.of_prompts(norm1(prompts[table].astype(spec.dtype)), layout.prompt_condition)
        y = way(h, only_kv)
        apart.append((heads_first(y[:, :, 0]), heads_first(y[:, :, 1]), None))
      only_readout = self.last and not context.all_rows
      asks = [i for i in range(len(xs)) if not only_readout or i == layout.readout_segment]
      q, kv, way = {}, [], {}
      for i, (h, condition) in enumerate(zip(normed, layout.conditions, strict=True)):
        way[i] = ways.of('attention', condition, h, i)
        if i in asks and not only_readout:
          y = way[i](h, qkv)
          q[i] = y[:, :, 0]
          kv.append((y[:, :, 1], y[:, :, 2]))
        else:
          y = way[i](h, only_kv)
          kv.append((y[:, :, 0], y[:, :, 1]))
          if i in asks:
            way[i] = way[i].rows(stream)
            q[i] = way[i](take_rows(h, layout.readout, stream.positions), only_q)[:, :, 0]
      all_kv.append(tuple(kv))

      results: list[jax.Array | None] = [None] * len(xs)
      for i in asks:
        x = take_rows(xs[i], layout.readout, stream.positions) if only_readout else xs[i]
        y = self._attend(i, q[i], kv, stream, apart, only_readout)
        y = way[i](y, out)
        path = None if key is None else jax.random.fold_in(key, ATTENTION_PATH)
        x = x + scale1 * drop_path(y, path, stream.ids, spec.drop_path)
        h = norm2(x)
        through = ways.of('mlp', layout.conditions[i], h, i, only_readout)
        y = through(nn.gelu(through(h, ffn_in), approximate=False), ffn_out)
        path = None if key is None else jax.random.fold_in(key, FFN_PATH)
        x = x + scale2 * drop_path(y, path, stream.ids, spec.drop_path)
        results[i] = sharding.shard_batch(x, context.mesh)
      new_arrays.append(tuple(results))
    taken = {'router_stats': ways.taken()}
    if context.taps:
      taken['taps'], taken['token_routing'] = tuple(new_arrays), ways.choices()
    if context.keys:
      taken['kv'], taken['pools'] = tuple(all_kv), tuple(all_pools)
    return tuple(new_arrays), taken

  def _ways(self, key: jax.Array | None, context: Context) -> tuple[Ways, dict[str, routers.Decision]]:
    """The block's ways, and the decisions by which kernels merge (none where a router looks at tokens, or where they
    have merged)."""
    spec = self.spec
    if spec.kernels:
      return FixedWays(spec, self.parts), {}
    sizes = spec.width, spec.num_experts, spec.top_k, spec.noise_std
    if routers.routes_tokens(spec.router):
      made = {p: TokenRouter(spec.router == 'context', *sizes, context.mesh, name=ROUTER_PARAMS[p]) for p in self.parts}
      return TokenWays(spec, context.rows, made, key, context.mesh), {}
    decisions = {}
    for p in self.parts:
      salted = None if key is None else jax.random.fold_in(key, SALTS[p])
      decisions[p] = routers.Router(spec.router, *sizes, spec.router_names, name=ROUTER_PARAMS[p])(context.rows, salted)
    return Ways(spec, context.rows, decisions), decisions

  def _attend(self, index, q, kv, stream: EmbeddedSequence, apart: list[Part], only_readout) -> jax.Array:
    """Attention of one array's queries [B, Q, N, H] over the keys it may see, and over those `apart` → [B, Q, N, H]."""
    layout = stream.layout
    seen = masks.sees(layout.masks, index)
    k, v = (kv[seen[0]] if len(seen) == 1 else
            tuple(jnp.concatenate([kv[i][which] for i in seen], axis=1) for which in (0, 1)))
    mask = masks.attention_mask(
        layout.masks, index, tuple(k.shape[1] for k, _ in kv), stream.valid,
        queries_only=only_readout and layout.readout == 'queries')
    if apart:
      return attend(q, [*apart, (heads_first(k), heads_first(v), mask)])
    return jax.nn.dot_product_attention(q, k, v, mask=mask)
