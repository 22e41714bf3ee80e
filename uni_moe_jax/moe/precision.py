"""Mixed precision: which numbers are float32, and which have `model.dtype`. This is the one place that says so.

| what | type |
| --- | --- |
| parameters, their moments and averages; the optimizer | float32 |
| residual stream, norms, LayerScale, biases and their addition | float32 |
| router inputs, gates, merge of experts, choice and sum of a token's experts | float32 |
| attention's scores and softmax; heads, similarities, losses | float32 |
| operands and results of the projections, of patches and of attention; keys, values and caches | `model.dtype` |
| gradients: sums over tokens, arrays and devices | float32 |

Why. The published LayerScale starts at 1e-3, so a layer adds about 1e-3 to a stream of about 1, where neighbors of
bfloat16 are 8e-3 apart: in a bfloat16 stream a layer changes nothing. LayerScale multiplies float32 weights before they
are rounded, since its gradient is a sum over weights and Adam makes a step of its sign. Results of products may be
rounded: an error of 2^-9 of what a layer adds is no more than what rounded operands already cause. So may each device's
part of a sum over devices: of merged kernels, where XLA for TPUs does so, and of gradients of dispatched experts.

"float32" says how numbers are kept. By default a TPU multiplies float32 as bfloat16, and an NVIDIA GPU as TF32, which
moves a similarity of scale 100 by .04 and the choice of two experts for one token in four hundred. So products of the
rows above that are float32 are `EXACT`, wherever a model runs. With `model.dtype='float32'` evaluation and exports
multiply everything so (`of_evaluation`); training leaves the products of its layers to the platform. A CPU multiplies
float32 in full, unless `train.cpu_bfloat16` lets it round operands of these products in training (see
`kernels/projection.py`).
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

EXACT = jax.lax.Precision.HIGHEST  # CPUs multiply float32 so at any precision


def of_evaluation(dtype: Any) -> contextlib.AbstractContextManager:
  """A context for tracing evaluation: products of a float32 model are full float32, in kernels, too.

  dtype: of the products. Those of bfloat16 need no context, and kernels on TPUs refuse one.
  """
  return jax.default_matmul_precision('highest') if jnp.dtype(dtype) == jnp.float32 else contextlib.nullcontext()
