"""Examples of an evaluation through functions of the model, on one device or on a mesh with several processes."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from uni_moe_jax.data.pipeline.examples import Examples
from uni_moe_jax.data.pipeline.mixtures import BatchLayout, evaluation_batches
from uni_moe_jax.parallel import sharding

Fields = dict[str, np.ndarray | jax.Array]
_replicate = jax.jit(sharding.replicate, static_argnums=1)


def gather(
    function: Callable[[Fields], Any], examples: Examples, ids: np.ndarray, batch_size: int, mesh: Mesh | None) -> Any:
  """Concatenates the arrays [B, …] of `function(fields)`, one or a tree, over the batches of `ids`: numpy [N, …].

  Each example counts once. On a mesh, each process makes the rows of its own batch shards, and a batch has `batch_size`
  rows rounded up to a multiple of them. The input of later batches is made while the devices compute, and the results
  of a batch are read when the next one is queued.
  """
  layout = BatchLayout() if mesh is None else BatchLayout(
      num_shards=sharding.batch_shards(mesh.shape), local_shards=sharding.local_shards(mesh))
  parts, queued = [], None
  for fields, count in evaluation_batches(examples, ids, batch_size, layout):
    if mesh is not None:
      fields = _on_mesh(fields, layout, mesh)
    results = jax.tree.map(lambda x: x if mesh is None or isinstance(x, np.ndarray) else _replicate(x, mesh),
                           function(fields))
    if queued:
      parts.append(_read(*queued))
    queued = results, count
  return jax.tree.map(lambda *columns: np.concatenate(columns), *parts, _read(*queued))


def _on_mesh(fields: dict[str, np.ndarray], layout: BatchLayout, mesh: Mesh) -> dict[str, jax.Array]:
  """Global arrays of the rows that each process has."""
  sharded, num_local = sharding.batch_sharding(mesh, 0), len(layout.local_shards)
  return {k: jax.make_array_from_process_local_data(
      sharded, v, (len(v) // num_local * layout.num_shards, *v.shape[1:])) for k, v in fields.items()}


def _read(results: Any, count: int) -> Any:
  return jax.tree.map(lambda x: np.asarray(x)[:count], results)
