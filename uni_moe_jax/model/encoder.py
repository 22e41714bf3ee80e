"""The shared encoder: many streams through one scan over layers.

All streams of a call go through each layer together, so that each layer's experts are read and merged once however
many kinds and target sets a step encodes. Periods of blocks are scanned; the tail is unrolled (see `spec.Stack`).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uni_moe_jax.model.block import Block, Context
from uni_moe_jax.model.sequences import EmbeddedSequence, KVCache, take_rows
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.moe import routers

Collected = dict[str, Any]


class Period(nn.Module):
  """A run of blocks with the placement pattern of one period, or the tail."""
  spec: ModelSpec
  pattern: tuple[tuple[str, ...], ...]
  is_tail: bool = False

  @nn.compact
  def __call__(self, arrays, inputs, context: Context):
    """inputs: (index of the first layer, past per block)."""
    first, past = inputs
    taken = []
    for j, parts in enumerate(self.pattern):
      last = self.is_tail and j == len(self.pattern) - 1
      block = Block
      if self.is_tail and self.spec.remat:  # the scanned period is rematerialised as a whole
        block = nn.remat(Block, prevent_cse=True)
      arrays, out = block(self.spec, parts, last, name=f'block{j}')(arrays, first + j, past[j], context)
      taken.append(out)
    return arrays, tuple(taken)


class Encoder(nn.Module):
  """Blocks × L. See `__call__`. mesh: on which it computes; None: on one device."""
  spec: ModelSpec
  mesh: Mesh | None = None

  @nn.compact
  def __call__(
      self, streams: tuple[EmbeddedSequence, ...], past: tuple[KVCache | None, ...], *, key: jax.Array | None = None,
      all_rows: bool = False, taps: bool = False, keys: bool = False,
  ) -> tuple[tuple[jax.Array | None, ...], Collected]:
    """Encodes streams.

    Args:
      streams: see `EmbeddedSequence`.
      past: cached keys and values per stream, or None.
      key: random key of the step (noise, stochastic depth); None at evaluation.
      all_rows: compute all rows in the last layer; the result is the same.
      taps: collect the streams as they come in, the arrays after every layer, and what routers chose for their tokens.
      keys: collect keys and values of every layer, and what its context routers pooled.

    Returns:
      (rows, collected). rows: per stream the hidden states [B, R, D] of its readout (None for 'nothing').
      collected: {'blocks': …, 'tail': …}, each a tuple per block of {'router_stats', 'taps', 'token_routing', 'kv', 'pools'}; leaves
      of 'blocks' have a leading axis of periods. With taps also 'sequences'.
    """
    spec, stack = self.spec, self.spec.stack
    conditions = tuple(c for s in streams for c in s.layout.conditions)
    if spec.num_deep_prompts:
      conditions += tuple(s.layout.prompt_condition for s in streams)
    context = Context(
        streams=tuple(s.replace(arrays=()) for s in streams),
        past_valid=tuple(None if p is None else p.valid for p in past),
        key=key, rows=routers.distinct_inputs(spec.router, conditions), all_rows=all_rows, taps=taps, keys=keys,
        mesh=self.mesh)
    arrays = tuple(tuple(a.astype(spec.dtype) for a in s.arrays) for s in streams)

    def past_of(subtree, blocks):
      """Per block, per stream: a `KVCache` of the layer, or None."""
      return tuple(tuple(None if p is None else p.of_layer(subtree, j) for p in past) for j in range(blocks))

    collected: Collected = {'blocks': (), **({'sequences': streams} if taps else {})}
    scanned = len(stack.period) * stack.periods
    if stack.periods:
      period = nn.remat(Period, prevent_cse=False) if spec.remat else Period
      run = nn.scan(
          period, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=(0, nn.broadcast),
          length=stack.periods, metadata_params={nn.PARTITION_NAME: 'layers'})
      first = jnp.arange(stack.periods, dtype=jnp.int32) * len(stack.period)
      arrays, collected['blocks'] = run(spec, stack.period, name='blocks')(
          arrays, (first, past_of('blocks', len(stack.period))), context)
    arrays, collected['tail'] = Period(spec, stack.tail, is_tail=True, name='tail')(
        arrays, (jnp.int32(scanned), past_of('tail', len(stack.tail))), context)

    rows = []
    for stream, xs in zip(streams, arrays):
      i = stream.layout.readout_segment
      if i is None:
        rows.append(None)
      else:
        rows.append(take_rows(xs[i], stream.layout.readout, stream.positions) if all_rows else xs[i])
    return tuple(rows), collected
