"""The batch of a step: a pure function of (seed, step), the same set of examples whatever the mesh."""

import dataclasses
import functools

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers import tiny
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.pipeline import hashing, mixtures
from uni_moe_jax.data.pipeline.examples import Examples
from uni_moe_jax.data.pipeline.mixtures import BatchLayout, Mixture

SIZES = {'shape': 13, 'package': 7, 'answer': 5}
BATCH = {'shape': 8, 'package': 8, 'answer': 16}  # a config lists its tasks by name: answer, package, shape


def _examples(name):
  """Examples that show what they were made from: their id, and their randomness as a field."""
  def make(ids, hashes):
    fields = {'id': ids, 'label': tf.cast(ids, tf.int32)[:, None], 'draw': hashing.randint(hashes, 2**30)}
    if name == 'shape':
      fields['pixels'] = tf.zeros([tf.size(ids), 2, 4, 4, 1], tf.uint8)
    return fields
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
  assert len(a) == len(b)
  for (task, batch), (other_task, other) in zip(a, b):
    assert task == other_task
    assert batch.keys() == other.keys()
    for group in batch:
      assert batch[group].keys() == other[group].keys()
      for k in batch[group]:
        np.testing.assert_array_equal(batch[group][k], other[group][k])


def _column(batches, field):
  """One field of the group of pictures over steps."""
  return np.stack([batch['image_classification'][field] for _, batch in batches])


@pytest.mark.parametrize('mode', ['all_tasks', 'one_task'])
def test_a_run_that_starts_at_step_3_reads_what_it_would_have_read(mode):
  _assert_equal(_read(0, 20, mode=mode)[3:6], _read(3, 6, mode=mode))


@pytest.mark.parametrize('field', ['id', 'draw', 'temporal_offset'])
def test_steps_and_seeds_have_examples_draws_and_offsets_of_their_own(field):
  here = _column(_first(12), field)
  assert (here[:6] != here[6:]).any()
  assert (here != _column(_read(0, 12, seed=1), field)).any()


def test_tasks_of_one_kind_lie_one_after_the_other_in_their_group():
  [(task, batch)] = _first(1)
  assert task is None
  assert set(batch) == {'image_classification', 'text_classification'}
  texts = batch['text_classification']
  assert texts['label'].shape == (1, 24, 1)
  assert set(texts['label'][0, :16, 0]) == set(range(5))  # 16 of the 5 answers, then 8 of the 7 packages
  assert set(texts['label'][0, 16:, 0]) == set(range(7))


def test_ids_are_small_unsigned_numbers():
  [(_, batch)] = _first(1)
  assert batch['text_classification']['id'].dtype == np.uint32
  np.testing.assert_array_equal(batch['text_classification']['id'], batch['text_classification']['label'][..., 0])


def test_every_epoch_shows_each_example_once():
  shown = np.concatenate([b['image_classification']['label'].reshape(-1) for _, b in _first(13)])
  for epoch in shown.reshape(8, 13):  # 13 steps of 8 are 8 epochs of 13
    assert sorted(epoch) == list(range(13))


def test_randomness_of_an_example_changes_from_epoch_to_epoch():
  seen = {}
  for _, batch in _first(13):
    fields = batch['image_classification']
    for i, draw in zip(fields['id'].reshape(-1), fields['draw'].reshape(-1)):
      seen.setdefault(int(i), []).append(int(draw))
  assert all(len(set(draws)) == 8 for draws in seen.values())


def _as_sets(batches, group, task_rows):
  """Per step, the sorted (id, draw) of one task's rows, given as their share of the rows of a shard."""
  out = []
  for _, batch in batches:
    fields = batch[group]
    rows = fields['id'].shape[-1]
    part = slice(*(int(round(rows * share)) for share in task_rows))
    out.append(sorted(zip(fields['id'][..., part].reshape(-1), fields['draw'][..., part].reshape(-1))))
  return out


PARTS = [('image_classification', (0, 1)), ('text_classification', (0, 2 / 3)), ('text_classification', (2 / 3, 1))]


@pytest.mark.parametrize('layout', [BatchLayout(1, 2, (0, 1)), BatchLayout(1, 4, (0, 1, 2, 3)), BatchLayout(accum_steps=2), BatchLayout(2, 2, (0, 1))])
def test_as_a_set_the_global_batch_does_not_depend_on_the_layout(layout):
  one, other = _first(3), _read(0, 3, layout=layout)
  for group, share in PARTS:
    assert _as_sets(one, group, share) == _as_sets(other, group, share)


@pytest.mark.parametrize('accum', [1, 2])
def test_processes_make_their_shards_of_the_same_global_batch(accum):
  whole = _read(0, 3, layout=BatchLayout(accum, 4, (0, 1, 2, 3)))
  # Shards of a process need not follow each other: on a pod, neighbours in the mesh may belong to two hosts.
  parts = [_read(0, 3, layout=BatchLayout(accum, 4, mine)) for mine in ((1,), (0, 2, 3))]
  axis = 0 if accum == 1 else 1
  in_order = lambda a, b: np.insert(b, 1, np.take(a, 0, axis=axis), axis=axis)
  joined = [(None, {group: {
      k: a[group][k] if k in mixtures.UNBATCHED_FIELDS else in_order(a[group][k], b[group][k])
      for k in a[group]} for group in a}) for (_, a), (_, b) in zip(*parts)]
  for (_, a), (_, b) in zip(parts[0], parts[1]):  # and what a batch has once is the same for all
    np.testing.assert_array_equal(
        a['image_classification']['temporal_offset'], b['image_classification']['temporal_offset'])
  _assert_equal(joined, whole)


@pytest.mark.parametrize('layout, lead', [
    (BatchLayout(), (1, 8)), (BatchLayout(1, 4, (0, 1, 2, 3)), (4, 2)), (BatchLayout(1, 4, (1, 2)), (2, 2)),
    (BatchLayout(accum_steps=4), (4, 1, 2)), (BatchLayout(2, 2, (0, 1)), (2, 2, 2)), (BatchLayout(2, 2, (1,)), (2, 1, 2))])
def test_leading_axes_are_micro_steps_shards_rows(layout, lead):
  [(_, batch)] = _read(0, 3, layout=layout)[:1]
  fields = batch['image_classification']
  assert fields['id'].shape == lead
  assert fields['label'].shape == (*lead, 1)
  assert fields['pixels'].shape == (*lead, 2, 4, 4, 1)
  assert fields['temporal_offset'].shape == lead[:-2]


def test_temporal_offsets_cover_the_rows_that_leave_room_for_the_clip():
  # Two frames in a table of 5 rows: the first may be at 0…3.
  offsets = np.stack([b['image_classification']['temporal_offset'] for _, b in _read(0, 30, layout=BatchLayout(4))])
  assert set(offsets.reshape(-1).tolist()) == {0, 1, 2, 3}
  assert offsets.dtype == np.int32
  assert (offsets[:, 0] != offsets[:, 1]).any()  # each micro-step has its own


def test_texts_have_no_temporal_offset():
  [(_, batch)] = _first(1)
  assert 'temporal_offset' not in batch['text_classification']


WEIGHTS = {'shape': 3., 'package': 1., 'answer': 4.}


def test_tasks_of_a_sampled_mixture_follow_their_weights():
  steps = 4000
  drawn = mixtures.draw_tasks(_mixture(weights=WEIGHTS).plan, 0, steps)
  for name, weight in WEIGHTS.items():
    share = weight / 8
    assert abs(np.mean(drawn == name) - share) < 4 * np.sqrt(share * (1 - share) / steps), name


def test_tasks_with_a_sampling_follow_it_whatever_their_weights():
  by_weight = mixtures.draw_tasks(_mixture(weights=WEIGHTS).plan, 0, 400)
  sampled = mixtures.draw_tasks(_mixture(weights={'shape': .1, 'package': 9.}, sampling=WEIGHTS).plan, 0, 400)
  np.testing.assert_array_equal(sampled, by_weight)
  other = mixtures.draw_tasks(_mixture(weights={'shape': .1, 'package': 9.}).plan, 0, 400)
  assert (other != by_weight).any()


def test_a_task_without_a_sampling_is_drawn_by_its_weight_among_the_others():
  # Weight 3, 1 and a sampling of 4 are WEIGHTS; so a step reads the same task.
  drawn = mixtures.draw_tasks(_mixture(weights={**WEIGHTS, 'answer': .5}, sampling={'answer': 4.}).plan, 0, 400)
  np.testing.assert_array_equal(drawn, mixtures.draw_tasks(_mixture(weights=WEIGHTS).plan, 0, 400))


def test_the_task_of_a_step_depends_on_seed_and_step_alone():
  plan = _mixture(weights=WEIGHTS).plan
  drawn = mixtures.draw_tasks(plan, 0, 200)
  np.testing.assert_array_equal(mixtures.draw_tasks(plan, 0, 50), drawn[:50])
  assert (mixtures.draw_tasks(plan, 1, 200) != drawn).any()


def test_a_sampled_step_holds_one_task_and_its_kth_draw_reads_its_kth_batch():
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


def test_evaluation_counts_each_example_once():
  examples, ids = _examples('shape'), np.array([4, 9, 2, 0, 11, 7, 3])
  counted = []
  for fields, count in mixtures.evaluation_batches(examples, ids, 3):
    assert fields['id'].shape == (3,)  # the last batch is filled up: one shape, one compilation
    counted += fields['id'][:count].tolist()
  assert counted == ids.tolist()


def test_an_evaluation_batch_larger_than_the_data_is_filled_up_with_it():
  [(fields, count)] = mixtures.evaluation_batches(_examples('shape'), np.array([5, 6]), 5)
  assert fields['id'].tolist() == [5, 6, 5, 6, 5]
  assert count == 2


def test_the_randomness_of_evaluation_does_not_depend_on_the_batch():
  def draws(ids, batch):
    return {int(i): int(d) for f, n in mixtures.evaluation_batches(_examples('shape'), np.array(ids), batch)
            for i, d in zip(f['id'][:n], f['draw'][:n])}

  together = draws([1, 5, 8, 12], 4)
  assert draws([12, 1, 8, 5], 3) == together
  assert len(set(together.values())) == 4


def test_only_one_task_is_planned_for_a_sampled_step():
  plan = _mixture(weights=WEIGHTS).plan
  chosen = plan.only('answer')
  assert [t.loss_weight for t in chosen.tasks] == [1]  # its weight says how often it is drawn
  assert [t.name for t in chosen.tasks] == ['answer']
  assert [s.name for s in chosen.sets] == ['answers']
  assert dataclasses.replace(chosen, tasks=plan.tasks, sets=plan.sets) == plan


def test_the_weight_of_a_task_with_a_sampling_stays_the_factor_of_its_loss():
  plan = _mixture(weights=WEIGHTS, sampling={'answer': .25}).plan
  kept, counted_once = plan.only('answer'), plan.only('shape')
  assert [t.loss_weight for t in kept.tasks] == [4]
  assert [t.loss_weight for t in counted_once.tasks] == [1]  # of 3


@pytest.mark.parametrize('every, sets', [(False, ['answers']), (True, ['shapes', 'packages', 'answers'])])
def test_a_sampled_step_encodes_its_set_or_all_of_them(every, sets):
  plan = dataclasses.replace(_mixture().plan, encode_all_sets=every)
  assert sorted(s.name for s in plan.only('answer').sets) == sorted(sets)
