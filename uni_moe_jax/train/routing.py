"""What routers did in one encoding, as losses and metrics: read from what the encoder collected."""

from typing import Any

import jax
import jax.numpy as jnp

Factors = tuple[tuple[str, float], ...]  # (auxiliary loss, factor)


def _decisions(collected) -> list[Any]:
  """Of every router: `Decision`s or `Usage`s, those of scanned layers stacked."""
  return [d for sub in ('blocks', 'tail') for out in collected[sub] for d in out['decisions'].values()]


def _mean(values: list[jax.Array]) -> jax.Array:
  """Mean over all entries: every layer, router (and row) counts once. 0 of none: nothing was encoded."""
  flat = jnp.concatenate([v.reshape(-1) for v in values])
  return flat.sum() / max(flat.size, 1)


def auxiliary(factors: Factors, collected) -> jax.Array:
  """Σ factor · auxiliary loss, each the mean over layers and routers; 0 without factors."""
  return sum((factor * _mean([d.losses[name] for d in _decisions(collected)]) for name, factor in factors), jnp.zeros(()))


def metrics(collected) -> dict[str, jax.Array]:
  """{'gate_entropy'} (nats), and of routers that look at tokens 'drop_rate' and 'router/<auxiliary loss>'; {} if dense.

  All are means over layers and routers, so that those of several encodings may be averaged.
  """
  found = _decisions(collected)
  if not found:
    return {}
  out = {'gate_entropy': _mean([d.entropy for d in found])}
  if hasattr(found[0], 'losses'):
    out['drop_rate'] = _mean([d.drop_rate for d in found])
    out |= {f'router/{name}': _mean([d.losses[name] for d in found]) for name in found[0].losses}
  return out
