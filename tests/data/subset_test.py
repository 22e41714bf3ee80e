"""Training on a fraction of the examples: chosen by seed and example, balanced over classes, nested."""

import dataclasses

import numpy as np
import pytest

from tests.helpers import tiny
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.assemble import Data
from uni_moe_jax.data.pipeline.examples import subset

_IDS = np.arange(100, 130)
_LABELS = np.array([0] * 20 + [1] * 8 + [2] * 2)


def _task(**changes):
  return dataclasses.replace(make_plan(tiny.config('shape')).tasks[0], **changes)


def _counts(ids):
  return np.bincount(_LABELS[ids - 100], minlength=3).tolist()


@pytest.mark.parametrize('changes, counts', [
    (dict(train_fraction=.25), [5, 2, 1]),  # of 20, 8, 2: rounded up, so that no class is empty
    (dict(train_fraction=.01), [1, 1, 1]),
    (dict(shots=4), [4, 4, 2]),
    (dict(), [20, 8, 2])])
def test_every_class_has_its_fraction(changes, counts):
  chosen = subset(_IDS, _LABELS, _task(**changes), seed=3)
  assert _counts(chosen) == counts
  assert (np.diff(chosen) > 0).all() and set(chosen) <= set(_IDS)


def test_without_classes_the_fraction_is_of_all_examples():
  assert len(subset(_IDS, None, _task(train_fraction=.1), seed=3)) == 3


def test_a_smaller_fraction_is_a_subset_of_a_larger_one():
  small, large = (set(subset(_IDS, _LABELS, _task(train_fraction=s), seed=3)) for s in (.2, .6))
  assert small < large


def test_the_subset_depends_on_the_seed_alone():
  first, again, other = (subset(_IDS, _LABELS, _task(train_fraction=.3), seed) for seed in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert set(first) != set(other)


@pytest.mark.parametrize('name', ['shape', 'caption', 'pair', 'package', 'text'])
def test_training_reads_the_subset_and_evaluation_all_examples(name):
  config = tiny.config(name, data_dir=tiny.data_dir())
  full = Data(config, make_plan(config))
  task = full._plan.tasks[0]
  config.tasks[name].train_fraction = .5
  part = Data(config, make_plan(config))
  smaller = part._plan.tasks[0]
  assert part.examples(smaller, training=True).size < full.examples(task, training=True).size
  assert part.examples(smaller).size == full.examples(task).size


def test_a_subset_contains_unchanged_examples():
  """Images, labels and captions of one record stay together."""
  config = tiny.config('caption', data_dir=tiny.data_dir())
  full = Data(config, make_plan(config))
  config.tasks.caption.train_fraction = .4
  part = Data(config, make_plan(config))

  def rows(data):
    task = data._plan.tasks[0]
    examples = data.examples(task, training=True)
    fields = examples.make(np.arange(examples.size), np.zeros(examples.size, np.uint64))
    return {(p.tobytes(), w.tobytes()) for p, w in zip(fields['pixels'].numpy(), fields['text'].numpy())}
  assert rows(part) < rows(full)
