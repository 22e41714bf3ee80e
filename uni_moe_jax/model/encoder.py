"""The shared encoder: many sequences through one scan over layers.

All sequences of a call go through each layer together, so that each layer's experts are read and merged once, however
many task types and target sets a step encodes. Periods of blocks are scanned; the tail is unrolled (see `spec.Stack`).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uni_moe_jax.kernels.projection import remat_policy
from uni_moe_jax.model.block import Block
from uni_moe_jax.model.sequences import EmbeddedSequence, KVCache
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.model.sublayer import Context, Hidden
from uni_moe_jax.moe import routers

Collected = dict[str, Any]


class Period(nn.Module):
  """A run of blocks with the placement pattern of one period, or the tail."""
  spec: ModelSpec
  pattern: tuple[tuple[str, ...], ...]
  is_tail: bool = False

  @nn.compact
  def __call__(self, x: Hidden, inputs, context: Context):
    """inputs: (index of the first layer, caches per block)."""
    first, caches = inputs
    collected = []
    for j, sublayers in enumerate(self.pattern):
      last = self.is_tail and j == len(self.pattern) - 1
      # Each block is rematerialized by itself. With one unit per period, the backward pass would also repeat the last
      # product of every block but the last.
      block = Block
      if self.spec.remat:
        block = nn.remat(Block, prevent_cse=self.is_tail, policy=remat_policy(context.mesh))
      x, out = block(self.spec, sublayers, last, name=f'block{j}')(x, first + j, caches[j], context)
      collected.append(out)
    return x, tuple(collected)


class Encoder(nn.Module):
  """L blocks. mesh: mesh of its parameters; None on one device."""
  spec: ModelSpec
  mesh: Mesh | None = None

  @nn.compact
  def __call__(
      self, sequences: tuple[EmbeddedSequence, ...], caches: tuple[KVCache | None, ...], *,
      key: jax.Array | None = None, all_rows: bool = False, taps: bool = False, keys: bool = False,
  ) -> tuple[tuple[jax.Array | None, ...], Collected]:
    """Encodes sequences.

    Args:
      caches: cached keys and values per sequence, or None.
      key: random key of the step (noise, stochastic depth); None at evaluation.
      all_rows: compute all rows in the last layer; the result is the same.
      taps: collect the embedded sequences, their hidden states after every layer, and the routing of their tokens.
      keys: collect keys and values of every layer, and the pools of its context routers.

    Returns:
      (hidden, collected). hidden: per sequence [B, R, D], the rows of its readout (None for 'nothing'). collected:
      {'blocks': …, 'tail': …}, each a tuple with a dictionary per block; leaves of 'blocks' have a leading axis of
      periods. With taps also 'sequences'. A block's dictionary has 'router_stats': {sublayer: `RouterOutput` of the A
      distinct router inputs, or `Usage` by their tokens}; with taps 'taps', hidden states per sequence and segment, and
      'token_routing': {sublayer: `RouterOutput` per sequence and segment} of token routers; with keys 'kv', (keys,
      values) per sequence and segment, and 'pools', {sublayer: [B, D]} per sequence.
    """
    spec, stack = self.spec, self.spec.stack
    conditions = tuple(c for s in sequences for c in s.layout.conditions)
    if spec.num_deep_prompts:
      conditions += tuple(s.layout.prompt_condition for s in sequences)
    context = Context(
        sequences=tuple(s.without_segments(c) for s, c in zip(sequences, caches, strict=True)), key=key,
        router_inputs=routers.distinct_inputs(spec.router, conditions), readout_only=not all_rows, taps=taps,
        keys=keys, mesh=self.mesh)
    x = tuple(s.segments for s in sequences)

    def caches_of(subtree, blocks):
      """Per block, per sequence: the cache of the layer, or None."""
      return tuple(tuple(None if c is None else c.of_layer(subtree, j) for c in caches) for j in range(blocks))

    collected: Collected = {'blocks': (), **({'sequences': sequences} if taps else {})}
    scanned = len(stack.period) * stack.periods
    if stack.periods:
      run = nn.scan(
          Period, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=(0, nn.broadcast),
          length=stack.periods, metadata_params={nn.PARTITION_NAME: 'layers'},
          check_constancy_invariants=False)  # which would trace the body once more
      first = jnp.arange(stack.periods, dtype=jnp.int32) * len(stack.period)
      x, collected['blocks'] = run(spec, stack.period, name='blocks')(
          x, (first, caches_of('blocks', len(stack.period))), context)
    x, collected['tail'] = Period(spec, stack.tail, is_tail=True, name='tail')(
        x, (jnp.int32(scanned), caches_of('tail', len(stack.tail))), context)

    hidden = []
    for s, segments in zip(sequences, x, strict=True):
      read = s.layout.readout_segment
      rows = None if read is None else segments[read]
      hidden.append(s.take_readout(rows) if all_rows and rows is not None else rows)
    return tuple(hidden), collected
