"""What a valid config becomes, and what it needs of the mesh."""

import json

import pytest

from tests.helpers import small_config
from uni_moe_jax import config
from uni_moe_jax.config import validate
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.tasks import task_types
from uni_moe_jax.utils.errors import UsageError


@pytest.fixture(name='c')
def _c():
  return small_config.config()


def _sets(plan):
  return [s.name for s in plan.sets]


def test_every_task_is_in_the_plan_with_its_type_and_target_set(c):
  assert {t.name: (t.type.name, t.target_set) for t in make_plan(c).tasks} == {
      'shape': ('image_classification', 'classes'), 'text': ('text_mlm', 'vocabulary'),
      'name': ('image_caption', 'vocabulary'), 'pair': ('image_retrieval', ''),
      'package': ('text_classification', 'packages')}


def test_a_target_set_has_the_condition_of_its_family_and_only_the_vocabulary_is_the_vocabulary(c):
  c.target_sets.classes.label_prompts = True
  names, words = (task_types.families()[f] for f in ('names', 'words'))
  assert {s.name: (s.condition, s.is_vocabulary, s.label_prompts) for s in make_plan(c).sets} == {
      'classes': (names, False, True), 'packages': (words, False, False), 'vocabulary': (words, True, False)}


def test_only_a_run_that_encodes_all_sets_keeps_those_that_no_trained_task_uses(c):
  c.target_sets.unused = config.target_set(('a',), family='words')
  assert 'unused' not in _sets(make_plan(c))
  c.tasks.shape.update(batch_size=0, temperature='text_mlm')  # it is evaluated, but not trained
  plan = make_plan(c)
  assert [t.name for t in plan.probes] == ['shape'] and [s.name for s in plan.probe_sets] == ['classes']
  assert 'shape' not in [t.name for t in plan.tasks]
  assert _sets(plan.only('package')) == ['packages']
  c.train.encode_all_sets = True
  plan = make_plan(c)
  assert _sets(plan) == _sets(plan.only('package')) == ['classes', 'packages', 'unused', 'vocabulary']
  assert not plan.probe_sets


def test_temperature_groups_are_those_of_tasks_their_types_and_the_model(c):
  c.tasks.name.temperature = c.tasks.text.temperature = 'words'
  groups = ('image_classification', 'image_retrieval', 'text_classification', 'words')
  assert make_plan(c).temperatures == groups
  c.model.extra_temperature_groups = ('words', 'downstream')
  assert make_plan(c).temperatures == ('downstream', *groups)


def test_tasks_of_one_type_share_a_group_only_if_their_arrays_have_one_shape(c):
  c.tasks.second = c.tasks.package.copy_and_resolve_references()

  def groups():
    every = make_plan(c).groups.items()
    return {k: [t.name for t in tasks] for k, tasks in every if k.startswith('text_classification')}

  assert groups() == {'text_classification': ['package', 'second']}
  c.tasks.second.max_len = 24
  assert groups() == {'text_classification/16/0': ['package'], 'text_classification/24/0': ['second']}


def test_sources_in_memory_share_no_group_since_their_frames_are_not_known(c):
  c.tasks.second = c.tasks.shape.copy_and_resolve_references()
  groups = lambda: sorted(k for k in make_plan(c).groups if k.startswith('image_classification'))
  assert groups() == ['image_classification']
  c.tasks.second.source = 'videos'
  assert groups() == [f'image_classification/{c.tasks.shape.max_len}/{c.tasks.shape.max_predictions}/{source}'
                      for source in (c.tasks.shape.source, 'videos')]


def test_the_plan_has_the_config_it_was_made_of(c):
  c.moe.placement = (0, 3)
  plan = make_plan(c)
  assert plan.config.moe.placement == (0, 3) and plan.config.tasks['shape'].batch_size == 8
  c.moe.placement = 'every_2'  # either type
  assert make_plan(c).config.moe.placement == json.loads(c.to_json())['moe']['placement'] == 'every_2'


def test_a_task_type_of_the_config_leaves_the_built_in_ones_unchanged(c):
  c.task_types.search = dict(inputs=(('text', 'full'),), target='pair', readout='cls', router_task='search')
  c.tasks.search = config.task('search', 'pairs', batch_size=4, caption_templates=('{text_b}',), max_len=8)
  plan = make_plan(c)
  assert {t.name: t.type for t in plan.tasks}['search'].conditions[0].bits == (0, 1, 0, 1, 0, 1, 0, 0)
  built_in = tuple(task_types.TASK_TYPES.values())
  assert plan.task_types[:len(built_in)] == built_in


def test_a_family_of_the_config_admits_a_task_type_that_would_change_the_built_in_ones(c):
  c.task_types.seen = dict(inputs=(('visual', 'full'), ('text', 'full')), target='names', readout='cls',
                           router_task='seen')
  with pytest.raises(UsageError, match="'seen'.*would change the frozen bits.*'names': declare a new family"):
    make_plan(c)
  c.task_types.seen.target = 'seen_names'
  c.target_families.seen_names = (1, 1, 0, 1)
  make_plan(c)


def test_a_micro_batch_must_divide_over_the_shards(c):
  c.train.grad_accum_steps = 2
  # shape: 8 / 2 = 4 examples per micro-step, which 4 shards divide; name: 4 / 2 = 2 examples, which they do not.
  message = (r'config\.tasks\.name\.batch_size=4 must be a multiple of 8 \(4 batch shards of the mesh × 2 '
             r'micro-steps\); try 8')
  with pytest.raises(UsageError, match=message):
    make_plan(c).check_batches(shards=4, accum=2)
  make_plan(c).check_batches(shards=2, accum=2)
  # The next smaller batch is proposed if there is one.
  with pytest.raises(UsageError, match='batch_size=8 must be a multiple of 3 .*; try 6'):
    make_plan(c).only('shape').check_batches(shards=3, accum=1)
  make_plan(c).check_batches(shards=4, accum=1)


def test_mixup_needs_pairs_on_every_shard(c):
  c.tasks.shape.mixup_alpha = 0.8
  make_plan(c).only('shape').check_batches(shards=4, accum=1)
  with pytest.raises(UsageError, match='batch_size=8 must be a multiple of 16 for mixup or CutMix, .*8 batch shards'):
    make_plan(c).only('shape').check_batches(shards=8, accum=1)


@pytest.mark.parametrize('sizes, message', [
    (dict(model=3), r'config\.mesh\.model=3 must divide config\.model\.num_heads=2, which it splits; try 1'),
    (dict(expert=3), r'config\.mesh\.expert=3 must divide config\.moe\.num_experts=8, which it splits; try 1'),
    (dict(data=3), r'config\.mesh\.data=3 must divide config\.model\.width=16, which it splits; try 1')])
def test_an_axis_must_divide_what_it_splits(c, sizes, message):
  c.mesh.fsdp = True
  mesh = dict(replica=3, data=4, expert=2, model=2)
  validate.check_mesh(make_plan(c).config, mesh)
  with pytest.raises(UsageError, match=message):
    validate.check_mesh(make_plan(c).config, {**mesh, **sizes})
  # Only fsdp splits the width, and only a model with experts has experts to split.
  c.mesh.fsdp, c.moe.router = False, 'dense'
  validate.check_mesh(make_plan(c).config, dict(replica=1, data=3, expert=3, model=1))
