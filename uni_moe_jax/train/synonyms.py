"""Which name of a class a step uses: one of its synonyms, drawn for every class and step."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp


def sample_synonyms(sets: dict[str, dict[str, Any]], key: jax.Array) -> dict[str, dict[str, Any]]:
  """Target sets with one text per entry: buckets {'text' [n, Y, S], 'valid', 'count' [n]} become {'text' [n, S], 'valid'}.

  Every micro-step and device of a step draws the same, as the key is the step's.

  Args:
    sets: as the step takes them. key: of the step.
  """
  out = {}
  for name, s in sets.items():
    buckets = []
    for i, b in enumerate(s['buckets']):
      if 'count' in b:
        u = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), i), b['count'].shape)
        which = jnp.minimum((u * b['count']).astype(jnp.int32), b['count'] - 1)[:, None, None]
        b = {k: jnp.take_along_axis(b[k], which, axis=1)[:, 0] for k in ('text', 'valid')}
      buckets.append(b)
    out[name] = {**s, 'buckets': tuple(buckets)}
  return out
