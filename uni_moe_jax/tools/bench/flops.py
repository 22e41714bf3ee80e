"""FLOPs of the model's matrix products, by formula (XLA's own count takes the body of a scan once).

Multiply and add count two. Elementwise work, normalisation and what rematerialisation computes again are left out: a share of
the peak is of useful products. A training step is three forwards.
"""

from uni_moe_jax.model.spec import ModelSpec

TRAIN = 3  # forwards per training step: one, and two products per product in the backward pass


def layer(spec: ModelSpec, tokens: int, read: int | None = None) -> int:
  """One dense layer over a sequence; the last one computes `read` rows only, and keys and values of all."""
  D, F = spec.width, spec.mlp_dim
  rows = tokens if read is None else read
  keys_and_values = 2 * tokens * D * 2 * D
  query_and_out = 2 * rows * D * 2 * D
  attention = 2 * rows * tokens * D * 2
  ffn = 2 * rows * D * F * 2
  return keys_and_values + query_and_out + attention + ffn


def sequence(spec: ModelSpec, tokens: int, visual: bool) -> int:
  """Forward of one sequence that is read at its prefix (which `tokens` counts): layers, patches, head."""
  D = spec.width
  patches = 2 * (tokens - 1) * spec.patch_size**2 * spec.channels * D if visual else 0
  return (spec.num_layers - 1) * layer(spec, tokens) + layer(spec, tokens, read=1) + patches + 2 * D * D
