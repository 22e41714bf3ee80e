"""AdamW as PyTorch's optimizer applies it to parameters that have no gradient in a step.

Two conventions of the published training code differ once a step does not use every parameter:

* 'settonone': gradients are dropped after every step. A parameter outside of the step's graph stays as it is: no decay,
  no moments, no step count, so that its bias correction counts its own updates.
* 'zerograd': gradients are zeroed in place. A parameter that was in the graph once is updated from then on, with
  gradient zero; one that never was stays as it is.

Each expert's slice of a parameter counts as a parameter, since each expert is a module of its own there.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AdamState(NamedTuple):
  """count: int32 per parameter or expert slice, its own updates. mu, nu: moments."""
  count: Any
  mu: Any
  nu: Any


def adamw(
    b1: float, b2: float, eps: float, weight_decay: Any, units: Any, convention: str
) -> optax.GradientTransformationExtraArgs:
  """Adam's direction plus decoupled weight decay; zero for parameters that stay as they are.

  Args:
    b1, b2, eps: of Adam; eps is added after the bias correction.
    weight_decay: a float per parameter.
    units: a shape per parameter, the leading axes over slices that are updated separately.
    convention: 'settonone' or 'zerograd'.

  Returns:
    A transformation whose update takes `used`, see `used_params.used_mask`.
  """
  def init(params):
    counts = jax.tree.map(lambda shape: jnp.zeros(shape, jnp.int32), units, is_leaf=lambda x: type(x) is tuple)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return AdamState(counts, zeros, jax.tree.map(jnp.copy, zeros))

  def update_param(g, count, mu, nu, p, decay, is_used):
    updates = is_used if convention == 'settonone' else is_used | (count > 0)
    count = count + updates

    def expand(x):  # [units] → the parameter's rank
      return x.reshape(x.shape + (1,) * (g.ndim - x.ndim))

    t = expand(jnp.maximum(count, 1)).astype(g.dtype)
    new_mu = jnp.where(expand(updates), b1 * mu + (1 - b1) * g, mu)
    new_nu = jnp.where(expand(updates), b2 * nu + (1 - b2) * g * g, nu)
    direction = new_mu / (1 - b1**t) / (jnp.sqrt(new_nu / (1 - b2**t)) + eps) + decay * p
    return jnp.where(expand(updates), direction, 0), count, new_mu, new_nu

  def update(grads, state, params, *, used, **_):
    out = jax.tree.map(update_param, grads, *state, params, weight_decay, used)
    updates, *new = jax.tree.transpose(jax.tree.structure(grads), None, out)
    return updates, AdamState(*new)

  return optax.GradientTransformationExtraArgs(init, update)
