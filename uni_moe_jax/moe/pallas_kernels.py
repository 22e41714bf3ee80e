"""Kernels that are written for one sort of device."""

import functools
from collections.abc import Callable, Sequence

import jax


def compiled_on(platforms: Sequence[str], kernel: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
  """kernel(*operands, interpret=…): compiled on the platforms that it is written for, elsewhere interpreted, which is how it is tested.

  What counts is what a program is made for, not the machine that makes it: a TPU's or a GPU's may be made without one.
  """
  compiled = functools.partial(kernel, interpret=False)
  return jax.lax.platform_dependent(
      *operands, default=functools.partial(kernel, interpret=True), **dict.fromkeys(platforms, compiled))
