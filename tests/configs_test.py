"""Every file in configs/: its plan, its model, its documentation; routers differ in one field."""

import dataclasses
import functools
import json
import math
import runpy
import tempfile

import flax.linen as nn
import jax
import ml_collections
import pytest
from flax import traverse_util

from tests.helpers import own_data, small_model
from tests.helpers.processes import ROOT
from uni_moe_jax import config
from uni_moe_jax.config import validate
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.shards.record_format import FORMAT
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.tasks import task_types
from uni_moe_jax.tasks.router_names import ROUTERS
from uni_moe_jax.train import optimizer, workdir
from uni_moe_jax.utils.errors import UsageError

_CONFIGS = ROOT / 'configs'
_NAMES = sorted(f.stem for f in _CONFIGS.glob('*.py'))
_FROM_A_RUN = ('finetune', 'prompt_tune', 'zero_shot')


def _config(name: str, arg: str | None = None) -> ml_collections.ConfigDict:
  """A config, read by path as the command line does."""
  c = runpy.run_path(str(_CONFIGS / f'{name}.py'))['get_config'](*([] if arg is None else [arg]))
  if c.tokenizer.type == 'clip':
    c.tokenizer.merges_path = 'a file that users have'
  return c


@functools.cache
def _run() -> str:
  """The work directory of a quickstart run, which has no steps yet."""
  workdir.claim_workdir(f'{_temporary.name}/run', _config('quickstart'), 'print')
  return f'{_temporary.name}/run'


_temporary = tempfile.TemporaryDirectory()  # until the process ends


def _default(name: str) -> ml_collections.ConfigDict:
  """A config with its default argument, or with the temporary run or data."""
  if name in _FROM_A_RUN:
    return _config(name, f'run={_run()},task=digits')
  return _config(name, f'sources={"+".join(own_data.write(_temporary.name))}' if name == 'own' else None)


def _quickstart(router: str) -> ml_collections.ConfigDict:
  c = _config('quickstart')
  c.moe.router = router
  return c


def _spec(c: ml_collections.ConfigDict, **derived) -> ModelSpec:
  """The model of a config, without its data."""
  plan = make_plan(c)
  return ModelSpec.from_config(plan.config, vocab_size=c.tokenizer.vocab_size, spe_id=1, temperatures=plan.temperatures,
                               router_tasks=task_types.router_tasks(), **derived)


@functools.cache
def _shapes(router: str) -> dict[str, tuple[int, ...]]:
  """{path: shape} of the quickstart's parameters."""
  boxed = small_model.boxed(_spec(_quickstart(router)))
  flat = traverse_util.flatten_dict(boxed, sep='/', is_leaf=lambda _, v: not isinstance(v, dict))
  return {path: getattr(leaf, 'value', leaf).shape for path, leaf in flat.items()}


def _flat(c: ml_collections.ConfigDict) -> dict[str, object]:
  return traverse_util.flatten_dict(c.to_dict(), sep='.', keep_empty_nodes=True)


@pytest.mark.parametrize('name', _NAMES)
def test_a_config_has_a_plan_and_a_model_and_no_field_that_the_base_lacks(name):
  c = _default(name)
  plan = make_plan(c)
  assert plan.probes if name == 'zero_shot' else plan.tasks
  shapes = jax.tree.map(lambda leaf: leaf.shape, nn.unbox(small_model.boxed(_spec(c))))
  assert shapes['embed']['word'] == (c.tokenizer.vocab_size, plan.config.model.width)
  # Sections whose names are the config's own.
  open_ended = ('preflight', 'task_types', 'target_families', 'target_sets', 'tasks', 'evaluators')
  own = {k for k in _flat(c) if not k.startswith(tuple(f'{s}.' for s in open_ended))}
  assert own <= set(_flat(config.base()))


@pytest.mark.parametrize('name', _NAMES)
def test_the_docstring_has_a_command_line(name):
  assert f'--config={name}' in runpy.run_path(str(_CONFIGS / f'{name}.py'))['__doc__']


# Pretraining: the table of the base model's configs, by hand.
@pytest.mark.parametrize('size', ['tiny', 'small', 'base', 'large'])
@pytest.mark.parametrize('stage', ['1', '2'])
@pytest.mark.parametrize('mixture', ['all_tasks', 'one_task'])
def test_every_size_and_stage_has_sixteen_tasks(size, stage, mixture):
  c = _config('pretrain', f'size={size},stage={stage},mixture={mixture}')
  plan = make_plan(c)
  assert (len(plan.tasks), len(plan.sets)) == (16, 4)
  # Published: POSEMBED_SCALE 160/224 at 224 pixels.
  assert (c.model.image_size, c.model.posemb_scale) == {'1': (160, 1), '2': (224, 160 / 224)}[stage]
  plan.check_batches(256, c.train.grad_accum_steps)
  plan.check_batches(8, 32)  # the page on Slurm
  for heads in (1, 1 if size == 'tiny' else 2):
    validate.check_mesh(plan.config, dict(replica=1, data=256, expert=1, model=heads))
  assert c.mesh.fsdp == (size in ('base', 'large'))


@pytest.mark.parametrize('router', ROUTERS)
def test_pretraining_has_a_plan_with_every_router(router):
  assert make_plan(_config('pretrain', f'router={router}')).config.moe.router == router


def test_one_task_per_step_has_the_published_weights_and_the_batches_of_all_ranks():
  tasks = _config('pretrain', 'mixture=one_task').tasks
  published = {
      'imagenet21k': (720, 1.0, 2.486), 'kinetics700': (64, 0.1, 0.76), 'moments': (112, 0.1, 0.44),
      'bookswiki': (512, 0.5, 2.75), 'cc12m_caption': (300, 1.0, 0.5057), 'cc12m_retrieval': (512, 0.5, 0.5057)}
  for name, expected in published.items():
    assert (tasks[name].batch_size // 64, tasks[name].loss_weight, tasks[name].sampling_weight) == expected, name
  # Retrieval contrasts within a rank.
  assert [_config('pretrain', f'stage={s},mixture=one_task').train.negatives for s in (1, 2)] == [512, 320]
  assert _config('pretrain', 'mixture=all_tasks').train.negatives == 'global'
  second = _config('pretrain', 'stage=2,mixture=one_task').tasks
  names = ('imagenet21k', 'kinetics700', 'moments', 'yfcc_caption', 'yfcc_retrieval')
  assert [second[n].batch_size // 64 for n in names] == [440, 12, 68, 200, 320]
  assert (second.kinetics700.sampling_weight, second.moments.sampling_weight) == (1.0, 0.2)


@pytest.mark.parametrize('router, steps, loss_weights', [
    ('attribute', (230_000, 50_000), (1.0, 0.1, 0.1, 0.5, 1.0, 0.5)),
    ('dense', (200_000, 45_000), (1.0, 0.05, 0.05, 0.25, 0.5, 0.25))])
def test_pretraining_has_the_published_steps_and_loss_weights_of_its_model(router, steps, loss_weights):
  first, second = (_config('pretrain', f'router={router},stage={s},mixture=one_task') for s in (1, 2))
  assert (first.train.steps, second.train.steps) == steps
  names = ('imagenet21k', 'kinetics700', 'moments', 'bookswiki', 'sbu_caption', 'sbu_retrieval')
  assert tuple(first.tasks[name].loss_weight for name in names) == (1.0, 0.1, 0.1, 0.5, 1.0, 0.5)
  assert tuple(second.tasks[name].loss_weight for name in names) == loss_weights


def test_all_tasks_per_step_have_the_batches_and_weights_that_drawing_would_give():
  drawn, mixed = (_config('pretrain', f'mixture={m}').tasks for m in ('one_task', 'all_tasks'))
  total = 2.486 + 0.76 + 0.44 + 2.75 + 2 * (0.584 + 0.5057 + 0.26295 + 0.1766 + 0.1144 + 0.1383)
  for name, t in mixed.items():
    share = drawn[name].sampling_weight / total
    assert t.loss_weight == pytest.approx(drawn[name].loss_weight * share, abs=5e-8)
    assert abs(t.batch_size - drawn[name].batch_size * share) <= 256, name
    assert t.batch_size % (512 if name == 'imagenet21k' else 256) == 0, name  # mixup uses pairs
  assert mixed.bookswiki.batch_size == 8960  # 0.275 · 512 · 64 = 9011


@pytest.mark.parametrize('name, arg, message', [
    ('pretrain', 'base', "'base' must be NAME=VALUE, .*; for example pretrain:size=base,router=attribute"),
    ('pretrain', 'router=attribut', "router='attribut' is unknown; did you mean 'attribute'.* choices: "),
    ('pretrain', 'size=huge', "size='huge' is unknown; choices: base, large, small, tiny"),
    ('pretrain', 'stage=3', "stage='3' is unknown; choices: 1, 2"),
    ('pretrain', 'mixture=x', "mixture='x' is unknown; choices: "),
    ('ablation', 'router=tokens', "router='tokens' is unknown; did you mean 'token'"),
    ('own', 'run=x', "argument 'sources' is missing"),
    ('benchmark', 'task=imagenet', "task='imagenet' is unknown; did you mean 'imagenet1k'"),
    ('benchmark', 'task=cola,mode=prompt', "mode='prompt' is unknown; did you mean 'prompts'"),
    ('benchmark', 'image_size=384px', "image_size='384px' must be an integer"),
    ('benchmark', 'task=cola,run=nowhere', "'nowhere' is no work directory of a run")])
def test_a_wrong_argument_is_an_error_with_its_choices(name, arg, message):
  with pytest.raises(UsageError, match=f'{name}:{arg}: {message}'):
    _config(name, arg)


def test_batches_of_own_data_are_those_of_one_device_times_their_number(tmp_path):
  sources = '+'.join(own_data.write(tmp_path))
  one, many = (_config('own', f'sources={sources}{number}') for number in ('', ',devices=16'))
  make_plan(many).check_batches(16, 1)
  assert {name: t.batch_size for name, t in many.tasks.items()} == {
      name: 16 * t.batch_size for name, t in one.tasks.items()}
  with pytest.raises(UsageError, match='devices=0 must be at least 1'):
    _config('own', f'sources={sources},devices=0')


def test_own_data_that_gives_no_task_is_refused_with_its_columns(tmp_path):
  """Also beside data that gives one: of two sources, one would be left out without a word."""
  pets, _ = own_data.write(tmp_path)
  (version := tmp_path / 'own/art/1.0.0').mkdir(parents=True)
  (version / 'prepared.json').write_text(json.dumps({
      'format': FORMAT, 'columns': {'image': 'image', 'text': 'text', 'style': 'class'}, 'splits': {'train': 9},
      'classes': {'style': {'names': ['modern'], 'counts': {'train': [9]}}}, 'text_bytes': {'97 %': [20]}}))
  for sources in (version.parent, f'{pets}+{version.parent}'):
    with pytest.raises(UsageError, match=r'columns of art give no task: image \(image\), text \(text\), style '
                                         r"\(class\)\. .*need captions \(field 'caption'"):
      _config('own', f'sources={sources}')
  assert set(_config('own', f'sources={pets}').tasks) == {'pets_retrieval', 'pets_caption', 'pets_breed'}


def test_a_benchmark_at_another_image_size_keeps_patches_in_place():
  c = _config('benchmark', 'image_size=384')
  assert (c.model.image_size, c.model.posemb_scale) == (384, 224 / 384)
  assert (_config('benchmark').model.image_size, _config('benchmark').model.posemb_scale) == (224, 1)
  # A run of stage 2 and a converted one, whose positions are already scaled.
  for name, arg in (('pretrain', 'stage=2'), ('published', 'image_size=224')):
    workdir.claim_workdir(f'{_temporary.name}/{name}', second := _config(name, arg), 'print')
    c = _config('benchmark', f'run={_temporary.name}/{name},image_size=384')
    assert c.model.posemb_scale * 384 == pytest.approx(second.model.posemb_scale * 224) == pytest.approx(160)
  embedded = _config('published').model
  assert (embedded.image_size, embedded.posemb_scale) == (32, 5)


@pytest.mark.parametrize('task', ['digits', 'video_caption', 'video_name'])
def test_prompt_tuning_of_the_quickstart_trains_less_than_two_percent(task):
  c = _config('prompt_tune', f'run={_run()},task={task}')
  spec = dataclasses.replace(_spec(c), head=10 if c.tasks[task].linear_head else 0)
  params = nn.unbox(small_model.boxed(spec))
  groups = jax.tree.leaves(optimizer.match_param_groups(params, c.optim.param_groups))
  sizes = [leaf.size for leaf in jax.tree.leaves(params)]
  trained = sum(size for size, group in zip(sizes, groups, strict=True) if not group.frozen)
  assert 1e-4 <= trained / sum(sizes) <= 0.02


def test_choices_for_the_ablation_see_no_test_example():
  validation, tested = (_config('ablation', f'router=dense,split={split}') for split in ('validation', 'test'))
  assert {e.split for e in validation.evaluators.values()} == {'validation'}
  assert {e.split for e in tested.evaluators.values()} == {'test', 'test_characters', 'test_fonts'}
  assert {e.task for e in validation.evaluators.values()} == {e.task for e in tested.evaluators.values()}
  one, other = (_flat(c) for c in (validation, tested))
  assert all(k.startswith('evaluators') for k in {*one, *other} if one.get(k) != other.get(k))


def test_the_ablation_of_some_tasks_is_that_of_all_without_the_others():
  some, every = (_config('ablation', f'router=dense,tasks={tasks}') for tasks in ('package+text', 'all'))
  assert (set(some.tasks), set(some.target_sets)) == ({'package', 'text'}, {'packages', 'vocabulary'})
  assert set(some.evaluators) == {'package', 'masked words'}
  make_plan(some)
  one, other = (traverse_util.flatten_dict(c.to_dict()) for c in (some, every))
  assert one.items() <= other.items()
  with pytest.raises(UsageError, match=r"tasks=packages: 'packages' is unknown; did you mean 'package'"):
    _config('ablation', 'tasks=packages')


@pytest.mark.parametrize('router', ['modality', 'task'])
def test_routers_by_name_differ_from_attribute_in_one_field_and_in_their_embeddings(router):
  one, other = _flat(_quickstart('attribute')), _flat(_quickstart(router))
  assert {k for k in one if one[k] != other[k]} == {'moe.router'}
  one, other = _shapes('attribute'), _shapes(router)
  differ = {p for p in {*one, *other} if one.get(p) != other.get(p)}
  assert differ and all('_router/embed/' in p for p in differ), differ


def test_a_dense_model_has_one_expert_of_each_projection_and_no_router():
  moe, dense = _shapes('attribute'), _shapes('dense')
  assert set(dense) == {p for p in moe if '_router/' not in p}
  for path, shape in dense.items():
    # The expert axis follows the layer axis of stacked parameters, and is the first axis of those in the tail.
    axis = 1 if '/blocks/' in path else 0
    expected = (*shape[:axis], 8, *shape[axis:]) if moe[path] != shape else shape
    assert moe[path] == expected, path
    projection = any(f'/{p}/' in path for p in ('qkv', 'attention_out', 'ffn_in', 'ffn_out'))
    assert (moe[path] != shape) == projection, path


def test_size_of_the_quickstart_by_hand():
  # D 128, F 512, L 2. A block: qkv D·3D + 3D, out D·D + D, MLP 2·D·F + F + D, two norms and two scales 6·D.
  block = 128 * 384 + 384 + 128 * 128 + 128 + 2 * 128 * 512 + 512 + 128 + 6 * 128
  assert sum(math.prod(s) for p, s in _shapes('dense').items() if p.startswith('encoder/')) == 2 * block
