"""Which way the tokens of an array take through a block's projections: a merged kernel, or each to its own experts.

A block asks for a way per part and array, and sends its arrays along it; how many experts there are, and who decides, it
does not know.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uni_moe_jax.model.sequences import EmbeddedSequence, take_rows
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.moe import expert_parallel, layers, routers
from uni_moe_jax.moe.layers import Projection
from uni_moe_jax.moe.token_routers import TokenRouter, Usage

SALTS = {'attention': 0, 'mlp': 1}  # they separate the uses of one (step, layer) key


@dataclasses.dataclass(frozen=True)
class Merged:
  """All tokens through the kernel of one condition row."""
  row: int

  def __call__(self, x: jax.Array, linear: Projection) -> jax.Array:
    """x [B, S, *in] → [B, S, *out], by one of the rows of a projection."""
    return layers.project(x, linear.kernel[self.row], linear.bias[self.row])

  def rows(self, stream: EmbeddedSequence) -> 'Merged':
    """The way of the stream's readout rows."""
    return self


class Ways:
  """Ways of one block whose decisions, if it has any, do not look at tokens."""

  def __init__(self, spec: ModelSpec, rows: tuple[Any, ...], decisions: dict[str, routers.Decision]):
    self._spec, self._rows, self._decisions = spec, rows, decisions

  def enter(self, stream: EmbeddedSequence, normed: list[jax.Array], pools: dict[str, jax.Array] | None) -> dict[str, jax.Array]:
    """Turns to a stream; returns its context pools, by part.

    Args:
      stream: whose arrays are asked about from now on.
      normed: [B, S, D] per array, what attention projects.
      pools: cached ones, or None.
    """
    return {}

  def of(self, part: str, condition: routers.Condition, x: jax.Array, array: int, only_readout: bool = False):
    """The way of array number `array` through a part. x: [B, S, D], or its readout rows."""
    return Merged(self._rows.index(routers.router_input(self._spec.router, condition)) if part in self._decisions else 0)

  def of_prompts(self, prompts: jax.Array, condition: routers.Condition):
    """(prompts [1 or B, P, D], their way to keys and values)."""
    return prompts, self.of('attention', condition, prompts, 0)

  def taken(self) -> dict[str, Any]:
    """What was decided, by part."""
    return self._decisions

  def choices(self) -> tuple[dict[str, dict[int, routers.Choice]], ...]:
    """What was chosen for every token: per stream, {part: {array: choice}}. () where no token is looked at."""
    return ()


class FixedWays(Ways):
  """Ways of a block of a merged model: which of its kernels an array takes stands in the spec."""

  def __init__(self, spec: ModelSpec, parts: tuple[str, ...]):
    super().__init__(spec, (), {})
    self._parts = parts

  def of(self, part, condition, x, array, only_readout=False):
    return Merged(self._spec.kernel_of(condition) if part in self._parts else 0)


class Dispatched:
  """Every token to its own experts. All of an array's rows share one decision, and the slots of its K choices."""

  def __init__(self, choice: routers.Choice, valid: jax.Array | None, parts: int, capacity: float, backend: str,
               mesh: Mesh | None):
    self.choice, self._valid, self._how = choice, valid, (capacity, backend, mesh)
    self._routes = expert_parallel.routes(choice, valid, parts, *self._how)
    self.usage = Usage.of(choice, self._routes, valid)

  def __call__(self, x: jax.Array, linear: Projection) -> jax.Array:
    """x [B, S, *in] → [B, S, *out], by the experts of a projection."""
    return expert_parallel.project(x, linear, self._routes, self._how[-1])

  def rows(self, stream: EmbeddedSequence) -> 'Dispatched':
    """The way of the stream's readout rows: the same decision, dispatched among themselves."""
    choice = jax.tree.map(lambda c: take_rows(c, stream.layout.readout, stream.positions), self.choice)
    valid = None
    if self._valid is not None:
      valid = take_rows(self._valid[..., None], stream.layout.readout, stream.positions)[..., 0]
    new = Dispatched(choice, valid, 1, *self._how)
    self.usage = self.usage.again(new._routes)
    return new


class TokenWays(Ways):
  """Ways of a block whose routers look at tokens.

  The pool that a context router sees averages the tokens of the arrays with a full mask, as this block gets them: all of them
  are visible to every token of the stream, a caption's earlier words are not. Both routers pool what attention projects, and
  neither what the FFN does: so that the readout's rows of the last block need no other row, and a cache is complete.
  """

  def __init__(self, spec: ModelSpec, rows: tuple[Any, ...], made: dict[str, TokenRouter], key: jax.Array | None,
               mesh: Mesh | None):
    super().__init__(spec, rows, {})
    self._routers, self._key, self._mesh = made, key, mesh
    self._ways: list[tuple[str, int, Dispatched]] = []
    self._choices: list[dict[str, dict[int, routers.Choice]]] = []

  def enter(self, stream, normed, pools):
    self._choices.append({})
    self._stream, self._lengths = stream, [x.shape[1] for x in normed]
    self._pools = pools
    if not pools:
      seen = [i for i, mask in enumerate(stream.layout.masks) if mask == 'full']
      self._pools = {
          part: router.pool(tuple(normed[i] for i in seen), tuple(stream.valid[i] for i in seen))
          for part, router in self._routers.items() if router.context}
    return self._pools

  def of(self, part, condition, x, array, only_readout=False):
    if part not in self._routers:
      return Merged(0)
    stream = self._stream
    positions = sum(self._lengths[:array]) + jnp.arange(self._lengths[array], dtype=jnp.int32)
    positions, valid = jnp.broadcast_to(positions, (stream.ids.shape[0], self._lengths[array])), stream.valid[array]
    streams = 1 if stream.layout.masks[array] == 'full' else 2  # words and queries
    if only_readout:
      rows = lambda v: take_rows(v[..., None], stream.layout.readout, stream.positions)[..., 0]
      positions, valid, streams = rows(positions), None if valid is None else rows(valid), 1
    way = self._way(part, condition, x, positions, valid, streams)
    self._choices[-1].setdefault(part, {})[array] = way.choice
    return way

  def of_prompts(self, prompts, condition):
    if 'attention' not in self._routers:
      return prompts, Merged(0)
    wide = jnp.broadcast_to(prompts, (self._stream.ids.shape[0], *prompts.shape[1:]))
    positions = jnp.broadcast_to(sum(self._lengths) + jnp.arange(wide.shape[1], dtype=jnp.int32), wide.shape[:2])
    return wide, self._way('attention', condition, wide, positions, None, 1)

  def taken(self):
    """A `Usage` per part, with one row per kind of array."""
    def summed(part, row):
      found = [way.usage for p, r, way in self._ways if (p, r) == (part, row)]
      return jax.tree.map(lambda *x: sum(x), Usage.none(self._spec.num_experts), *found)

    none = Usage.none(self._spec.num_experts)  # a step without target sets encodes, for them, nothing
    return {part: jax.tree.map(lambda *x: jnp.stack(x)[1:], none, *[summed(part, r) for r in range(len(self._rows))])
            for part in self._routers}

  def choices(self):
    return tuple(self._choices)

  def _way(self, part, condition, x, positions, valid, streams) -> Dispatched:
    key = None if self._key is None else jax.random.fold_in(self._key, SALTS[part])
    choice = self._routers[part](x, self._pools.get(part), key, self._stream.ids, positions)
    # Capacity is a means of training; evaluation is exact.
    capacity = 0.0 if self._key is None else self._spec.capacity_factor
    way = Dispatched(choice, valid, streams, capacity, self._spec.gmm, self._mesh)
    self._ways.append((part, self._rows.index(routers.router_input(self._spec.router, condition)), way))
    return way
