"""Examples of an evaluation through functions of the model, on one device or on a mesh with several processes."""

import collections
import concurrent.futures
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from uni_moe_jax.data.batches.mixtures import BatchLayout, evaluation_batches
from uni_moe_jax.data.examples.examples import Examples
from uni_moe_jax.parallel import distributed, sharding

Fields = dict[str, np.ndarray | jax.Array]
_replicate = jax.jit(sharding.replicate, static_argnums=1)


def gather(
    function: Callable[[Fields], Any], examples: Examples, ids: np.ndarray, batch_size: int, mesh: Mesh | None,
    name: str = '', period: float = 10.0) -> Any:
  """Concatenates the arrays [B, …] of `function(fields)`, one or a tree, over the batches of `ids`: numpy [N, …].

  Each example counts once. On a mesh, each process makes the rows of its own batch shards, and a batch has `batch_size`
  rows rounded up to a multiple of them. The input of later batches is made while the devices compute. Without a mesh
  two batches are in work at once, see `two_at_once`; on a mesh, where all processes must make their calls in one order,
  the results of a batch are read when the next one is queued.

  name: of what is evaluated, for lines of progress every `period` seconds; '' for none.
  """
  if mesh is None:
    batches = evaluation_batches(examples, ids, batch_size, BatchLayout())
    parts = two_at_once(lambda batch: _read(function(batch[0]), batch[1]), batches)
  else:
    parts = _on_mesh(function, examples, ids, batch_size, mesh)
  if name and distributed.is_primary():
    parts = _with_progress(parts, name, len(ids), period)
  return jax.tree.map(lambda *columns: np.concatenate(columns), *parts)


def _with_progress(parts: Iterable[Any], name: str, number: int, period: float) -> Iterator[Any]:
  """Yields the results of each batch, and prints a line now and then."""
  start, num_done = time.monotonic(), 0
  shown = start
  for part in parts:
    yield part
    num_done, now = num_done + len(jax.tree.leaves(part)[0]), time.monotonic()
    if num_done < number and now - shown >= period:
      shown, left = now, (now - start) / num_done * (number - num_done)
      tqdm.tqdm.write(f'{name}: {num_done:,} of {number:,} examples, {left / 60:,.1f} min left')  # above a bar
      sys.stdout.flush()


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
