"""Batches are made by threads, ahead and in order, small ones together, and a second time only if the first fails."""

import contextlib
import threading

import numpy as np
import pytest
import tensorflow as tf

from uni_moe_jax.data.batches import in_flight
from uni_moe_jax.data.batches.lookahead import Lookahead
from uni_moe_jax.utils import cores


def _call(function, x):
  """A function of Python within a graph, for each number of x: (its results, int64 [k]; nothing to count)."""
  y = tf.numpy_function(lambda x: np.array([function(i) for i in x.tolist()]), [x], tf.int64)
  return tf.ensure_shape(y, x.shape), ()


def test_batches_are_in_order_and_nested_like_what_the_graph_returns():
  for k in (1, 4):
    made = in_flight.make_ahead(lambda _, x, y: ({'x': {'sum': x + y[:, 0]}, 'y': y}, ()),
                                [np.arange(9), np.arange(18).reshape(9, 2)], max_together=k)
    for i, batch in zip(range(9), made, strict=True):
      assert batch['x']['sum'] == 3 * i and batch['y'].tolist() == [2 * i, 2 * i + 1]
      assert isinstance(batch['x']['sum'], np.ndarray) and not batch['y'].flags.writeable


@pytest.mark.parametrize('num_bytes, sizes', [
    (16, {0: 4, 4: 4, 8: 1}), (2**21 // 3, {0: 3, 3: 3, 6: 3}), (2**22, dict.fromkeys(range(9), 1))])
def test_a_call_makes_as_many_batches_as_are_allowed_and_have_few_bytes(num_bytes, sizes):
  calls = {}

  def make(_, i):
    log = tf.numpy_function(lambda i: calls.update({int(i[0]): len(i)}) or np.int64(0), [i], tf.int64)
    return tf.zeros([tf.size(i), num_bytes], tf.uint8), log

  assert len(list(in_flight.make_ahead(make, [np.arange(9)], max_together=4))) == 9
  assert calls == sizes


def test_a_bounded_number_of_batches_is_made_ahead_of_the_consumer():
  number, made, all_ahead = cores.batches_at_once(), [], threading.Event()

  def read(i):
    made.append(i)
    if len(made) == 2 * number:
      all_ahead.set()
    return i

  batches = in_flight.make_ahead(lambda _, i: _call(read, i), [np.arange(1000)])
  assert next(batches) == 0
  assert all_ahead.wait(60)  # while the consumer works on the first one
  batches.close()
  assert len(made) <= 2 * number


def test_only_a_batch_that_fails_is_made_again_and_reported_and_is_not_counted(capfd):
  calls, counted = [], []

  def make(undamaged, i):
    def read(i):
      calls.append((undamaged, i))
      if undamaged and i == 3:
        raise ValueError('damaged')
      return i if undamaged else -i
    made, _ = _call(read, i)
    return made, made

  made = list(in_flight.make_ahead(make, [np.arange(6)], lambda made: counted.extend(made.tolist())))
  assert made == [0, 1, 2, -3, 4, 5] and sorted(counted) == [0, 1, 2, 4, 5]
  assert sorted(calls) == [(False, 3)] + [(True, i) for i in range(6)]
  error = capfd.readouterr().err
  assert 'data: a batch is made a second time' in error and 'The reason: ValueError: damaged\n' in error


def test_of_batches_made_together_only_the_one_that_fails_is_not_made_as_undamaged():
  calls, counted = [], []

  def make(undamaged, i):
    def read(i):
      calls.append((undamaged, i.tolist()))
      if undamaged and 5 in i:
        raise ValueError('damaged')
      return i if undamaged else -i
    made = tf.ensure_shape(tf.numpy_function(read, [i], tf.int64), i.shape)
    return made, made

  made = list(in_flight.make_ahead(make, [np.arange(8)], lambda made: counted.extend(made.tolist()), max_together=8))
  assert made == [0, 1, 2, 3, 4, -5, 6, 7] and sorted(counted) == [0, 1, 2, 3, 4, 6, 7]
  assert calls == [(True, list(range(8))), (True, [0, 1, 2, 3]), (True, [4, 5, 6, 7]), (True, [4, 5]), (True, [4]),
                   (True, [5]), (False, [5]), (True, [6, 7])]


def test_an_error_of_the_second_graph_is_raised_where_its_batch_would_be_taken():
  def read(i):
    if i == 1:
      raise ValueError('no record can be read')
    return i

  batches = in_flight.make_ahead(lambda _, i: _call(read, i), [np.arange(4)])
  assert next(batches) == 0
  with pytest.raises(tf.errors.InvalidArgumentError, match='no record can be read'):
    next(batches)


def test_after_an_error_of_the_consumer_no_queued_batch_is_made_and_no_thread_is_left():
  made, go, error = [], threading.Event(), ZeroDivisionError()

  def count(i):  # blocks a thread of this module; within the graph, it would block one of TensorFlow's two
    made.append(i)
    assert i[0] == 0 or go.wait(60)

  def fail(_):
    threading.Timer(3, go.set).start()  # when the queued batches are canceled
    raise error

  batches = in_flight.make_ahead(lambda _, i: (i, i), [np.arange(1000)], count)
  with pytest.raises(ZeroDivisionError), contextlib.closing(Lookahead(batches, fail)) as ahead:
    ahead.take()
  assert len(made) <= 1 + cores.batches_at_once()
  assert not [t.name for t in threading.enumerate() if t.name.startswith('batches')]
