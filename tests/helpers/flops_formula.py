"""FLOPs of the model's matrix products by formula, independent of `model.flops`, which counts them where it traces.

Multiply and add count as two. Elementwise work, normalization and rematerialized products are left out.
"""

from uni_moe_jax.model.spec import ModelSpec


def layer(spec: ModelSpec, tokens: int, read: int | None = None) -> int:
  """FLOPs of a dense layer; the last one computes only `read` tokens, with keys and values of all."""
  D, F = spec.width, spec.mlp_dim
  computed = tokens if read is None else read
  keys_and_values, query_and_out = 4 * tokens * D**2, 4 * computed * D**2
  attention, mlp = 4 * computed * tokens * D, 4 * computed * D * F
  return keys_and_values + query_and_out + attention + mlp


def sequence(spec: ModelSpec, tokens: int, visual: bool) -> int:
  """FLOPs of a forward pass of a sequence that is read at its prefix, which `tokens` counts."""
  D = spec.width
  patches = 2 * (tokens - 1) * spec.patch_size**2 * spec.channels * D if visual else 0
  return (spec.num_layers - 1) * layer(spec, tokens) + layer(spec, tokens, 1) + patches + 2 * D * D
