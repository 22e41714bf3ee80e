"""The MLP of a block: two projections around an exact GELU, routed together."""

from typing import Any

import flax.linen as nn
import jax

from uni_moe_jax.model.sublayer import Context, Hidden, Pools, Sublayer, scale_output
from uni_moe_jax.moe.layers import xavier_uniform


class Mlp(Sublayer):
  """W_out gelu(W_in x), with one routing per segment for both projections."""

  SUBLAYER = 'mlp'

  def setup(self):
    D, F = self.spec.width, self.spec.mlp_dim
    self.router = self.make_router()
    self.ffn_in = self.make_projection({'embed': D}, {'mlp': F}, xavier_uniform(D, F))
    self.ffn_out = self.make_projection({'mlp': F}, {'embed': D}, xavier_uniform(F, D))

  def __call__(
      self, hidden: Hidden, scale: jax.Array, pools: Pools, context: Context) -> tuple[Hidden, dict[str, Any]]:
    """(outputs, {'router_stats', 'token_routing'}) of every sequence; arguments as in `Attention`."""
    merged = self.merge_routing(context)
    ffn_in = self.ffn_in(merged)
    ffn_out, scale = scale_output(self.ffn_out(merged), scale, context)
    outputs, usages, token_routing = [], [], []
    for sequence, segments, pool in zip(context.sequences, hidden, pools, strict=True):
      ys, routed = [], []
      for i, (x, condition) in enumerate(zip(segments, sequence.layout.conditions, strict=True)):
        if x is None:
          ys.append(None)
          routed.append(None)
          continue
        routing = self.route(x, merged, condition, sequence.tokens(i, context.readout_only), pool, context)
        y, usage = routing.apply(x, ffn_in)
        y, _ = routing.apply(nn.gelu(y, approximate=False), ffn_out)
        ys.append(scale * y)
        routed.append(routing.output)
        usages.append((condition, usage))
      outputs.append(tuple(ys))
      token_routing.append(tuple(routed))
    return tuple(outputs), self.collect(merged, usages, token_routing, context)
