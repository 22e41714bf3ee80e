"""A convolutional stem: tokens of patches from overlapping windows instead of one projection of each patch.

Convolutions of 3 × 3 pixels and stride 2 halve the image until a position is a patch (Xiao et al., Early Convolutions
Help Transformers See Better, 2021), with normalized channels instead of batch normalization. Windows are gathered and
multiplied, since on CPUs the gradient of a convolution is ten times slower.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from uni_moe_jax.kernels import projection
from uni_moe_jax.kernels.gelu import gelu
from uni_moe_jax.kernels.layer_norm import NORM_EPSILON
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.moe.layers import param, xavier_uniform


def windows(x: jax.Array) -> jax.Array:
  """[B, H, W, C] → [B, H/2, W/2, 9C]: the 3 × 3 pixels around pixels (2i, 2j), row by row; outside is zero."""
  B, H, W, C = x.shape

  def with_previous(x, axis):  # pairs of neighbors along `axis` + 1; before each, the second of the pair before it
    last = jax.lax.slice_in_dim(x, 1, 2, axis=axis + 1)
    first, others = (jax.lax.slice_in_dim(last, *ends, axis=axis) for ends in ((0, 1), (0, last.shape[axis] - 1)))
    before = jnp.concatenate([jnp.zeros_like(first), others], axis=axis)
    return jnp.concatenate([before, x], axis=axis + 1)

  x = with_previous(with_previous(x.reshape(B, H // 2, 2, W // 2, 2, C), 1), 3)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // 2, W // 2, 9 * C)


def stem_params(module: nn.Module, spec: ModelSpec) -> tuple[tuple[jax.Array, jax.Array], ...]:
  """Declares kernel [9C, C'] and bias [C'] of every convolution; each has half of the channels of the next."""
  out, channels, stages = [], spec.channels, spec.patch_size.bit_length() - 1
  for i in range(stages):
    fan_in, channels = 9 * channels, spec.width >> (stages - 1 - i)
    axis = 'embed' if i == stages - 1 else 'feature'
    out.append((param(module, f'stem{i}', xavier_uniform(fan_in, channels), {'patch': fan_in, axis: channels}),
                param(module, f'stem{i}_bias', nn.initializers.zeros, {axis: channels})))
  return tuple(out)


def conv_stem(
    pixels: jax.Array, params: tuple[tuple[jax.Array, jax.Array], ...], dtype: jnp.dtype, method: str) -> jax.Array:
  """Frames [B, T, H, W, C] → [B, T · patches, D].

  Args:
    pixels: normalized; H and W are multiples of the patch size, a power of two.
    params: see `stem_params`.
    dtype: of the products.
    method: see `projection.choose`.
  """
  B, T, *image = pixels.shape
  x = pixels.reshape(B * T, *image)
  for i, (kernel, bias) in enumerate(params, 1):
    x = windows(x)
    x_of_type = x.reshape(B * T, -1, x.shape[-1]).astype(dtype)
    product = projection.dot(x_of_type, kernel.astype(dtype), kernel, method)
    y = product.astype(jnp.float32)
    if i < len(params):
      x = gelu(jax.nn.standardize(y, epsilon=NORM_EPSILON) + bias[None, None]).reshape(*x.shape[:-1], -1)
  return (y + bias[None, None]).reshape(B, -1, y.shape[-1])
