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
_MAX_BYTES = 2**21  # of the batches of one call, unless a batch has more


def num_together(num_bytes: int, most: int) -> int:
  """Batches that one call of `make_ahead` makes, of so many bytes each and at most `most`, but at least one."""
  return max(1, min(most, _MAX_BYTES // max(num_bytes, 1)))


def make_ahead(
    make: Callable[..., Any], inputs: Sequence[np.ndarray], count: Callable[[Any], None] = lambda uncounted: None,
    num_waiting: int | None = None, max_together: int = 1) -> Iterator[Any]:
  """Yields batches in order, as NumPy arrays that cannot be written.

  Each is made as if no example were corrupt; if that fails, a second time. A graph of its own, instead of a function of
  a `tf.data.Dataset`, is optimized, and its loops run without a call per iteration. A call takes about half a
  millisecond of Python, so that one makes several batches of few bytes.

  Args:
    make: (undamaged: bool, k elements of each of `inputs`: [k, …]) → (tensors [k, …] of k batches, what `count` needs);
      with True it may fail, see `Examples.make_undamaged`.
    inputs: arrays [number of batches, …].
    count: called with the second result if the batches were made as if no example were corrupt, in their thread.
    num_waiting: calls whose batches may wait for the consumer, besides those being made; by default as many.
    max_together: largest k.
  """
  specs = [tf.TensorSpec((None, *x.shape[1:]), x.dtype) for x in inputs]
  trace = lambda flag: tf.function(
      functools.partial(make, flag), input_signature=specs, autograph=False).get_concrete_function
  undamaged, any_batch = (functools.cache(trace(flag)) for flag in (True, False))

  num_failed, as_numpy = itertools.count(), lambda x: np.asarray(memoryview(x))

  def run(*rows):
    call = lambda graph: tf.nest.map_structure(as_numpy, graph()(*map(tf.constant, rows)))
    try:
      batches, uncounted = call(undamaged)
    except tf.errors.OpError as e:
      if (n := len(rows[0])) > 1:  # find the batch
        return [*run(*(x[:n // 2] for x in rows)), *run(*(x[n // 2:] for x in rows))]
      if not next(num_failed):  # whatever the reason is, it must not stay hidden: it halves the speed
        print('data: a batch is made a second time, as with corrupt examples. Later ones are not reported. The reason: '
              f'{next(iter(_REASON.findall(e.message)), e.message)}', file=sys.stderr, flush=True)
      batches, _ = call(any_batch)
    else:
      count(uncounted)
    return [_batch(batches, i) for i in range(len(rows[0]))]

  outputs = tf.nest.flatten(undamaged().structured_outputs[0])
  k = num_together(sum(x.shape[1:].num_elements() * x.dtype.size for x in outputs), max_together)
  calls, pending, at_once = iter(range(0, len(inputs[0]), k)), collections.deque(), cores.batches_at_once()
  num_ahead = at_once + (at_once if num_waiting is None else num_waiting)
  with concurrent.futures.ThreadPoolExecutor(at_once, 'batches') as pool:
    try:
      while True:
        pending.extend(pool.submit(run, *(x[i:i + k] for x in inputs))
                       for i in itertools.islice(calls, num_ahead - len(pending)))
        if not pending:
          return
        yield from pending.popleft().result()
    finally:
      pool.shutdown(cancel_futures=True)


def _batch(batches: Any, i: int) -> Any:
  """Batch i of nested dictionaries of arrays [k, …]; `tf.nest` takes ten times as long."""
  return {name: _batch(x, i) for name, x in batches.items()} if isinstance(batches, dict) else batches[i, ...]
