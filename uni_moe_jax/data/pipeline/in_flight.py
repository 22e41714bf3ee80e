"""Batches made by TensorFlow graphs in threads, several at once and ahead of the consumer."""

import collections
import concurrent.futures
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from uni_moe_jax.utils import cores


def number() -> int:
  """Batches that are made at once; as many may wait. One has too few rows to keep many cores busy."""
  return max(2, min(16, cores.available() // 4))


def make_ahead(
    make: Callable[..., Any], inputs: Sequence[np.ndarray], count: Callable[[], None] = lambda: None) -> Iterator[Any]:
  """Yields batches in order, as NumPy arrays that cannot be written.

  Each is made as if no example were corrupt; if that fails, a second time. A graph of its own, instead of a function of
  a `tf.data.Dataset`, is optimized, and its loops run without a call per iteration.

  Args:
    make: (undamaged: bool, elements of `inputs`) → tensors; with True it may fail, see `Examples.make_undamaged`.
    inputs: arrays [number of batches, …].
    count: called for each batch without corrupt examples.
  """
  specs = [tf.TensorSpec(x.shape[1:], x.dtype) for x in inputs]
  trace = lambda flag: tf.function(functools.partial(make, flag), input_signature=specs).get_concrete_function
  undamaged, any_batch = (functools.cache(trace(flag)) for flag in (True, False))

  def run(row):
    try:
      made = undamaged()(*map(tf.constant, row))
      count()
    except tf.errors.OpError:
      made = any_batch()(*map(tf.constant, row))
    return tf.nest.map_structure(lambda x: np.asarray(memoryview(x)), made)

  rows, pending, at_once = zip(*inputs, strict=True), collections.deque(), number()
  with concurrent.futures.ThreadPoolExecutor(at_once, 'batches') as pool:
    try:
      while True:
        pending.extend(pool.submit(run, row) for row in itertools.islice(rows, 2 * at_once - len(pending)))
        if not pending:
          return
        yield pending.popleft().result()
    finally:
      pool.shutdown(cancel_futures=True)
