"""Pallas kernels that are written for one type of device."""

import functools
from collections.abc import Callable, Sequence

import jax


def compiled_on(platforms: Sequence[str], kernel: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
  """kernel(*operands, interpret=…): compiled on its own platforms, interpreted on others, as in tests.

  The platform of the lowering counts, not the machine that lowers: programs for TPUs and GPUs are also made without
  one.
  """
  compiled = functools.partial(kernel, interpret=False)
  return jax.lax.platform_dependent(
      *operands, default=functools.partial(kernel, interpret=True), **dict.fromkeys(platforms, compiled))
