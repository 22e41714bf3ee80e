"""Examples of an evaluation through functions of the model, on one device or on a mesh with several processes."""

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator
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
  rows rounded up to a multiple of them. The input of later batches is made while the devices compute. Without a mesh
  two batches are in work at once, see `two_at_once`; on a mesh, where all processes must make their calls in one order,
  the results of a batch are read when the next one is queued.
  """
  if mesh is None:
    batches = evaluation_batches(examples, ids, batch_size, BatchLayout())
    parts = list(two_at_once(lambda batch: _read(function(batch[0]), batch[1]), batches))
  else:
    parts = list(_on_mesh(function, examples, ids, batch_size, mesh))
  return jax.tree.map(lambda *columns: np.concatenate(columns), *parts)


def two_at_once(function: Callable[[Any], Any], inputs: Iterable[Any]) -> Iterator[Any]:
  """Yields function(x) in order, of two inputs at once in two threads.

  On CPU, small products leave cores idle that another program can use. The first call, which compiles, runs alone.
  """
  inputs, started = iter(inputs), collections.deque()
  yield from map(function, itertools.islice(inputs, 1))
  with concurrent.futures.ThreadPoolExecutor(2) as threads:
    for x in inputs:
      started.append(threads.submit(function, x))
      if len(started) == 2:
        yield started.popleft().result()
    while started:
      yield started.popleft().result()


def _on_mesh(
    function: Callable[[Fields], Any], examples: Examples, ids: np.ndarray, batch_size: int, mesh: Mesh
) -> Iterator[Any]:
  """Yields the results of each batch."""
  layout = BatchLayout(num_shards=sharding.batch_shards(mesh.shape), local_shards=sharding.local_shards(mesh))
  queued = None
  for fields, count in evaluation_batches(examples, ids, batch_size, layout):
    results = jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else _replicate(x, mesh),
                           function(_global(fields, layout, mesh)))
    if queued:
      yield _read(*queued)
    queued = results, count
  yield _read(*queued)


def _global(fields: dict[str, np.ndarray], layout: BatchLayout, mesh: Mesh) -> dict[str, jax.Array]:
  """Global arrays of the rows that each process has."""
  sharded, num_local = sharding.batch_sharding(mesh, 0), len(layout.local_shards)
  return {k: jax.make_array_from_process_local_data(
      sharded, v, (len(v) // num_local * layout.num_shards, *v.shape[1:])) for k, v in fields.items()}


def _read(results: Any, count: int) -> Any:
  return jax.tree.map(lambda x: np.asarray(x)[:count], results)
