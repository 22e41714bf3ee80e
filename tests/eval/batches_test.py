"""Examples through a function: input is made ahead, results are read behind, each example counts once."""

import threading
import time
import types

import jax
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers import small_model
from uni_moe_jax.data.examples.examples import Examples
from uni_moe_jax.eval import batches, predictor
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.parallel import sharding


def _examples(size: int, on_read=lambda ids: None) -> Examples:
  def make(ids, hashes):
    ids = tf.numpy_function(lambda x: [on_read(x), x][1], [ids], tf.int64)
    ids.set_shape([None])
    return {'id': ids, 'label': tf.cast(3 * ids, tf.int32)[:, None]}
  return Examples(size, make)


class _Result:
  """An array on a device, as far as `gather` knows; notes when it is read."""

  def __init__(self, values, log):
    self._values, self._log = values, log

  def __array__(self, dtype=None, copy=None):
    self._log.append(('read', int(self._values[0])))
    return self._values


def test_the_next_batch_is_made_while_the_model_works_on_one():
  made = [threading.Event() for _ in range(4)]

  def model(fields):
    index = int(fields['id'][0]) // 2
    # Without a batch ahead, nobody would make the next one before this function returns.
    assert index == 3 or made[index + 1].wait(timeout=20)
    return fields['label']

  examples = _examples(8, lambda ids: made[ids[0] // 2].set())
  labels = batches.gather(model, examples, np.arange(8), 2, None)
  assert labels[:, 0].tolist() == [0, 3, 6, 9, 12, 15, 18, 21]


def test_a_long_evaluation_shows_how_many_examples_are_done(capsys):
  gather = lambda *args: batches.gather(lambda fields: fields['label'], _examples(5), np.arange(5), 2, None, *args)
  gather('pets caption')  # less than ten seconds
  gather('', 0.0)
  assert not capsys.readouterr().out
  gather('pets caption', 0.0)
  assert capsys.readouterr().out.splitlines() == [
      f'pets caption: {n} of 5 examples, 0.0 min left' for n in (2, 4)]


def test_on_a_mesh_results_are_read_after_the_next_batch_is_queued():
  log = []

  def model(fields):
    first = int(fields['id'][0])
    log.append(('queued', first))
    return _Result(np.asarray(fields['id']), log)

  mesh = sharding.make_mesh(dict(replica=1, data=1, expert=1, model=1), jax.devices()[:1])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batches, '_replicate', lambda x, mesh: x)
    assert batches.gather(model, _examples(5), np.arange(5), 2, mesh).tolist() == [0, 1, 2, 3, 4]
  assert log == [('queued', 0), ('queued', 2), ('read', 0), ('queued', 4), ('read', 2), ('read', 4)]


def test_without_a_mesh_two_batches_are_in_work_at_once_and_the_first_alone():
  # The first call may compile, and only pairs of later ones pass the barrier.
  running, seen, barrier = [], [], threading.Barrier(2, timeout=20)

  def model(fields):
    first = int(fields['id'][0])
    together = barrier.wait if first else lambda: None
    running.append(first)
    together()
    time.sleep(0.2 if first == 0 else 0)  # a second call would start in this time
    seen.append((first, len(running)))
    together()
    running.remove(first)
    together()
    return fields['label']

  labels = batches.gather(model, _examples(10), np.arange(10), 2, None)
  assert labels[:, 0].tolist() == list(range(0, 30, 3))
  assert seen[0] == (0, 1) and sorted(seen[1:]) == [(2, 2), (4, 2), (6, 2), (8, 2)]


def test_results_come_in_order_whichever_call_ends_first():
  second_ended = threading.Event()

  def call(x):
    if x == 1:
      assert second_ended.wait(timeout=20)
    if x == 2:
      second_ended.set()
    return 10 * x

  assert list(batches.two_at_once(call, range(5))) == [0, 10, 20, 30, 40]
  assert list(batches.two_at_once(call, [])) == []


@pytest.mark.parametrize('wrong', [0, 1, 4])
def test_an_error_in_a_call_is_that_of_the_whole(wrong):
  def call(x):
    if x == wrong:
      raise ValueError(f'input {x}')
    return x

  with pytest.raises(ValueError, match=f'input {wrong}'):
    list(batches.two_at_once(call, range(5)))


@pytest.mark.parametrize('batch_size', [3, 8])
def test_on_a_mesh_each_shard_has_its_rows_and_every_example_counts_once(batch_size):
  mesh = sharding.make_mesh(dict(replica=1, data=2, expert=2, model=2), jax.devices()[:8])
  rows = []

  def model(fields):
    assert fields['id'].sharding.is_equivalent_to(sharding.batch_sharding(mesh, 0), 1)
    rows.append(len(fields['id']))
    return fields['label'] + 1, fields['id']

  ids = np.array([5, 0, 7, 2, 9, 1])
  labels, seen = batches.gather(model, _examples(10), ids, batch_size, mesh)
  assert seen.tolist() == ids.tolist() and labels[:, 0].tolist() == (3 * ids + 1).tolist()
  assert rows == ([4, 4] if batch_size == 3 else [8])  # four batch shards


def test_ranks_move_no_scores_between_devices():
  mesh = sharding.make_mesh(dict(replica=1, data=8, expert=1, model=1), jax.devices()[:8])
  put = lambda x: jax.device_put(x, sharding.batch_sharding(mesh, 0))
  scores, labels = put(np.zeros((16, 3, 50), np.float32)), put(np.zeros((16, 3), np.int32))
  text = predictor.rank.lower(scores, labels).compile().as_text()
  assert 'f32[2,3,50]' in text and 'all-' not in text and 'collective' not in text


def test_ranked_scores_stay_on_the_shards_that_compute_them():
  mesh = sharding.make_mesh(dict(replica=1, data=8, expert=1, model=1), jax.devices()[:8])
  spec = small_model.spec()
  model = predictor.Predictor(UniPerceiver(spec, 8, mesh), small_model.params(spec), {}, None)
  model.target_set = lambda name: np.eye(50, spec.width, dtype=np.float32)
  task = types.SimpleNamespace(target_set='names', temperature='group', linear_head=False)
  features, labels = np.ones((16, 3, spec.width), np.float32), np.zeros((16, 3), np.int32)
  sharded = sharding.batch_sharding(mesh, 0)
  assert all(x.sharding.is_equivalent_to(sharded, x.ndim) for x in model.ranked([features], task, labels))
  assert model.log_probabilities(features, task).sharding.is_fully_replicated
