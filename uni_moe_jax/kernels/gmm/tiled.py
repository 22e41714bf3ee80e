"""Routed products on CPU: a loop over tiles, each of some slots of one expert.

A tile gathers its tokens, and adds its products to their rows of the result. So no array has a row per slot, and what
a tile computes stays in the cache.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (rows of a product, more than how many slots a group must have left for it). On two threads, 256 rows take 1.4 to 1.6
# times as long as 128; the small ones waste less of the last product.
TILES = (256, 192), (64, 0)
BEHIND = TILES[0][0] - 1  # slots that a tile may read beyond all groups


@jax.custom_vjp
def routed_matmul(x: jax.Array, kernel: jax.Array, gates: jax.Array, bias: jax.Array, tokens: jax.Array,
                  sizes: jax.Array) -> jax.Array:
  """bias + Σ gate · x W_e over the slots of every token.

  Args:
    x: [T, D]. kernel: [E, D, F], of the same type. bias: f32 [T, F].
    gates, tokens: f32 and int32 [G], of every slot. Those of expert 0 come first, and so on; an expert has a token once
      at most. G is at least Σ sizes + `BEHIND`, and slots behind the groups have any tokens and gates.
    sizes: int32 [E], slots of every expert.

  Returns:
    [T, F] of x's type; sums are float32.
  """
  over_tiles = _loop(gates, tokens, sizes, x.shape[0])

  def group(e, y):
    w = jax.lax.dynamic_index_in_dim(kernel, e, keepdims=False)

    def tile(y, token, target, gate, row):
      return _add_rows(y, target, gate * jnp.dot(take(x, token), w))
    return over_tiles(e, tile, y)

  return jax.lax.fori_loop(0, kernel.shape[0], group, bias).astype(x.dtype)


def _backward(saved, dy):
  """The gradient of a gate, x W_e · dy, is computed as x · (dy W_eᵀ), whose right side makes dx anyway.

  So the outputs of experts are not needed, and a rematerialized block does not compute them again.
  """
  x, kernel, gates, tokens, sizes = saved
  over_tiles = _loop(gates, tokens, sizes, x.shape[0])

  def group(e, state):
    dx, dkernel, dgates = state
    w = jax.lax.dynamic_index_in_dim(kernel, e, keepdims=False)

    def tile(state, token, target, gate, row):
      dx, dw, dgates = state
      x_tile, dy_tile = take(x, token), take(dy, token)
      dx_tile = jax.lax.dot_general(dy_tile, w, (((1,), (1,)), ((), ())))
      dgate = (x_tile.astype(jnp.float32) * dx_tile).sum(1)
      dw += jnp.tensordot((gate * x_tile).astype(x.dtype), dy_tile, (0, 0), preferred_element_type=jnp.float32)
      # A tile may reach into the next group's slots: that group's own tiles overwrite them.
      return _add_rows(dx, target, gate * dx_tile), dw, jax.lax.dynamic_update_slice_in_dim(dgates, dgate, row, 0)

    dx, dw, dgates = over_tiles(e, tile, (dx, jnp.zeros(w.shape, jnp.float32), dgates))
    return dx, jax.lax.dynamic_update_index_in_dim(dkernel, dw.astype(kernel.dtype), e, 0), dgates

  zeros = jnp.zeros(x.shape, jnp.float32), jnp.zeros_like(kernel), jnp.zeros_like(gates)
  dx, dkernel, dgates = jax.lax.fori_loop(0, kernel.shape[0], group, zeros)
  return dx.astype(x.dtype), dkernel, dgates, dy.astype(jnp.float32), None, None


routed_matmul.defvjp(
    lambda x, kernel, gates, bias, *slots: (
        routed_matmul(x, kernel, gates, bias, *slots), (x, kernel, gates, *slots)), _backward)


def _loop(gates: jax.Array, tokens: jax.Array, sizes: jax.Array, num_tokens: int) -> Callable[..., Any]:
  """over_tiles(e, tile, state): applies `tile(state, token, target, gate, row) -> state` to all tiles of expert e.

  Of a tile, row is the first slot, token int32 [rows] and gate f32 [rows, 1] are those of its slots, and target is
  where to add results. Slots that are not of this expert have gate 0 and no target.
  """
  end = jnp.cumsum(sizes)

  def over_tiles(e, tile, state):
    def step(row_and_state, rows):
      row, state = row_and_state
      number = jnp.arange(rows, dtype=jnp.int32)
      token, gate = (jax.lax.dynamic_slice_in_dim(a, row, rows) for a in (tokens, gates))
      own = row + number < end[e]
      # Rows behind the last one are not written; they differ, as all targets of a tile do.
      target = jnp.where(own, token, num_tokens + number)
      return row + rows, tile(state, token, target, jnp.where(own, gate, 0)[:, None], row)

    row_and_state = end[e] - sizes[e], state
    for rows, more_than in TILES:
      enough = lambda s, more_than=more_than: s[0] + more_than < end[e]
      row_and_state = jax.lax.while_loop(enough, functools.partial(step, rows=rows), row_and_state)
    return row_and_state[1]

  return over_tiles


def take(x: jax.Array, rows: jax.Array) -> jax.Array:
  """Rows of x, all of which exist."""
  return x.at[rows].get(mode='promise_in_bounds')


def _add_rows(y: jax.Array, target: jax.Array, rows: jax.Array) -> jax.Array:
  """Adds rows [rows, F] to those of y [T, F]; XLA's scatter in a loop is in place, and costs no more than a slice."""
  return y.at[target].add(rows, mode='drop', unique_indices=True)
