"""Muon for the kernels of blocks: momentum whose singular values are all moved to about 1.

A step then changes a kernel in all directions that its gradients have, weak ones too, and not only in the strongest
(Jordan et al., Muon: An Optimizer for Hidden Layers in Neural Networks, 2024). Updates are scaled to the size of those
of AdamW (Liu et al., Muon is Scalable for LLM Training, 2025, equation 4), which all other parameters keep, so that
both share a learning rate and weight decays.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

MOMENTUM = 0.95
_ITERATIONS = 5  # of Newton and Schulz
_RMS = 0.2  # root mean square of an update of AdamW
_STACKED = ('layers', 'experts', 'qkv')  # a layer, an expert, and each of queries, keys and values has its own matrix
_HIDDEN = ('heads', 'mlp')


def matrix_axes(names: Sequence[str]) -> MuonDimensionNumbers | None:
  """The axes of the matrices of a parameter, by the logical names of its axes; None unless it is a kernel of a block.

  Such a kernel maps between the residual stream ('embed') and the axes of heads or of the MLP.
  """
  if 'embed' not in names or not set(names) & set(_HIDDEN):
    return None
  rest = tuple(i for i, name in enumerate(names) if name not in ('embed', *_STACKED))
  return MuonDimensionNumbers((names.index('embed'),), rest)


def scale_by_muon(axes: Any) -> optax.GradientTransformation:
  """The direction of Muon. axes: tree of `matrix_axes`, with `optax.MaskedNode` for parameters that it leaves out."""
  def scale(update: jax.Array, numbers: MuonDimensionNumbers) -> jax.Array:
    rows, columns = (math.prod(update.shape[i] for i in side) for side in numbers)
    return update * (_RMS * math.sqrt(max(rows, columns)))

  scaled = optax.stateless(lambda updates, _: jax.tree.map(scale, updates, axes))
  return optax.chain(
      optax.contrib.scale_by_muon(beta=MOMENTUM, ns_steps=_ITERATIONS, weight_dimension_numbers=lambda _: axes), scaled)
