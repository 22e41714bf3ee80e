"""Batches made by TensorFlow graphs in threads, several at once and ahead of the consumer."""

import collections
import concurrent.futures
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from uni_moe_jax.utils import cores

# In a message of TensorFlow, after its heading and the place in the graph.
_REASON = re.compile(r'^(?!Graph execution error|Detected at |<stack|\s|$)(?:{{.*?}} )?(.+)', re.MULTILINE)


def num_in_flight() -> int:
  """Batches that are made at once. One has too few rows to keep many cores busy; two leave them idle when both end."""
  return max(3, min(16, cores.available() // 4))


def make_ahead(
    make: Callable[..., Any], inputs: Sequence[np.ndarray], count: Callable[[Any], None] = lambda made: None,
    num_waiting: int | None = None) -> Iterator[Any]:
  """Yields batches in order, as NumPy arrays that cannot be written.

  Each is made as if no example were corrupt; if that fails, a second time. A graph of its own, instead of a function of
  a `tf.data.Dataset`, is optimized, and its loops run without a call per iteration.

  Args:
    make: (undamaged: bool, elements of `inputs`) → tensors; with True it may fail, see `Examples.make_undamaged`.
    inputs: arrays [number of batches, …].
    count: called with each batch that was made as if no example were corrupt, in the thread that made it.
    num_waiting: batches that may wait for the consumer, besides those being made; by default as many.
  """
  specs = [tf.TensorSpec(x.shape[1:], x.dtype) for x in inputs]
  trace = lambda flag: tf.function(functools.partial(make, flag), input_signature=specs).get_concrete_function
  undamaged, any_batch = (functools.cache(trace(flag)) for flag in (True, False))

  num_failed, as_numpy = itertools.count(), lambda x: np.asarray(memoryview(x))

  def run(row):
    try:
      made = undamaged()(*map(tf.constant, row))
    except tf.errors.OpError as e:
      if not next(num_failed):  # whatever the reason is, it must not stay hidden: it halves the speed
        print('data: a batch is made a second time, as with corrupt examples. Later ones are not reported. The reason: '
              f'{next(iter(_REASON.findall(e.message)), e.message)}', file=sys.stderr, flush=True)
      return tf.nest.map_structure(as_numpy, any_batch()(*map(tf.constant, row)))
    made = tf.nest.map_structure(as_numpy, made)
    count(made)
    return made

  rows, pending, at_once = zip(*inputs, strict=True), collections.deque(), num_in_flight()
  num_ahead = at_once + (at_once if num_waiting is None else num_waiting)
  with concurrent.futures.ThreadPoolExecutor(at_once, 'batches') as pool:
    try:
      while True:
        pending.extend(pool.submit(run, row) for row in itertools.islice(rows, num_ahead - len(pending)))
        if not pending:
          return
        yield pending.popleft().result()
    finally:
      pool.shutdown(cancel_futures=True)
