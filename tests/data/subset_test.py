"""Training on a fraction of the examples: chosen by seed and example, balanced over classes, nested."""

import dataclasses

import numpy as np
import pytest

from tests.helpers import tiny
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches.assemble import Data
from uni_moe_jax.data.examples.examples import subset
from uni_moe_jax.utils import splitmix
from uni_moe_jax.utils.errors import UsageError

_IDS = np.arange(100, 130)
_LABELS = np.array([0] * 20 + [1] * 8 + [2] * 2)


def _subset(labels=_LABELS, seed=3, **changes):
  return subset(_IDS, labels, dataclasses.replace(make_plan(tiny.config('shape')).tasks[0], **changes), seed)


def _examples(name, train_fraction=1.0, training=True, **fields):
  config = tiny.config(name, data_dir=tiny.data_dir())
  config.tasks[name].update(dict(train_fraction=train_fraction, **fields))
  plan = make_plan(config)
  return Data(config, plan).examples(plan.tasks[0], training=training)


@pytest.mark.parametrize('changes, counts', [
    (dict(train_fraction=.25), [5, 2, 1]),  # of 20, 8, 2: rounded up, so that no class is empty
    (dict(train_fraction=.01), [1, 1, 1]),
    (dict(shots=4), [4, 4, 2]),
    (dict(), [20, 8, 2])])
def test_every_class_has_its_fraction(changes, counts):
  chosen = _subset(**changes)
  assert np.bincount(_LABELS[chosen - 100], minlength=3).tolist() == counts
  assert (np.diff(chosen) > 0).all() and set(chosen) <= set(_IDS)


def test_of_each_class_those_with_the_lowest_hashes_are_chosen():
  source, split = (lambda t: (t.source, t.split))(make_plan(tiny.config('shape')).tasks[0])
  by_hash = sorted(_IDS.tolist(), key=lambda i: splitmix.mix(3, source, split, 'subset', i))
  expected = [i for label in range(3) for i in [i for i in by_hash if _LABELS[i - 100] == label][:2]]
  assert _subset(shots=2).tolist() == sorted(expected)
  assert _subset(shots=2, labels=_LABELS.astype('U')).tolist() == sorted(expected)


@pytest.mark.parametrize('train_fraction, size, number', [
    (.07, 100, 7), (.55, 100, 55), (.0701, 100, 8),  # .07 · 100 and .55 · 100 exceed 7 and 55 by rounding
    (.07, 10_000, 700), (1e-9, 100, 1)])
def test_a_fraction_that_divides_a_class_is_exact(train_fraction, size, number):
  task = dataclasses.replace(make_plan(tiny.config('shape')).tasks[0], train_fraction=train_fraction)
  assert len(subset(np.arange(size), None, task, 3)) == number


def test_without_classes_the_fraction_is_of_all_examples():
  assert len(_subset(labels=None, train_fraction=.1)) == 3


def test_a_smaller_fraction_is_a_subset_of_a_larger_one():
  small, large = (set(_subset(train_fraction=fraction)) for fraction in (.2, .6))
  assert small < large


def test_the_subset_depends_on_the_seed_alone():
  first, again, other = (_subset(train_fraction=.3, seed=seed) for seed in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert set(first) != set(other)


@pytest.mark.parametrize('name', ['shape', 'caption', 'pair', 'package', 'text'])
def test_training_reads_the_subset_and_evaluation_all_examples(name):
  assert _examples(name, .5).size < _examples(name, 1.0).size
  assert _examples(name, .5, training=False).size == _examples(name, 1.0, training=False).size


@pytest.mark.parametrize('name', ['shape', 'caption', 'pair'])
def test_shots_are_of_each_class_also_where_the_task_has_no_classes(name):
  assert _examples(name, shots=2, label_column='class').size == 2 * len(tiny.CLASSES) < _examples(name).size
  assert _examples(name, shots=2, label_column='class', training=False).size == _examples(name, training=False).size
  with pytest.raises(UsageError, match=rf"\.{name}\.label_column='clas' is (no|not a) column of .* mean 'class'"):
    _examples(name, shots=2, label_column='clas')


def test_a_subset_contains_unchanged_examples():
  """Images, labels and captions of one record stay together."""
  def rows(train_fraction):
    examples = _examples('caption', train_fraction)
    fields = examples.make(np.arange(examples.size), np.zeros(examples.size, np.uint64))
    return {(p.tobytes(), w.tobytes()) for p, w in zip(fields['pixels'].numpy(), fields['text'].numpy())}
  assert rows(.4) < rows(1.0)
