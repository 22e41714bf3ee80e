"""Auxiliary losses and metrics of the routers in one encoding, from what the encoder collected."""

from typing import Any

import jax
import jax.numpy as jnp

from uni_moe_jax.model.encoder import Collected
from uni_moe_jax.moe import routers
from uni_moe_jax.moe.usage import Usage

LossWeights = tuple[tuple[str, float], ...]  # (auxiliary loss, weight)


def _router_stats(collected: Collected) -> list[Any]:
  """The `RouterOutput` or `Usage` of every router; those of scanned layers are stacked."""
  return [d for subtree in ('blocks', 'tail') for out in collected[subtree] for d in out['router_stats'].values()]


def _mean(values: list[jax.Array]) -> jax.Array:
  """Mean over all entries, so that every layer, router (and condition) counts once. 0 if there are none."""
  flat = jnp.concatenate([jnp.zeros(0), *(v.reshape(-1) for v in values)])
  return flat.sum() / max(flat.size, 1)


def auxiliary_loss(weights: LossWeights, collected: Collected) -> jax.Array:
  """Σ weight · auxiliary loss, each the mean over layers and routers; 0 without weights."""
  return sum((w * _mean([d.losses[name] for d in _router_stats(collected)]) for name, w in weights), jnp.zeros(()))


def _num_conditions(shares: jax.Array) -> jax.Array:
  """[..., A, E] → [...]: conditions that a router has tokens of; the last MLP has those of the readout alone."""
  return (shares.sum(-1) > 0).sum(-1)


def _effective_experts(shares: jax.Array) -> jax.Array:
  """[..., A, E] → [...]: effective number of experts of all conditions together, each counted once."""
  return routers.effective_experts(shares.sum(-2) / jnp.maximum(_num_conditions(shares), 1)[..., None])


def _condition_overlap(shares: jax.Array) -> jax.Array:
  """[..., A, E] → [...]: mean overlap of two different conditions; 1 if there is only one."""
  n, overlap = _num_conditions(shares), routers.overlap(shares)
  different = overlap.sum((-2, -1)) - jnp.trace(overlap, axis1=-2, axis2=-1)
  return jnp.where(n < 2, 1.0, different / jnp.maximum(n * (n - 1), 1))


def metrics(collected: Collected) -> dict[str, jax.Array]:
  """Scalars about the routers, means over layers and routers; {} for a dense model.

  'router/entropy': of single decisions, in nats. 'router/effective_experts': 1 where all conditions use the same
  expert, E where all experts are used equally. 'router/condition_overlap': 1 where all conditions use the same experts,
  0 where no two share one (both as in `analysis.expert_usage`, over the conditions of this step). Token and context
  routers add 'router/drop_rate' and 'router/<auxiliary loss>'. Metrics of several encodings may be averaged; with
  accumulation, conditions of target sets are not compared with those of micro-steps.
  """
  stats = _router_stats(collected)
  if not stats:
    return {}
  out = {'router/entropy': _mean([d.entropy for d in stats]),
         'router/effective_experts': _mean([_effective_experts(d.shares) for d in stats]),
         'router/condition_overlap': _mean([_condition_overlap(d.shares) for d in stats])}
  if isinstance(stats[0], Usage):
    out['router/drop_rate'] = _mean([d.drop_rate for d in stats])
    out |= {f'router/{name}': _mean([d.losses[name] for d in stats]) for name in stats[0].losses}
  return out
