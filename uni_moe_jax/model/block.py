"""One encoder block over many sequences: pre-norm attention and MLP.

Uni-Perceiver-MoE section 3; published code: fused qkv, exact GELU, one routing for qkv and attention out, one for both
MLP projections. Segments of a sequence stay separate arrays; only keys and values join.
"""

from typing import Any

import flax.linen as nn
import jax

from uni_moe_jax.kernels.gelu import gelu
from uni_moe_jax.model.attention import Attention
from uni_moe_jax.model.prompts import DeepPrompts
from uni_moe_jax.model.sequences import KVCache
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.model.sublayer import Context, Hidden, Pools, Sublayer, output_projection
from uni_moe_jax.moe.layers import LayerNorm, param, xavier_uniform
from uni_moe_jax.parallel import sharding

# Salts that separate the uses of one (step, layer) key, beside those of the routers.
ATTENTION_PATH, MLP_PATH = 2, 3


def drop_path(x: jax.Array, key: jax.Array | None, ids: jax.Array, rate: float) -> jax.Array:
  """Drops the whole branch [B, S, D] of an example with probability `rate`, at evaluation never.

  Draws are keyed by example id, so that any mesh and any order of the batch draws the same.
  """
  if key is None or rate == 0:
    return x
  keep = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate))(ids)
  return x * (keep / (1 - rate)).astype(x.dtype)[:, None, None]


class Mlp(Sublayer):
  """W_out gelu(W_in x) with exact GELU, and one routing per segment for both projections."""

  SUBLAYER = 'mlp'

  def setup(self):
    D, F = self.spec.width, self.spec.mlp_dim
    self.router = self.make_router()
    self.ffn_in = self.make_projection({'embed': D}, {'mlp': F}, xavier_uniform(D, F))
    self.ffn_out = self.make_projection({'mlp': F}, {'embed': D}, xavier_uniform(F, D))

  def __call__(self, hidden: Hidden, scale: jax.Array, pools: Pools, context: Context) -> tuple[Hidden, dict[str, Any]]:
    """(outputs, {'router_stats', 'token_routing'}) of every sequence; arguments as in `Attention`."""
    merged = self.merge_routing(context)
    coef = None if merged is None else merged.coef
    ffn_in = self.ffn_in(coef)
    ffn_out, scale = output_projection(self.ffn_out, coef, scale, context)
    outputs, usages, token_routing = [], [], []
    for sequence, segments, pool in zip(context.sequences, hidden, pools, strict=True):
      ys, routed = [None] * len(segments), [None] * len(segments)
      for i, (x, condition) in enumerate(zip(segments, sequence.layout.conditions, strict=True)):
        if x is not None:
          routing = self.route(x, merged, condition, sequence.tokens(i, context.readout_only), pool, context)
          y, usage = routing.apply(x, ffn_in, gelu)
          ys[i], routed[i] = scale * routing.apply(y, ffn_out)[0], routing.output
          usages.append((condition, usage))
      outputs.append(tuple(ys))
      token_routing.append(tuple(routed))
    return tuple(outputs), self.collect(merged, usages, token_routing, context)


class Block(nn.Module):
  """One layer. `sublayers` names those with experts; `last` marks the final layer of the encoder."""
  spec: ModelSpec
  sublayers: tuple[str, ...]
  last: bool

  @nn.compact
  def __call__(
      self, x: Hidden, layer: jax.Array, caches: tuple[KVCache | None, ...], context: Context,
  ) -> tuple[Hidden, dict[str, Any]]:
    """Runs the block on every sequence.

    Args:
      layer: int32 scalar, index of the layer (it keys noise; a scanned input).
      caches: of this layer, see `KVCache.of_layer`.

    Returns:
      (x, collected): the last block returns only the readout rows of the readout segment, unless all rows are wanted.
      collected: see `Encoder`.
    """
    spec, mesh, sequences = self.spec, context.mesh, context.sequences
    key = None if context.key is None else jax.random.fold_in(context.key, layer)
    context = context.replace(key=key, readout_only=self.last and context.readout_only)
    norm1, norm2 = LayerNorm(name='norm1'), LayerNorm(name='norm2')
    layer_scale = nn.initializers.constant(spec.layer_scale_init)
    scale1, scale2 = (
        sharding.as_used(param(self, name, layer_scale, {'embed': spec.width}), ('embed',), mesh)
        for name in ('scale1', 'scale2'))
    attention = Attention(spec, 'attention' in self.sublayers, mesh, name='attention')
    mlp = Mlp(spec, 'mlp' in self.sublayers, mesh, name='mlp')
    nn.share_scope(self, attention)
    nn.share_scope(self, mlp)
    prompts = DeepPrompts(spec, name='prompts')() if spec.num_deep_prompts else {}
    prompts = {table: norm1(rows) for table, rows in prompts.items()}

    h = jax.tree.map(norm1, x)
    pools = tuple(
        cache.pools if cache is not None and cache.pools else {**attention.pool(xs, s), **mlp.pool(xs, s)}
        for s, xs, cache in zip(sequences, h, caches, strict=True))
    h, attended = attention(h, scale1, prompts, caches, pools, context)
    if context.readout_only:
      x = tuple(s.readout_segments(xs) for s, xs in zip(sequences, x, strict=True))
    x = self._add(x, h, ATTENTION_PATH, context)
    h, mixed = mlp(jax.tree.map(norm2, x), scale2, pools, context)
    x = self._add(x, h, MLP_PATH, context)
    x = jax.tree.map(lambda x: sharding.shard_batch(x, mesh), x)

    collected = {'router_stats': {**attended['router_stats'], **mixed['router_stats']}}
    if context.taps:
      collected |= {'taps': x, 'token_routing': {**attended['token_routing'], **mixed['token_routing']}}
    if context.keys:
      collected |= {'kv': attended['kv'], 'pools': pools}
    return x, collected

  def _add(self, x: Hidden, branch: Hidden, salt: int, context: Context) -> Hidden:
    """x + branch in float32; examples of the branch may be dropped."""
    key = None if context.key is None else jax.random.fold_in(context.key, salt)
    add = lambda ids: lambda x, y: x + drop_path(y.astype(x.dtype), key, ids, self.spec.drop_path)
    return tuple(jax.tree.map(add(s.ids), xs, ys) for s, xs, ys in zip(context.sequences, x, branch, strict=True))
