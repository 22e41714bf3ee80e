"""What routers did in one encoding, as losses and metrics: read from what the encoder collected."""

from typing import Any

import jax
import jax.numpy as jnp

from uni_moe_jax.moe import routers

Factors = tuple[tuple[str, float], ...]  # (auxiliary loss, factor)


def _decisions(collected) -> list[Any]:
  """Of every router: `Decision`s or `Usage`s, those of scanned layers stacked."""
  return [d for sub in ('blocks', 'tail') for out in collected[sub] for d in out['router_stats'].values()]


def _mean(values: list[jax.Array]) -> jax.Array:
  """Mean over all entries: every layer, router (and row) counts once. 0 of none: nothing was encoded."""
  flat = jnp.concatenate([v.reshape(-1) for v in values])
  return flat.sum() / max(flat.size, 1)


def auxiliary(factors: Factors, collected) -> jax.Array:
  """Σ factor · auxiliary loss, each the mean over layers and routers; 0 without factors."""
  return sum((factor * _mean([d.losses[name] for d in _decisions(collected)]) for name, factor in factors), jnp.zeros(()))


def _effective_experts(shares: jax.Array) -> jax.Array:
  """[..., A, E] → [...]: effective number of experts of all rows together, each counted once."""
  return routers.effective_experts(shares.sum(-2) / max(shares.shape[-2], 1))


def _row_overlap(shares: jax.Array) -> jax.Array:
  """[..., A, E] → [...]: mean overlap of two different rows; 1 where there are not two."""
  A, overlap = shares.shape[-2], routers.overlap(shares)
  if A < 2:
    return jnp.ones(shares.shape[:-2])
  return (overlap.sum((-2, -1)) - jnp.trace(overlap, axis1=-2, axis2=-1)) / (A * (A - 1))


def metrics(collected) -> dict[str, jax.Array]:
  """What routers did, as scalars; {} if dense.

  'router/entropy' (nats, of single decisions); 'router/effective_experts', 1 where all rows take the same expert, E where all
  experts are used alike; 'router/condition_overlap', 1 where all rows take the same, 0 where no two share an expert (both as in
  `analysis.expert_usage`, over the rows of this step); of routers that look at tokens also 'router/drop_rate' and 'router/<auxiliary loss>'.
  All are means over layers and routers. Those of several encodings may be averaged: with accumulation, rows of target sets and of
  micro-steps are not compared.
  """
  found = _decisions(collected)
  if not found:
    return {}
  out = {'router/entropy': _mean([d.entropy for d in found]),
         'router/effective_experts': _mean([_effective_experts(d.shares) for d in found]),
         'router/condition_overlap': _mean([_row_overlap(d.shares) for d in found])}
  if hasattr(found[0], 'losses'):
    out['router/drop_rate'] = _mean([d.drop_rate for d in found])
    out |= {f'router/{name}': _mean([d.losses[name] for d in found]) for name in found[0].losses}
  return out
