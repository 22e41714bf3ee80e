"""FLOPs of the model's matrix products by formula, independent of `model.flops`, which counts them where it traces.

Multiply and add count as two. Elementwise work, normalization and rematerialized products are left out.
"""

from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.moe import routers


def layer(spec: ModelSpec, tokens: int, read: int | None = None, experts: tuple[str, ...] = ()) -> int:
  """FLOPs of a layer; the last one computes only `read` tokens, with keys and values of all.

  experts: sublayers that have some. A token router multiplies by K of them; a merged kernel costs as much as a dense
  one, and merging itself is not counted.
  """
  D, F = spec.width, spec.mlp_dim
  computed = tokens if read is None else read
  kernels = lambda sublayer: spec.top_k if sublayer in experts and routers.routes_tokens(spec.router) else 1
  keys_and_values, query_and_out = 4 * tokens * D**2, 4 * computed * D**2
  attention, mlp = 4 * computed * tokens * D, 4 * computed * D * F
  return kernels('attention') * (keys_and_values + query_and_out) + attention + kernels('mlp') * mlp


def sequence(spec: ModelSpec, tokens: int, visual: bool) -> int:
  """FLOPs of a forward pass of a sequence that is read at its prefix, which `tokens` counts."""
  D, (*layers, last) = spec.width, spec.pattern
  patches = 2 * (tokens - 1) * spec.patch_size**2 * spec.channels * D if visual else 0
  return sum(layer(spec, tokens, experts=experts) for experts in layers) + layer(spec, tokens, 1, last) + (
      patches + 2 * D * D)
