"""Traced programs."""

from collections.abc import Iterator
from typing import Any

import jax.extend.core as jax_core


def equations(jaxpr: Any) -> Iterator[Any]:
  """The equations of a traced program, the bodies of its loops, calls and kernels included."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax_core.jaxprs_in_params(equation.params):
      yield from equations(inner)
