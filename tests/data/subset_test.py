"""A part of the training examples: chosen by seed and example, balanced over classes, a smaller share inside a larger one."""

import dataclasses

import numpy as np
import pytest

from tests.helpers import tiny
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.assemble import Data
from uni_moe_jax.data.pipeline.examples import subset

_PLACES = np.arange(100, 130)
_LABELS = np.array([0] * 20 + [1] * 8 + [2] * 2)


def _task(**changes):
  return dataclasses.replace(make_plan(tiny.config('shape')).tasks[0], **changes)


def _counts(places):
  return np.bincount(_LABELS[places - 100], minlength=3).tolist()


@pytest.mark.parametrize('changes, counts', [
    (dict(train_fraction=.25), [5, 2, 1]),  # of 20, 8, 2: rounded up, so that no class is lost
    (dict(train_fraction=.01), [1, 1, 1]),
    (dict(shots=4), [4, 4, 2]),
    (dict(), [20, 8, 2])])
def test_every_class_gives_its_share(changes, counts):
  chosen = subset(_PLACES, _LABELS, _task(**changes), seed=3)
  assert _counts(chosen) == counts
  assert (np.diff(chosen) > 0).all() and set(chosen) <= set(_PLACES)


def test_without_classes_it_is_a_share_of_all():
  assert len(subset(_PLACES, None, _task(train_fraction=.1), seed=3)) == 3


def test_a_smaller_share_is_part_of_a_larger_one():
  small, large = (set(subset(_PLACES, _LABELS, _task(train_fraction=s), seed=3)) for s in (.2, .6))
  assert small < large


def test_the_seed_chooses_and_nothing_else():
  first, again, other = (subset(_PLACES, _LABELS, _task(train_fraction=.3), seed) for seed in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert set(first) != set(other)


@pytest.mark.parametrize('name', ['shape', 'caption', 'pair', 'package', 'text'])
def test_training_reads_the_subset_and_evaluation_everything(name):
  config = tiny.config(name, data_dir=tiny.data_dir())
  whole = Data(config, make_plan(config))
  task = whole._plan.tasks[0]
  config.tasks[name].train_fraction = .5
  part = Data(config, make_plan(config))
  less = part._plan.tasks[0]
  assert part.examples(less, training=True).size < whole.examples(task, training=True).size
  assert part.examples(less).size == whole.examples(task).size


def test_a_subset_holds_the_same_examples_as_the_whole():
  """Pictures, labels and captions of one record stay together."""
  config = tiny.config('caption', data_dir=tiny.data_dir())
  whole = Data(config, make_plan(config))
  config.tasks.caption.train_fraction = .4
  part = Data(config, make_plan(config))

  def rows(data):
    task = data._plan.tasks[0]
    examples = data.examples(task, training=True)
    fields = examples.make(np.arange(examples.size), np.zeros(examples.size, np.uint64))
    return {(p.tobytes(), w.tobytes()) for p, w in zip(fields['pixels'].numpy(), fields['text'].numpy())}
  assert rows(part) < rows(whole)
