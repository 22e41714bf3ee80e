"""Muon for kernels: momentum whose singular values are all moved to about 1.

A step then changes a kernel in all directions that its gradients have, weak ones too, and not only in the strongest
(Jordan et al., Muon: An Optimizer for Hidden Layers in Neural Networks, 2024). Updates are scaled to the size of those
of AdamW (Liu et al., Muon is Scalable for LLM Training, 2025, equation 4), which all other parameters keep, so that
both share a learning rate and weight decays.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from uni_moe_jax.moe import precision

MOMENTUM = 0.95
_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Newton and Schulz (Jordan et al.)
_ITERATIONS = 5
_RMS = 0.2  # root mean square of an update of AdamW
_STACKED = ('layers', 'experts', 'qkv')  # a layer, an expert, and each of queries, keys and values has its own matrix
_HIDDEN = ('heads', 'mlp')
_FEATURES = {'embed', 'feature', 'patch'}


def matrix_axes(names: Sequence[str]) -> MuonDimensionNumbers | None:
  """The axes of the matrices of a parameter, by the logical names of its axes; None unless it is a kernel.

  A kernel of a block maps between the residual stream ('embed') and the axes of heads or of the MLP. Those of patches,
  of the stem, of neighboring words and of the similarity head map between features. Tables, whose rows are looked up,
  gates of routers and linear heads are none.
  """
  if len(names) == 2 and _FEATURES.issuperset(names):
    return MuonDimensionNumbers((0,), (1,))
  if 'embed' not in names or not set(names) & set(_HIDDEN):
    return None
  rest = tuple(i for i, name in enumerate(names) if name not in ('embed', *_STACKED))
  return MuonDimensionNumbers((names.index('embed'),), rest)


def scale_by_muon(axes: Any, on_one_cpu: bool) -> optax.GradientTransformation:
  """The direction of Muon; 0 for a matrix whose gradient is 0, such as that of an expert that nothing has chosen.

  Adam's updates fade without gradients. Muon's do not depend on the length of the momentum, so that they would keep
  their size for as long as float32 holds it, hundreds of steps in one direction.

  Args:
    axes: tree of `matrix_axes`, with `optax.MaskedNode` for parameters that it leaves out.
    on_one_cpu: see `sharding.on_one_cpu`.
  """
  # Optax only divides a matrix by its norm.
  momentum = optax.contrib.scale_by_muon(beta=MOMENTUM, ns_steps=0, weight_dimension_numbers=lambda _: axes)

  def update(gradients, state, params=None):
    normalized, state = momentum.update(gradients, state, params)
    return jax.tree.map(functools.partial(_direction, on_one_cpu=on_one_cpu), normalized, gradients, axes), state

  return optax.GradientTransformation(momentum.init, update)


def _direction(x: jax.Array, gradient: jax.Array, axes: MuonDimensionNumbers, on_one_cpu: bool) -> jax.Array:
  """The update of a parameter, whose matrices have norm 1: their singular values all become about as large."""
  rest = [i for i in range(x.ndim) if i not in (*axes.reduction_axis, *axes.output_axis)]
  order = (*rest, *axes.reduction_axis, *axes.output_axis)
  rows, columns = (math.prod(x.shape[i] for i in side) for side in axes)
  ordered = x.transpose(order)
  matrices = ordered.reshape(*(x.shape[i] for i in rest), rows, columns)
  if on_one_cpu:  # one matrix after the other, which stays in the processor's cache
    result = jax.lax.map(_orthogonalized, matrices.reshape(-1, rows, columns))
  else:
    result = jnp.vectorize(_orthogonalized, signature='(m,n)->(m,n)')(matrices)
  scaled = result.reshape(ordered.shape) * (_RMS * math.sqrt(max(rows, columns)))
  used = jnp.any(gradient != 0, axis=(*axes.reduction_axis, *axes.output_axis), keepdims=True)
  return jnp.where(used, scaled.transpose(np.argsort(order)), 0)


def _orthogonalized(x: jax.Array) -> jax.Array:
  """Iterations of Newton and Schulz, [m, n] of norm 1.

  An iteration multiplies X by the polynomial P = a + b G + c G² of G = X Xᵀ. All of them commute, so that iterations
  need only G, of the shorter side, and their product; X is multiplied once, at the end. A tall matrix is transposed. Of
  a square one, G is as large as X, and X itself takes the fewest products.
  """
  if x.shape[0] > x.shape[1]:
    return _orthogonalized(x.T).T
  dot = functools.partial(jnp.matmul, precision=precision.EXACT)  # errors of G grow twelvefold in an iteration
  a, b, c = _COEFFICIENTS
  polynomial = lambda gram: a * jnp.eye(len(x), dtype=x.dtype) + b * gram + c * dot(gram, gram)
  if x.shape[0] == x.shape[1]:
    for _ in range(_ITERATIONS):
      x = dot(polynomial(dot(x, x.T)), x)
    return x
  gram = dot(x, x.T)
  product = p = polynomial(gram)
  for _ in range(_ITERATIONS - 1):
    gram = dot(p, dot(gram, p))
    p = polynomial(gram)
    product = dot(p, product)
  return dot(product, x)
