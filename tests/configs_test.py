"""Every file in configs/: it resolves, its model can be built, and routers differ by one value."""

import atexit
import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import tempfile

import jax
import ml_collections
from absl.testing import absltest, parameterized
from flax import traverse_util

from tests.helpers import small_model
from uni_moe_jax import config
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.files import prepare
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.tasks import task_types
from uni_moe_jax.train import optimizer, workdir
from uni_moe_jax.utils.errors import UsageError

_FILES = sorted((pathlib.Path(__file__).resolve().parents[1] / 'configs').glob('*.py'))
_QUICKSTART = next(f for f in _FILES if f.stem == 'quickstart')
_FROM_A_RUN = ('finetune', 'prompt_tune', 'zero_shot')  # their argument names one, and a task


def _module(path: pathlib.Path):
  """A config is read by path, as the command line does."""
  spec = importlib.util.spec_from_file_location(f'config_of_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _get(path: pathlib.Path) -> ml_collections.ConfigDict:
  run = path.stem in _FROM_A_RUN
  arguments = [f'run={_run()},task=digits'] if run else [f'sources={_own()}'] if path.stem == 'own' else []
  c = _module(path).get_config(*arguments)
  if c.tokenizer.type == 'clip':
    c.tokenizer.merges_path = 'a file that only its user has'
  return c


@functools.cache
def _own() -> str:
  """Two sources of own data, of which only what was told about them is there."""
  folder = tempfile.TemporaryDirectory(prefix='own_')
  atexit.register(folder.cleanup)
  of = {'pets': dict(columns={'image': 'image', 'captions': 'texts', 'breed': 'class'}, splits={'train': 9, 'test': 1},
                     classes={'breed': {'names': ['cat', 'dog']}}),
        'diary': dict(columns={'text': 'text'}, splits={'train': 9}, classes={})}
  places = []
  for name, facts in of.items():
    place = pathlib.Path(folder.name, 'own', name, '1.0.0')
    place.mkdir(parents=True)
    (place / 'prepared.json').write_text(json.dumps({'format': prepare.FORMAT, **facts}))
    places.append(str(place.parent))
  return '+'.join(places)


@functools.cache
def _run() -> str:
  """The work directory of a run of the quickstart."""
  folder = tempfile.TemporaryDirectory(prefix='run_')
  atexit.register(folder.cleanup)
  workdir.claim_workdir(folder.name, _get(_QUICKSTART), 'print')
  return folder.name


def _quickstart(router: str) -> ml_collections.ConfigDict:
  c = _get(_QUICKSTART)
  c.moe.router = router
  return c


def _spec(c: ml_collections.ConfigDict) -> ModelSpec:
  """The model of a config, without its data."""
  plan = make_plan(c)
  return ModelSpec.from_config(
      plan.config, vocab_size=c.tokenizer.vocab_size, spe_id=1, temperatures=plan.temperatures,
      router_tasks=task_types.router_tasks())


@functools.cache
def _shapes(router: str) -> dict[str, tuple[int, ...]]:
  """{path: shape} of the quickstart's parameters."""
  boxed = small_model.boxed(_spec(_quickstart(router)))
  flat = traverse_util.flatten_dict(boxed, sep='/', is_leaf=lambda _, v: not isinstance(v, dict))
  return {path: getattr(leaf, 'value', leaf).shape for path, leaf in flat.items()}


def _flat(c: ml_collections.ConfigDict) -> dict[str, object]:
  return traverse_util.flatten_dict(c.to_dict(), sep='.', keep_empty_nodes=True)


class EveryConfigTest(parameterized.TestCase):

  @parameterized.parameters(*_FILES)
  def test_it_resolves(self, path):
    plan = make_plan(_get(path))
    self.assertNotEmpty(plan.probes if path.stem == 'zero_shot' else plan.tasks)

  @parameterized.parameters(*_FILES)
  def test_it_has_no_field_that_the_base_lacks(self, path):
    # Sections whose names are the config's own.
    open_ended = ('preflight', 'task_types', 'target_families', 'target_sets', 'tasks', 'evaluators')
    own = {k for k in _flat(_get(path)) if not k.startswith(tuple(f'{s}.' for s in open_ended))}
    self.assertEqual(own - set(_flat(config.base())), set())

  @parameterized.parameters(*_FILES)
  def test_it_says_how_to_run_it(self, path):
    self.assertIn(f'--config=configs/{path.name}', _module(path).__doc__)

  @parameterized.parameters(*_FILES)
  def test_its_model_can_be_built(self, path):
    c = _get(path)
    shapes = jax.tree.map(lambda leaf: leaf.shape, small_model.nn.unbox(small_model.boxed(_spec(c))))
    self.assertEqual(shapes['embed']['word'], (c.tokenizer.vocab_size, make_plan(c).config.model.width))


class PretrainTest(parameterized.TestCase):
  """Sixteen published tasks: the table of the base model's configs, by hand."""

  def _get(self, arg: str) -> ml_collections.ConfigDict:
    return _module(next(f for f in _FILES if f.stem == 'pretrain')).get_config(arg)

  @parameterized.product(size=('tiny', 'small', 'base', 'large'), stage=('1', '2'), mixture=('all_tasks', 'one_task'))
  def test_every_size_and_stage_resolves_to_sixteen_tasks(self, size, stage, mixture):
    c = self._get(f'size={size},stage={stage},mixture={mixture}')
    plan = make_plan(c)
    self.assertLen(plan.tasks, 16)
    self.assertLen(plan.sets, 4)
    plan.check_batches(256, c.train.grad_accum_steps)
    self.assertEqual(c.model.image_size, {'1': 160, '2': 224}[stage])

  @parameterized.parameters('dense', 'attribute', 'task', 'modality', 'token', 'context')
  def test_every_router_resolves(self, router):
    c = self._get(f'router={router}')
    make_plan(c)
    self.assertEqual(c.moe.router, router)

  def test_a_sampled_step_has_the_published_weights_and_the_batches_of_all_ranks(self):
    tasks = self._get('mixture=one_task').tasks
    table = {n: (t.batch_size // 64, t.loss_weight, t.sampling_weight) for n, t in tasks.items()}
    self.assertEqual(table['imagenet21k'], (720, 1.0, 2.486))
    self.assertEqual(table['kinetics700'], (64, 0.1, 0.76))
    self.assertEqual(table['moments'], (112, 0.1, 0.44))
    self.assertEqual(table['bookswiki'], (512, 0.5, 2.75))
    self.assertEqual(table['cc12m_caption'], (300, 1.0, 0.5057))
    self.assertEqual(table['cc12m_retrieval'], (512, 0.5, 0.5057))
    second = self._get('stage=2,mixture=one_task').tasks
    names = ('imagenet21k', 'kinetics700', 'moments', 'yfcc_caption', 'yfcc_retrieval')
    self.assertEqual([second[n].batch_size // 64 for n in names],
                     [440, 12, 68, 200, 320])
    self.assertEqual((second.kinetics700.sampling_weight, second.moments.sampling_weight), (1.0, 0.2))

  def test_a_mixed_step_weighs_and_fills_by_how_often_tasks_would_be_drawn(self):
    sampled, mixed = (self._get(f'mixture={m}').tasks for m in ('one_task', 'all_tasks'))
    total = 2.486 + 0.76 + 0.44 + 2.75 + 2 * (0.584 + 0.5057 + 0.26295 + 0.1766 + 0.1144 + 0.1383)
    for name, t in mixed.items():
      share = sampled[name].sampling_weight / total
      self.assertAlmostEqual(t.loss_weight, sampled[name].loss_weight * share)
      self.assertLessEqual(abs(t.batch_size - sampled[name].batch_size * share), 256, name)
      self.assertEqual(t.batch_size % (512 if name == 'imagenet21k' else 256), 0, name)  # mixed in pairs
    self.assertEqual(mixed.bookswiki.batch_size, 8960)  # 0.275 · 512 · 64 = 9011

  @parameterized.parameters(
      ('base', "'base' must be NAME=VALUE, .*; for example configs/pretrain.py:size=base,router=attribute,stage=1"),
      ('router=attribut', "router='attribut' is unknown; did you mean 'attribute'.* choices: "),
      ('size=huge', "size='huge' is unknown; choices: base, large, small, tiny"),
      ('stage=3', "stage='3' is unknown; choices: 1, 2"), ('mixture=x', "mixture='x' is unknown; choices: "),
      ('stages=1', "argument 'stages' is unknown; did you mean 'stage'"),
      ('stage=1,stage=2', "argument 'stage' is given twice"))
  def test_another_argument_is_reported_with_its_choices(self, arg, message):
    with self.assertRaisesRegex(UsageError, f'configs/pretrain.py:{arg}: .*{message}'):
      self._get(arg)


class TuningTest(parameterized.TestCase):

  @parameterized.parameters('digits', 'video_caption', 'video_name')
  def test_prompt_tuning_of_the_quickstart_trains_less_than_two_percent(self, task):
    path = next(f for f in _FILES if f.stem == 'prompt_tune')
    c = _module(path).get_config(f'run={_run()},task={task}')
    head = 10 if c.tasks[task].linear_head else 0
    params = small_model.nn.unbox(small_model.boxed(dataclasses.replace(_spec(c), head=head)))
    rules = jax.tree.leaves(optimizer.match_param_groups(params, c.optim.param_groups))
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    trained = sum(size for size, rule in zip(sizes, rules, strict=True) if not rule.frozen)
    self.assertBetween(trained / sum(sizes), 1e-4, 0.02)


class AblationTest(parameterized.TestCase):

  @parameterized.parameters('dense', 'context')
  def test_it_is_the_embedded_run_with_a_shorter_schedule(self, router):
    one, other = (_flat(_module(_QUICKSTART.with_name(f'{name}.py')).get_config(f'router={router}'))
                  for name in ('embedded', 'ablation'))
    self.assertEqual({k for k in one if one[k] != other[k]}, {'train.steps', 'optim.warmup_steps'})
    self.assertEqual((other['moe.router'], set(one)), (router, set(other)))

  def test_a_router_that_is_not_there_is_named(self):
    with self.assertRaisesRegex(ValueError, "configs/ablation.py:router=tokens: router='tokens' is unknown; did you "
                                            "mean 'token'"):
      _module(_QUICKSTART.with_name('ablation.py')).get_config('router=tokens')


class RouterTest(parameterized.TestCase):

  @parameterized.parameters('dense', 'modality', 'task')
  def test_another_router_is_one_value_of_the_config(self, router):
    one, other = _flat(_quickstart('attribute')), _flat(_quickstart(router))
    self.assertEqual({k for k in one if one[k] != other[k]}, {'moe.router'})

  @parameterized.parameters('modality', 'task')
  def test_routers_differ_in_what_they_embed_and_nowhere_else(self, router):
    one, other = _shapes('attribute'), _shapes(router)
    differ = {p for p in {*one, *other} if one.get(p) != other.get(p)}
    self.assertNotEmpty(differ)
    self.assertTrue(all('_router/embed/' in p for p in differ), differ)

  def test_a_dense_model_has_one_expert_of_each_projection_and_no_router(self):
    moe, dense = _shapes('attribute'), _shapes('dense')
    self.assertEqual(set(dense), {p for p in moe if '_router/' not in p})
    for path, shape in dense.items():
      # Stacked parameters have E behind the layers, those of the tail in front.
      at = 1 if '/blocks/' in path else 0
      expected = (*shape[:at], 8, *shape[at:]) if moe[path] != shape else shape
      self.assertEqual(moe[path], expected, path)
      projection = any(f'/{p}/' in path for p in ('qkv', 'attention_out', 'ffn_in', 'ffn_out'))
      self.assertEqual(moe[path] != shape, projection, path)

  def test_size_of_the_quickstart_by_hand(self):
    # D 128, F 512, L 4. A block: qkv D·3D + 3D, out D·D + D, FFN 2·D·F + F + D, two norms and two scales 6·D.
    block = 128 * 384 + 384 + 128 * 128 + 128 + 2 * 128 * 512 + 512 + 128 + 6 * 128
    total = sum(math.prod(s) for p, s in _shapes('dense').items() if p.startswith('encoder/'))
    self.assertEqual(total, 4 * block)


if __name__ == '__main__':
  absltest.main()
