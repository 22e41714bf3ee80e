"""Gradient accumulation over micro-steps that share features, which are computed only once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def accumulate(
    shared: Callable[[Any], tuple[tuple[Any, jax.Array], Any]] | None,
    micro: Callable[[Any, Any, Any], tuple[jax.Array, Any]], params: Any, batch: Any) -> tuple[Any, Any, Any]:
  """Gradient of `loss of shared + Σ_micro-steps loss of micro`, by two vector-Jacobian products.

  The micro-steps add up their gradients with respect to the parameters and to the shared features. One backward pass
  through `shared` then turns the latter into gradients of the parameters.

  Args:
    shared: params → ((features, loss), aux); None where the micro-steps share nothing.
    micro: (params, features, micro-batch) → (loss, aux).
    params: what is differentiated.
    batch: pytree with a leading axis of micro-steps.

  Returns:
    (gradients, aux of `micro` summed over micro-steps, aux of `shared` or None).
  """
  features, shared_aux = {}, None
  if shared is not None:
    (features, loss), pull_back, shared_aux = jax.vjp(shared, params, has_aux=True)

  def micro_step(micro_batch):
    return jax.grad(micro, argnums=(0, 1), has_aux=True)(params, features, micro_batch)

  def add(total, micro_batch):
    return jax.tree.map(jnp.add, total, micro_step(micro_batch)), None

  shapes = jax.eval_shape(micro_step, jax.tree.map(lambda x: x[0], batch))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  ((grads, feature_grads), aux), _ = jax.lax.scan(add, zeros, batch)
  if shared is not None:
    grads = jax.tree.map(jnp.add, grads, pull_back((feature_grads, jnp.ones_like(loss)))[0])
  return grads, aux, shared_aux
