"""Attention: XLA's, and kernels of attention in which all queries see the same keys.

XLA writes scores [B, N, Q, K] to main memory: of a video of eight frames at 224 pixels, 1,569 tokens, 118 MB in float32
per layer of twelve heads. These kernels keep a block of scores at a time next to the processor: cuDNN's on NVIDIA GPUs
(Ampere or newer), and on TPUs splash attention, a Pallas kernel that is part of JAX. Backward, both compute the scores
again from one float32 per query and head. `short.py` is a kernel of our own for what attends within itself, and
`parts.py` attends to caches and prompts beside it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from uni_moe_jax.kernels.attention import short
from uni_moe_jax.parallel import sharding
from uni_moe_jax.utils.errors import UsageError

AUTO, XLA, CUDNN, SPLASH, SHORT = 'auto', 'xla', 'cudnn', 'splash', 'short'
DEVICES = {CUDNN: 'gpu', SPLASH: 'tpu', SHORT: 'tpu'}  # kernel → type of device; elsewhere Pallas' are interpreted
# 'auto' takes a kernel for at least so many queries and keys. Fewer fill too little of a block: with 589 tokens splash
# attention saves three tenths of a step's memory traffic, with 197 none (docs/results/preflight.md).
_LEAST_TOKENS = {CUDNN: 128, SPLASH: 512, SHORT: 64}
_HEADS = P(sharding.BATCH_AXES, None, 'model', None)
_MOST_HEAD_DIM = 128  # of a kernel
_LANES = 128  # blocks of splash attention are multiples of it
# A block has at most 256 bfloat16 or 128 float32 queries, and 2,048 keys: libtpu fits the kernels into the 16 MiB of
# fast memory that one may use on v4 and v5e, for heads of 128 numbers.
_QUERY_BYTES, _KEYS = 512, 2048


def heads_first(x: jax.Array) -> jax.Array:
  """[…, S, N, H] → […, N, S, H]."""
  return x.swapaxes(-3, -2)


def choose(implementation: str, q: jax.Array, k: jax.Array, mesh: Mesh | None, *, padding_trails: bool, within: bool
           ) -> str:
  """Resolves 'auto', and refuses what cannot serve: returns 'xla', 'cudnn', 'splash' or 'short'.

  Args:
    implementation: `ModelConfig.attention_impl`; what 'short' does not serve is XLA's.
    q, k: [B, Q, N, H] and [B, K, N, H]; every query sees the same keys.
    mesh: of the arrays; None: one device of this process.
    padding_trails: whether all keys that are not valid follow those that are.
    within: whether queries, keys and values are those of the same tokens, in one array, which 'short' requires.

  Raises:
    UsageError: 'cudnn' on other devices than GPUs.
  """
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  if within and (implementation == SHORT or implementation == AUTO and device.platform == 'tpu' and _fits_short(q)):
    return SHORT
  if implementation == SHORT:
    return XLA
  if implementation == CUDNN and device.platform != 'gpu':
    raise UsageError(f"config.model.attention_impl='cudnn' needs NVIDIA GPUs, and this run has devices of type "
                     f"{device.platform}; set it to 'auto'.")
  if implementation == AUTO:
    implementation = SPLASH if device.platform == 'tpu' else CUDNN if _runs_cudnn(device, q) else XLA
    if implementation == XLA:  # lengths of an exported program may be symbolic, and have no order
      return XLA
    if min(q.shape[1], k.shape[1]) < _LEAST_TOKENS[implementation] or q.shape[3] > _MOST_HEAD_DIM:
      return XLA
  return XLA if implementation == CUDNN and not padding_trails else implementation


def _fits_short(q: jax.Array) -> bool:
  """Whether the kernel for short sequences is the fastest of TPUs for queries [B, S, N, H]."""
  _, S, N, H = q.shape
  return q.dtype == jnp.bfloat16 and _LEAST_TOKENS[SHORT] <= S < _LEAST_TOKENS[SPLASH] and (
      N * H % _LANES == 0 and _LANES % H == 0)


def _runs_cudnn(device: Any, q: jax.Array) -> bool:
  """Whether cuDNN's attention serves a device, the type and the head size."""
  capability = sharding.compute_capability(device)
  return capability is not None and capability >= sharding.AMPERE and q.dtype == jnp.bfloat16 and not q.shape[3] % 8


def reference(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
  """softmax(q kᵀ / √H) v over the keys of each query's mask, bool [B or 1, 1, Q or 1, K] → [B, Q, N, H]."""
  return jax.nn.dot_product_attention(q, k, v, mask=mask)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None, implementation: str, mesh: Mesh | None,
    qkv: jax.Array | None = None) -> jax.Array:
  """`reference` over the valid keys, by the chosen implementation → [B, Q, N, H] in the type of q.

  A partitioner does not know the kernels: on a mesh, every device runs them on its own examples and heads.

  Args:
    q, k, v: [B, Q, N, H], [B, K, N, H] and [B, K, N, H].
    valid: bool [B, K]; None: all keys are.
    implementation: of `choose`. For 'cudnn' keys that are not valid come last; 'splash' and 'short' are interpreted on
      devices other than TPUs.
    mesh: as of `choose`.
    qkv: [B, S, 3, N, H], for 'short': the one array that has queries, keys and values.
  """
  if implementation == XLA:
    return reference(q, k, v, None if valid is None else valid[:, None, None])
  if implementation == SHORT:
    return short.attend(qkv, valid, mesh)
  if implementation == CUDNN:
    local = _cudnn
  else:
    local = functools.partial(_splash, interpret=sharding.platform(mesh) != 'tpu')
  if mesh is None:
    return local(q, k, v, valid)
  # Kernels do not declare what varies over which axis; every array varies over all that split it.
  run = jax.shard_map(local, mesh=mesh, in_specs=(*(_HEADS,) * 3, P(sharding.BATCH_AXES)), out_specs=_HEADS,
                      check_vma=False)
  return run(*(None if x is None else sharding.pad_batch(x, mesh) for x in (q, k, v, valid)))[:q.shape[0]]


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None) -> jax.Array:
  """Lengths become even: JAX refuses to differentiate others (a rule of biases, which it applies without one, too)."""
  (B, Q, *_), K = q.shape, k.shape[1]
  keys = None
  if valid is not None:
    keys = jnp.maximum(valid.sum(1, dtype=jnp.int32), 1)  # a padded example has no key, and 0 / 0 is NaN
  elif K % 2:
    keys = jnp.full(B, K, jnp.int32)
  even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
  return jax.nn.dot_product_attention(
      even(q), even(k), even(v), key_value_seq_lengths=keys, implementation='cudnn')[:, :Q]


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None, *, interpret: bool) -> jax.Array:
  """Keys fill whole blocks; those that are added, and those that are not valid, are of a segment of their own."""
  (_, Q, N, H), K = q.shape, k.shape[1]
  queries, keys = _block(Q, _QUERY_BYTES // q.dtype.itemsize), _block(K, _KEYS)
  num_queries, num_keys = Q + -Q % queries, K + -K % keys
  # One block of keys: a single backward kernel computes the gradients of queries, too. Of several blocks it would
  # return parts of them, rounded before they are summed.
  fused = num_keys == keys
  sizes = splash_attention_kernel.BlockSizes(
      block_q=queries, block_kv=keys, block_q_dkv=queries, block_kv_dkv=keys, use_fused_bwd_kernel=fused,
      block_q_dq=None if fused else queries, block_kv_dq=None if fused else keys)
  mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((num_queries, num_keys))] * N)
  kernel = splash_attention_kernel.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
  segments = None
  if valid is not None or num_keys != K:
    valid = jnp.ones(K, bool) if valid is None else valid  # that of all examples, if there is no padding
    is_padding = jnp.pad(~valid, (*((0, 0),) * (valid.ndim - 1), (0, num_keys - K)), constant_values=True)
    segments = splash_attention_kernel.SegmentIds(jnp.zeros(num_queries, jnp.int32), is_padding.astype(jnp.int32))
  q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)
  pad = lambda x, length: jnp.pad(heads_first(x), ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)))
  per_example = splash_attention_kernel.SegmentIds(None, None if valid is None or valid.ndim == 1 else 0)
  run = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else per_example))
  return heads_first(run(pad(q, num_queries), pad(k, num_keys), pad(v, num_keys), segments)[:, :, :Q])


def _block(length: int, most: int) -> int:
  """Tokens of a block, the same in all: as few blocks of at most `most` tokens as there can be, filled evenly."""
  blocks = -(-length // most)
  tokens = -(-length // blocks)
  return tokens + -tokens % _LANES
