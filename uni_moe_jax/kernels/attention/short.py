"""Attention within short sequences on TPUs: a Pallas kernel that has all scores of an example in fast memory.

XLA writes the scores of every layer to main memory several times, forward, recomputed and backward, and copies queries,
keys and values apart. This kernel reads the three as their projection wrote them, writes one gradient for it, and saves
nothing else for the backward pass.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from uni_moe_jax.parallel import sharding

_LANES = 128  # width of a product: heads of fewer numbers share one, in which the others' numbers are zero
_MASKED = -1e30  # a finite score: an example that only pads the batch has no valid key
_QKV = P(sharding.BATCH_AXES, None, None, 'model', None)


def attend(qkv: jax.Array, valid: jax.Array | None, mesh: Mesh | None) -> jax.Array:
  """softmax(q kᵀ / √H) v over the valid keys, scores and softmax in float32.

  Args:
    qkv: [B, S, 3, N, H].
    valid: bool [B, S], keys that count; None: all do.
    mesh: of the arrays, each device of which attends in its own examples and heads; None: one device.

  Returns:
    [B, S, N, H] in the type of `qkv`.
  """
  valid = jnp.ones(qkv.shape[:2], bool) if valid is None else valid

  def local(qkv, valid):
    B, S, _, N, H = qkv.shape
    rows = qkv.reshape(B, S, 3, N * H).swapaxes(1, 2)
    return _attention(H, sharding.platform(mesh) != 'tpu', rows, valid[:, None].astype(jnp.int32)).reshape(B, S, N, H)

  if mesh is None:
    return local(qkv, valid)
  run = jax.shard_map(local, mesh=mesh, in_specs=(_QKV, P(sharding.BATCH_AXES)), check_vma=False,
                      out_specs=P(sharding.BATCH_AXES, None, 'model', None))
  return run(*(sharding.pad_batch(x, mesh) for x in (qkv, valid)))[:qkv.shape[0]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(head_dim: int, interpret: bool, qkv: jax.Array, valid: jax.Array) -> jax.Array:
  """qkv [B, 3, S, N · H], valid int32 [B, 1, S] → [B, S, N · H]."""
  return _run(_forward, 2, head_dim, interpret, (valid, qkv), qkv.shape[:1] + qkv.shape[2:])


def _attention_backward(head_dim, interpret, saved, dy):
  valid, qkv = saved
  return _run(_backward, 5, head_dim, interpret, (*saved, dy), qkv.shape), None


_attention.defvjp(lambda head_dim, interpret, qkv, valid: (_attention(head_dim, interpret, qkv, valid), (valid, qkv)),
                  _attention_backward)


def _run(kernel, num_products, head_dim, interpret, operands, out_shape) -> jax.Array:
  """Runs a kernel once per example. num_products: [S, lanes] · [lanes, S], of every head."""
  qkv = operands[1]
  B, _, S, width = qkv.shape
  lanes = _LANES if width % _LANES == 0 and _LANES % head_dim == 0 else width
  scores = B * S * S * (width // head_dim)
  out = jax.ShapeDtypeStruct(out_shape, qkv.dtype)
  block = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda i, rank=len(x.shape): (i,) + (0,) * (rank - 1))
  moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*operands, out))
  return pl.pallas_call(
      functools.partial(kernel, head_dim=head_dim, lanes=lanes), out_shape=out, grid=(B,), interpret=interpret,
      in_specs=[block(x) for x in operands], out_specs=block(out),
      cost_estimate=pl.CostEstimate(
          flops=2 * num_products * scores * lanes, transcendentals=scores, bytes_accessed=moved),
  )(*operands)


def _forward(valid, qkv, out, *, head_dim, lanes):
  for columns, heads in _groups(out.shape[1:], head_dim, lanes):
    q, k, v = (qkv[0, i, :, columns] for i in range(3))
    y = jnp.zeros(q.shape, jnp.float32)
    for head in heads:
      y = jnp.where(head, _dot(_weights(_only(head, q), k, valid, head_dim).astype(v.dtype), v, 1, 0), y)
    out[0, :, columns] = y.astype(out.dtype)


def _backward(valid, qkv, dy, dqkv, *, head_dim, lanes):
  for columns, heads in _groups(dy.shape[1:], head_dim, lanes):
    q, k, v = (qkv[0, i, :, columns] for i in range(3))
    d = dy[0, :, columns]
    grads = [jnp.zeros(q.shape, jnp.float32)] * 3
    for head in heads:
      weights = _weights(_only(head, q), k, valid, head_dim)
      dweights = _dot(_only(head, d), v, 1, 1)
      dscores = weights * (dweights - (weights * dweights).sum(1, keepdims=True)) * head_dim**-0.5
      dscores = dscores.astype(q.dtype)
      of_head = _dot(dscores, k, 1, 0), _dot(dscores, q, 0, 0), _dot(weights.astype(d.dtype), d, 0, 0)
      grads = [jnp.where(head, new, total) for new, total in zip(of_head, grads)]
    for i, grad in enumerate(grads):
      dqkv[0, i, :, columns] = grad.astype(dqkv.dtype)


def _groups(shape: tuple[int, int], head_dim: int, lanes: int):
  """(columns, their heads as masks [S, lanes]) of every group of heads that share products."""
  column = jax.lax.broadcasted_iota(jnp.int32, (shape[0], lanes), 1)
  heads = [(column >= i) & (column < i + head_dim) for i in range(0, lanes, head_dim)]
  return [(slice(start, start + lanes), heads) for start in range(0, shape[1], lanes)]


def _only(head: jax.Array, x: jax.Array) -> jax.Array:
  return jnp.where(head, x.astype(jnp.float32), 0).astype(x.dtype)


def _weights(q: jax.Array, k: jax.Array, valid, head_dim: int) -> jax.Array:
  """f32 [S, S]."""
  scores = jnp.where(valid[0] > 0, _dot(q, k, 1, 1) * head_dim**-0.5, _MASKED)
  weights = jnp.exp(scores - scores.max(1, keepdims=True))
  return weights / weights.sum(1, keepdims=True)


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
  return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)
