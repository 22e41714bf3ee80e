"""Random data of given shapes."""

import jax
import numpy as np
import pytest

from uni_moe_jax import config as config_lib
from uni_moe_jax.config import schema
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.tools.bench import cases, settings, training_steps


def _data(lengths, entries=20):
  c = config_lib.base()
  c.target_sets.names = config_lib.target_set('synthetic/names', family='names')
  c.tasks.classes = config_lib.task(
      'image_classification', 'synthetic', batch_size=2, target_set='names', label_column='class')
  plan = make_plan(c)
  return cases.SyntheticData(plan, (4, 1), 50, entries, lengths), plan


@pytest.mark.parametrize('entries', [1, 7, 1000])
def test_each_length_has_its_share_relative_to_their_sum_and_every_entry_has_a_length(entries):
  np.testing.assert_array_equal(cases.spread_lengths(8, {2: 0.25, 3: 0.5, 9: 0.25}), [2, 2, 3, 3, 3, 3, 9, 9])
  assert len(cases.spread_lengths(entries, {2: 1, 3: 1, 4: 1})) == entries


def test_the_realistic_shares_sum_to_one():
  assert sum(training_steps.REALISTIC.values()) == pytest.approx(1)


def test_full_length_names_fill_their_bucket():
  [bucket] = _data({8: 1.0})[0].target_sets['names'].buckets
  assert bucket['text'].shape == (20, 8)
  assert bucket['valid'].all()


def test_shorter_names_are_in_shorter_buckets():
  short, long = _data({3: 0.8, 8: 0.2}, 100)[0].target_sets['names'].buckets
  assert (short['text'].shape, long['text'].shape) == ((80, 3), (20, 8))
  assert (short['text'][:, -1] == 2).all()  # each ends in eot


def test_examples_have_classes_of_the_set():
  data, plan = _data({8: 1.0})
  fields = data.examples(plan.tasks[0]).make(np.array([0, 21, 63]), None)
  np.testing.assert_array_equal(fields['label'], [[0], [1], [3]])  # modulo 20
  assert fields['pixels'].shape == (3, 1, 4, 4, 1)


def _own_config(sizes, **model):
  """The case of a config with a published size and the published choices, with changed fields of its model."""
  c = config_lib.base()
  c.compat, c.model.variant = 'published', 'B/16'
  own = cases.Context(sizes, c, 'bfloat16', 1e9, jax.devices()[:1]).own_config(**model)
  assert (c.model.width, c.model.variant) == (192, 'B/16')  # the given config does not change
  return own


@pytest.mark.parametrize('sizes, changes, expected', [
    (settings.FULL, {}, (12, 768)), (settings.QUICK, {}, (2, 768)),
    *((settings.FULL, {'num_layers': n, 'width': 192}, (n, 192)) for n in (12, 24))])  # 192 is the field's default
def test_a_case_of_the_given_config_has_its_own_sizes_where_the_config_names_a_variant(sizes, changes, expected):
  model = schema.parse_config(_own_config(sizes, **changes)).model
  assert (model.num_layers, model.width) == expected
  # What no case changes is that of the variant and of `compat`.
  assert (model.patch_size, model.posemb, model.dtype) == (16, 'frozen', 'bfloat16')


def test_a_case_of_all_tasks_has_a_step_of_all_tasks_where_compat_sets_one_task():
  c = _own_config(settings.FULL)
  assert schema.parse_config(c).train.mixture == 'one_task'
  c.train.mixture = 'all_tasks'
  assert schema.parse_config(c).train.mixture == 'all_tasks'
