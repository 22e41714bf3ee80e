"""The batch of a step: a pure function of (seed, step), with the same set of examples on any mesh."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers import tiny
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data import hashing
from uni_moe_jax.data.batches import mixtures
from uni_moe_jax.data.batches.mixtures import BatchLayout, Mixture
from uni_moe_jax.data.examples.examples import Examples

SIZES = {'shape': 13, 'package': 7, 'answer': 5}
BATCH = {'shape': 8, 'package': 8, 'answer': 16}  # a config sorts its tasks by name: answer, package, shape


def _examples(name):
  """Examples whose features are their id and their hash."""
  def make(ids, hashes):
    features = {'id': ids, 'label': tf.cast(ids, tf.int32)[:, None], 'draw': hashing.randint(hashes, 2**30)}
    if name == 'shape':
      features['pixels'] = tf.zeros([tf.size(ids), 2, 4, 4, 1], tf.uint8)
    return features
  return Examples(SIZES[name], make)


def _mixture(seed=0, mode='all_tasks', layout=BatchLayout(), weights=None, sampling=None, batch=None, max_num_frames=5):
  config = tiny.config(*SIZES)
  for name in SIZES:
    config.tasks[name].batch_size = (batch or BATCH)[name]
    config.tasks[name].loss_weight = (weights or {}).get(name, 1.)
    config.tasks[name].sampling_weight = (sampling or {}).get(name, 0.)
  plan = make_plan(config)
  return Mixture(plan, {n: _examples(n) for n in SIZES}, seed, mode, max_num_frames, layout)


@functools.cache
def _read(start, stop, **kw):
  return tuple(_mixture(**kw).iterate(start, stop))


def _first(steps):
  """Steps 0…steps-1 of the plain mixture."""
  return _read(0, 20)[:steps]


def _assert_equal(a, b):
  assert [task for task, _ in a] == [task for task, _ in b]
  chex.assert_trees_all_equal([batch for _, batch in a], [batch for _, batch in b])


def _column(batches, field):
  """One feature of the group of images over steps."""
  return np.stack([batch['image_classification'][field] for _, batch in batches])


@pytest.mark.parametrize('mode', ['all_tasks', 'one_task'])
def test_a_run_that_resumes_at_step_3_reads_the_same_batches(mode):
  _assert_equal(_read(0, 20, mode=mode)[3:6], _read(3, 6, mode=mode))


@pytest.mark.parametrize('mode', ['all_tasks', 'one_task'])
def test_ids_are_announced_in_the_order_in_which_this_process_makes_them(mode):
  layout, announced = BatchLayout(2, 4, (1, 3)), {}
  mixture = _mixture(mode=mode, layout=layout)
  mixture = dataclasses.replace(mixture, examples={
      n: dataclasses.replace(e, prefetch=functools.partial(announced.__setitem__, n))
      for n, e in mixture.examples.items()})
  batches = [batch['image_classification'] for _, batch in mixture.iterate(3, 9) if 'image_classification' in batch]
  made = np.concatenate([batch['id'].reshape(-1) for batch in batches])
  np.testing.assert_array_equal(announced['shape'], made)
  announced.clear()
  assert not list(mixture.iterate(9, 9)) and not announced  # a finished run fetches nothing


@pytest.mark.parametrize('field', ['id', 'draw', 'temporal_offset'])
def test_examples_draws_and_offsets_depend_on_step_and_seed(field):
  values = _column(_first(12), field)
  assert (values[:6] != values[6:]).any()
  assert (values != _column(_read(0, 12, seed=1), field)).any()


def test_tasks_of_one_type_are_concatenated_in_their_group():
  [(task, batch)] = _first(1)
  assert task is None
  assert set(batch) == {'image_classification', 'text_classification'}
  texts = batch['text_classification']
  assert texts['label'].shape == (1, 24, 1)
  assert set(texts['label'][0, :16, 0]) == set(range(5))  # 16 of the 5 answers, then 8 of the 7 packages
  assert set(texts['label'][0, 16:, 0]) == set(range(7))
  assert texts['id'].dtype == np.uint32
  np.testing.assert_array_equal(texts['id'], texts['label'][..., 0])
  assert 'temporal_offset' not in texts


def test_each_example_occurs_once_per_epoch_with_another_hash_each_time():
  ids, labels, draws = (_column(_first(13), k).reshape(8, 13) for k in ('id', 'label', 'draw'))  # 8 epochs of 13
  np.testing.assert_array_equal(labels, ids)
  order = np.argsort(ids, axis=1)
  np.testing.assert_array_equal(np.take_along_axis(ids, order, axis=1), [range(13)] * 8)
  assert all(len(set(column)) == 8 for column in np.take_along_axis(draws, order, axis=1).T.tolist())


def _as_sets(batches, group, fractions):
  """Sorted (id, draw) per step of one task's rows, given as a fraction of the rows of a shard."""
  out = []
  for _, batch in batches:
    features = batch[group]
    rows = features['id'].shape[-1]
    part = slice(*(int(round(rows * fraction)) for fraction in fractions))
    out.append(sorted(zip(features['id'][..., part].reshape(-1), features['draw'][..., part].reshape(-1))))
  return out


PARTS = [('image_classification', (0, 1)), ('text_classification', (0, 2 / 3)), ('text_classification', (2 / 3, 1))]


@pytest.mark.parametrize('layout', [
    BatchLayout(1, 2, (0, 1)), BatchLayout(1, 4, (0, 1, 2, 3)), BatchLayout(accum_steps=2), BatchLayout(2, 2, (0, 1))])
def test_the_set_of_examples_does_not_depend_on_the_layout(layout):
  plain, other = _first(3), _read(0, 3, layout=layout)
  for group, fractions in PARTS:
    assert _as_sets(plain, group, fractions) == _as_sets(other, group, fractions)


@pytest.mark.parametrize('accum', [1, 2])
def test_processes_make_their_shards_of_the_same_global_batch(accum):
  global_batches = _read(0, 3, layout=BatchLayout(accum, 4, (0, 1, 2, 3)))
  # Shards of a process may be non-contiguous: on a pod, neighbors in the mesh may belong to two hosts.
  parts = [_read(0, 3, layout=BatchLayout(accum, 4, mine)) for mine in ((1,), (0, 2, 3))]

  def join(path, a, b):
    if path[-1].key in mixtures.UNBATCHED_FIELDS:  # equal on all processes
      np.testing.assert_array_equal(a, b)
      return a
    return np.insert(b, 1, np.take(a, 0, axis=accum - 1), axis=accum - 1)

  joined = [(None, jax.tree_util.tree_map_with_path(join, a, b)) for (_, a), (_, b) in zip(*parts)]
  _assert_equal(joined, global_batches)


@pytest.mark.parametrize('layout, leading', [
    (BatchLayout(), (1, 8)), (BatchLayout(1, 4, (0, 1, 2, 3)), (4, 2)), (BatchLayout(1, 4, (1, 2)), (2, 2)),
    (BatchLayout(accum_steps=4), (4, 1, 2)), (BatchLayout(2, 2, (0, 1)), (2, 2, 2)),
    (BatchLayout(2, 2, (1,)), (2, 1, 2))])
def test_leading_axes_are_micro_steps_shards_rows(layout, leading):
  [(_, batch)] = _read(0, 3, layout=layout)[:1]
  features = batch['image_classification']
  assert features['id'].shape == leading
  assert features['label'].shape == (*leading, 1)
  assert features['pixels'].shape == (*leading, 2, 4, 4, 1)
  assert features['temporal_offset'].shape == leading[:-2]


def test_temporal_offsets_cover_all_positions_of_the_video():
  # Two frames in a table of 5 rows: the first may be at 0…3.
  offsets = np.stack([b['image_classification']['temporal_offset'] for _, b in _read(0, 30, layout=BatchLayout(4))])
  assert set(offsets.reshape(-1).tolist()) == {0, 1, 2, 3}
  assert offsets.dtype == np.int32
  assert (offsets[:, 0] != offsets[:, 1]).any()  # each micro-step has its own


WEIGHTS = {'shape': 3., 'package': 1., 'answer': 4.}


def test_tasks_are_drawn_in_proportion_to_their_loss_weights():
  steps = 4000
  drawn = mixtures.draw_tasks(_mixture(weights=WEIGHTS).plan, 0, steps)
  for name, weight in WEIGHTS.items():
    share = weight / 8
    assert abs(np.mean(drawn == name) - share) < 4 * np.sqrt(share * (1 - share) / steps), name


@pytest.mark.parametrize('weights, sampling, equal', [
    ({'shape': .1, 'package': 9.}, WEIGHTS, True),
    ({'shape': .1, 'package': 9.}, None, False),
    ({**WEIGHTS, 'answer': .5}, {'answer': 4.}, True),  # loss weights 3 and 1 and a sampling weight of 4 are WEIGHTS
])
def test_a_sampling_weight_replaces_the_loss_weight(weights, sampling, equal):
  by_weight = mixtures.draw_tasks(_mixture(weights=WEIGHTS).plan, 0, 400)
  drawn = mixtures.draw_tasks(_mixture(weights=weights, sampling=sampling).plan, 0, 400)
  assert np.array_equal(drawn, by_weight) == equal


def test_the_task_of_a_step_depends_on_seed_and_step_only():
  plan = _mixture(weights=WEIGHTS).plan
  drawn = mixtures.draw_tasks(plan, 0, 200)
  np.testing.assert_array_equal(mixtures.draw_tasks(plan, 0, 50), drawn[:50])
  assert (mixtures.draw_tasks(plan, 1, 200) != drawn).any()


def test_the_kth_draw_of_a_task_reads_its_kth_batch():
  sampled = _read(0, 20, mode='one_task')
  mixed = [batch for _, batch in _first(20)]
  rows = {'shape': slice(0, 8), 'answer': slice(0, 16), 'package': slice(16, 24)}
  drawn = dict.fromkeys(SIZES, 0)
  for task, batch in sampled:
    [group] = batch
    same = mixed[drawn[task]][group]
    for k in ('id', 'draw'):
      np.testing.assert_array_equal(batch[group][k], same[k][:, rows[task]])
    drawn[task] += 1
  assert min(drawn.values()) > 1


def test_evaluation_batches_count_each_example_once():
  read = lambda ids, batch: [
      (f['id'].tolist(), n) for f, n in mixtures.evaluation_batches(_examples('shape'), np.array(ids), batch)]
  # The last batch is padded by repetition: one shape, one compilation.
  assert read([4, 9, 2, 0, 11, 7, 3], 3) == [([4, 9, 2], 3), ([0, 11, 7], 3), ([3, 3, 3], 1)]
  assert read([5, 6], 5) == [([5, 6, 5, 6, 5], 2)]


def test_a_process_makes_the_rows_of_its_shards_alone():
  made, ids = [], np.array([4, 9, 2, 0, 11, 7, 3])

  def read(layout, batch_size=4):
    def make(ids, hashes):
      tf.numpy_function(lambda rows: made.extend(rows.tolist()) or np.int64(0), [ids], tf.int64)
      return {'id': ids}
    return [(f['id'].tolist(), n) for f, n in mixtures.evaluation_batches(Examples(13, make), ids, batch_size, layout)]

  first, second = (read(BatchLayout(num_shards=2, local_shards=(i,))) for i in (0, 1))
  assert first == [([4, 9], 4), ([11, 7], 3)] and second == [([2, 0], 4), ([3, 11], 3)]
  assert sorted(made) == sorted([4, 9, 11, 7, 2, 0, 3, 11])  # each once, the last batch filled up
  # Three rows on two shards become four: a batch divides over the mesh.
  assert read(BatchLayout(num_shards=2, local_shards=(1,)), 3) == second
  assert read(BatchLayout(num_shards=4, local_shards=(1, 3)), 5) == [([2, 0, 3, 4], 7)]


def test_the_randomness_of_evaluation_does_not_depend_on_the_batch():
  def draws(ids, batch):
    return {int(i): int(d) for f, n in mixtures.evaluation_batches(_examples('shape'), np.array(ids), batch)
            for i, d in zip(f['id'][:n], f['draw'][:n])}

  expected = draws([1, 5, 8, 12], 4)
  assert draws([12, 1, 8, 5], 3) == expected
  assert len(set(expected.values())) == 4


def test_the_plan_of_a_step_with_one_task_contains_that_task_only():
  plan = _mixture(weights=WEIGHTS).plan
  chosen = plan.only('answer')
  # Its loss weight is 1, because its weight determines how often it is drawn.
  assert [(t.name, t.loss_weight) for t in chosen.tasks] == [('answer', 1)]
  assert [s.name for s in chosen.sets] == ['answers']
  assert dataclasses.replace(chosen, tasks=plan.tasks, sets=plan.sets) == plan


def test_a_task_with_a_sampling_weight_keeps_its_loss_weight():
  plan = _mixture(weights=WEIGHTS, sampling={'answer': .25}).plan
  assert [t.loss_weight for t in plan.only('answer').tasks] == [4]
  assert [t.loss_weight for t in plan.only('shape').tasks] == [1]  # of 3


def test_sizes_of_a_batch_count_frames_and_tokens_that_are_no_padding():
  valid = np.array([[[1, 1, 0], [1, 0, 0]]], bool)  # one shard, two rows
  batch = {'videos': {'pixels': np.zeros((1, 2, 5, 8, 8, 3), np.uint8), 'target_valid': valid},
           'images': {'pixels': np.zeros((1, 4, 1, 8, 8, 3), np.uint8), 'text_valid': valid[:, :1]},
           'texts': {'text': np.zeros((1, 2, 3), np.int32), 'text_valid': ~valid}}
  assert mixtures.batch_sizes(batch) == {'images': 2 * 5 + 4, 'tokens': 3 + 2 + 3}
  # Two of four shards; and both of two, which another process has, too.
  assert mixtures.batch_sizes(batch, mixtures.BatchLayout(1, 4, (2, 3))) == {'images': 28, 'tokens': 16}
  assert mixtures.batch_sizes(batch, mixtures.BatchLayout(1, 2, (0, 1))) == {'images': 14, 'tokens': 8}
