"""A small run's real programs, compiled for two virtual devices: what they take, by hand and by formula."""

import dataclasses
import functools
import json
import pathlib
import runpy

import jax
import pytest

from tests.helpers import beside_libtpu, tiny
from uni_moe_jax import config
from uni_moe_jax.tools.bench import flops
from uni_moe_jax.tools.preflight import changes, compiled_programs, findings, fit, preflight, topology
from uni_moe_jax.tools.preflight.compiled_programs import Program

_ROOT = pathlib.Path(__file__).resolve().parents[3]
_TOKENS = (tiny.SIDE // 8) ** 2 + 1  # of a picture, with its prefix


def _config():
  """Pictures against three names, a dense model without recomputation."""
  c = tiny.config('shape')
  c.model.update(dict(num_layers=4, width=32, mlp_dim=64))
  c.moe.router = 'dense'
  c.target_sets.shapes = config.target_set(('a', 'b', 'c'), family='names', max_len=8)
  c.tasks.shape.batch_size = 32
  c.data.dir = '/nowhere'  # nothing is read
  return c


@functools.cache
def _found(memory: float | None = None) -> findings.Findings:
  return preflight.preflight(_config(), 'tiny', topology.parse('cpu:2'), memory, search=False, say=lambda _: None)


def _step() -> Program:
  return _found().programs[0]


def test_parameters_lie_whole_on_every_device_and_the_optimizer_keeps_two_more_of_each():
  total = _found().parameters['total']
  assert _step().memory.params == 4 * total
  # Two moments, and a few counters.
  assert 0 <= _step().memory.optimizer - 8 * total < 100
  assert _step().memory.temporaries > 4 * total  # gradients at least
  assert _found().parameters['active'] == total


def test_products_are_those_of_the_formula():
  spec = compiled_programs.prepare(_config(), jax.devices()[:2]).spec.model.spec
  # A device has half of the 32 pictures, and two of the three names.
  formula = flops.TRAIN * (16 * flops.sequence(spec, _TOKENS, visual=True) + 2 * flops.sequence(spec, 8 + 1, visual=False))
  assert _step().cost.flops == pytest.approx(formula, rel=0.1)
  assert _step().cost.unknown_loops == 0


def test_gradients_are_reduced_once_for_each_array():
  payload = _step().cost.payload['all-reduce']
  total = 4 * _found().parameters['total']
  # On CPU the gradient of each product with a kernel is summed alone: two arrays, pictures and names, have products with most.
  assert total < payload < 2.1 * total
  assert _step().cost.sent['all-reduce'] == payload  # of two devices each sends half, twice
  # Features of the names come together, and little else.
  assert set(_step().cost.calls) == {'all-reduce', 'all-gather'}
  assert _step().cost.payload['all-gather'] < 0.1 * payload


def test_evaluation_encodes_a_batch_and_needs_no_optimizer():
  [_, evaluation] = _found().programs
  assert (evaluation.name, evaluation.examples) == ('evaluation, image_classification', 32)
  assert evaluation.memory.optimizer == 0
  assert evaluation.cost.flops < _step().cost.flops


def test_what_is_evaluated_is_what_has_most_tokens_at_once():
  def evaluated(c):
    what, rows, sequence = compiled_programs.evaluated(compiled_programs.prepare(c, jax.devices()[:2]))
    return what, rows, sequence.text if sequence.pixels is None else sequence.pixels
  c = _config()
  what, rows, pixels = evaluated(c)
  assert (what, rows, pixels.shape) == ('image_classification', 32, (32, 1, tiny.SIDE, tiny.SIDE, 1))
  # 32 pictures have 160 tokens; 50 names of 3 tokens have less, 300 of 8 more.
  c.target_sets.shapes = config.target_set('glyphs/class', family='names', max_len=8)
  c.preflight.target_lengths.shapes = ((3, 50), (8, 300))
  what, rows, text = evaluated(c)
  assert (what, rows, text.shape) == ('target set shapes', 300, (300, 8))
  # A vocabulary is encoded in parts of at most 4,096 words.
  c = tiny.config('text')
  c.tokenizer.vocab_size = 9_000
  what, rows, text = evaluated(c)
  assert (what, rows, text.shape) == ('target set words', 3_000, (3_000, 2))


def test_the_report_says_it_all():
  text = findings.render(_found())
  assert text.startswith('tiny on cpu:2: 2 devices (data 2)\nparameters: ')
  assert 'assumed: shapes 3 entries' in text
  assert 'train step: 32 examples a call' in text
  assert 'all-reduce: ' in text and 'roofline' not in text  # of a CPU nothing is known
  found = json.loads(json.dumps(findings.as_json(_found())))
  [step, _] = found['programs']
  assert found['fits'] is None
  assert step['flops'] == 2 * _step().cost.flops and step['flops_per_example'] == step['flops'] / 32
  assert step['bytes'] == pytest.approx(sum(step['memory'].values()))
  assert found['seconds'] > sum(p['compile_seconds'] for p in found['programs'])
  assert text.endswith(f'\nIt took {found["seconds"]:.0f} s.')


def test_a_report_of_a_chip_has_times_and_a_verdict():
  chip = dataclasses.replace(_found(), topology=topology.parse('v5e:2x2'), memory=_step().memory.total - 1)
  text = findings.render(chip)
  assert 'DOES NOT FIT' in text and 'roofline: ' in text and 'bound by ' in text
  assert findings.as_json(chip)['fits'] is False
  assert findings.as_json(dataclasses.replace(chip, memory=_step().memory.total))['programs'][0]['fits'] is True


def test_a_report_says_what_to_change():
  change = changes.Change((('model.remat', True),), 'a third more work')
  text = findings.render(dataclasses.replace(_found(), memory=1.0, trials=(changes.Trial((change,), 2.0**30),)))
  assert '--config.model.remat=True: 1.00 GiB, fits (a third more work)\nChange this: --config.model.remat=True\n' in text
  text = findings.render(dataclasses.replace(_found(), memory=1.0, trials=(changes.Trial((change,), None, 'evaluation, mlm'),)))
  assert ('--config.model.remat=True: unknown bytes, evaluation, mlm does not fit (a third more work)\n'
          'Nothing that was tried fits: use more devices.\n') in text


def test_a_report_says_the_largest_batch():
  largest = fit.Largest(examples=12, too_large=15, estimate=13.2, tried=((12, 2.0**30), (15, None)))
  text = findings.render(dataclasses.replace(_found(), largest=largest))
  assert ('largest batch of a device, that was compiled and fits: 12 examples; 15 does not; memory would be full at about 13\n'
          '  tried: 12 (1.00 GiB), 15 (too large)') in text


def test_mixed_pictures_have_two_classes_and_clips_of_files_the_frames_of_their_task():
  c = tiny.config('shape', 'motion')
  c.preflight.target_lengths.update(dict(shapes=((4, 3),), motions=((4, 2),)))
  c.tasks.shape.mixup_alpha, c.tasks.motion.num_frames = 0.8, 3
  c.tasks.shape.batch_size = c.tasks.motion.batch_size = 8
  prepared = compiled_programs.prepare(c, jax.devices()[:2])
  batch = compiled_programs.batch_shapes(prepared, prepared.plan.tasks)
  assert batch['image_classification']['label'].shape == batch['image_classification']['weight'].shape == (2, 4, 2)
  assert batch['video_classification']['label'].shape == (2, 4, 1)
  assert batch['video_classification']['pixels'].shape == (2, 4, 3, tiny.SIDE, tiny.SIDE, 1)


@pytest.mark.parametrize('router, capacity, grouped, becomes', [
    ('token', 1.25, 'auto', 'xla'), ('context', 0.0, 'megablox', 'xla'), ('token', 1.25, 'tiled', 'tiled'),
    ('attribute', 0.0, 'auto', 'auto')])
def test_for_a_tpu_xlas_products_stand_for_its_kernel(router, capacity, grouped, becomes):
  """With a capacity or without: which of them is meant differs between training and evaluation."""
  c = _config()
  c.moe.update(dict(router=router, capacity_factor=capacity, gmm=grouped))
  assert preflight.for_tpu(c).moe.gmm == becomes
  assert c.moe.gmm == grouped  # a copy


def test_a_run_that_starts_from_another_is_refused():
  c = _config()
  c.train.init = 'runs/other'
  with pytest.raises(ValueError, match='config.train.init=.runs/other.: preflight looks at runs that start fresh'):
    preflight.preflight(c, 'tiny', topology.parse('cpu:2'))


@pytest.mark.nightly
def test_the_search_finds_a_larger_batch_and_a_change():
  limit = 3 * _step().memory.total
  found = preflight.preflight(_config(), 'tiny', topology.parse('cpu:2'), limit, say=lambda _: None)
  assert found.largest.examples > 16 and len(found.largest.tried) <= fit.COMPILES
  assert all(b <= limit for n, b in found.largest.tried if n == found.largest.examples)
  tight = 0.9 * _step().memory.total
  found = preflight.preflight(_config(), 'tiny', topology.parse('cpu:2'), tight, say=lambda _: None)
  assert found.trials[-1].fits and found.trials[-1].needs <= tight
  assert found.largest.examples >= 16  # of the config so changed


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_is_told_a_smaller_batch():
  c = _config()
  c.tasks.shape.batch_size = 2
  c.evaluators.shape = config.evaluator('classification', 'shape', split='test', batch_size=4096)
  whole = preflight.preflight(c, 'tiny', topology.parse('cpu:2'), search=False, say=lambda _: None)
  step, evaluation = (p.memory.total for p in whole.programs)
  assert step < 0.9 * evaluation
  found = preflight.preflight(c, 'tiny', topology.parse('cpu:2'), 0.9 * evaluation, say=lambda _: None)
  assert found.trials[-1].fits and found.trials[-1].changes[0].flags == '--config.evaluators.shape.batch_size=2048'


@pytest.mark.parametrize('name, chips', [('v4:2x2x1', 4), ('v5e:2x2', 4), ('v5p:2x2x1', 4), ('v6e:2x2', 4)])
def test_libtpu_gives_a_chip_as_one_device_with_the_memory_of_its_row(name, chips):
  """libtpu names the memory where a program is too large."""
  pytest.importorskip('libtpu')
  script = f"""
import os
from uni_moe_jax.tools.preflight import topology
where = topology.parse({name!r})
topology.prepare_environment(where)
import jax, numpy as np
from uni_moe_jax.parallel import sharding
devices = topology.devices(where)
mesh = sharding.make_mesh(sharding.mesh_shape(dict(replica=1, data=-1, expert=1, model=1), len(devices)), devices)
x = jax.ShapeDtypeStruct((1 << 20, 1 << 16), np.float32, sharding=sharding.replicated(mesh))
try:
  jax.jit(lambda x: (x @ x.T).sum()).lower(x).compile()
except jax.errors.JaxRuntimeError as e:
  print(len(devices), str(e).replace(chr(10), ' '))
"""
  devices, _, said = beside_libtpu.printed(script).partition(' ')
  assert int(devices) == chips
  limit = topology.parse(name).chip.memory / topology.GIB
  assert f'exceeds available HBM ({limit:.2f}G)' in said, said[:500]


_SCANNED = dict(model=dict(num_layers=6, width=128, num_heads=2, mlp_dim=256), moe=dict(router='dense'))


def _small(changes):
  """configs/small.py with fields changed: section → field → value."""
  c = runpy.run_path(str(_ROOT / 'configs/small.py'))['get_config']()
  for section, fields in changes.items():
    c[section].update(fields)
  return c


def _typed(changes) -> list[str]:
  """The same on the command line."""
  return [f'--config.{section}.{name}={value}' for section, fields in changes.items() for name, value in fields.items()]


def _preflight(folder, topology_name: str, *arguments: str) -> dict:
  """What the command finds out about configs/small.py."""
  done = beside_libtpu.run('launch/preflight.py', '--config=configs/small.py', f'--topology={topology_name}', '--nosearch',
                           f'--output={folder}/found.json', *arguments)
  assert done.returncode == 0, done.stderr
  return json.loads((folder / 'found.json').read_text())


@pytest.mark.nightly
def test_libtpu_evaluates_a_token_model_with_as_many_rows_as_are_chosen():
  """Two of eight experts for every token, although training has a capacity."""
  pytest.importorskip('libtpu')
  script = """
from uni_moe_jax.tools.preflight import topology
where = topology.parse('v5e:2x2')
topology.prepare_environment(where)
from tests.tools.preflight import compiled_programs_test
from uni_moe_jax.tools.bench import flops
from uni_moe_jax.tools.preflight import compiled_programs, preflight
config = compiled_programs_test._small(dict(
    model=dict(num_layers=4, width=128, num_heads=2, mlp_dim=256, image_size=128), moe=dict(router='token', num_experts=8, capacity_factor=1.25)))
config.tasks.digit.batch_size = 64
prepared = compiled_programs.prepare(preflight.for_tpu(config), topology.devices(where))
spec, found = prepared.spec.model.spec, compiled_programs.evaluation(prepared)
print(found.cost.flops / (64 // 4 * flops.sequence(spec, spec.patches + 1, visual=True)), found.cost.unknown_kernels)
"""
  ratio, unknown = map(float, beside_libtpu.printed(script).split())
  assert 1.6 < ratio < 2 and unknown == 0  # of a dense model; every expert for every token would be more than six times as much


@pytest.mark.slow
def test_libtpu_compiles_the_step_for_devices_that_are_not_there(tmp_path):
  pytest.importorskip('libtpu')
  found = _preflight(tmp_path, 'v5e:2x2', *_typed(_SCANNED))
  assert found['fits'] and found['devices'] == 4
  step = found['programs'][0]
  assert step['roofline']['bound'] in ('compute', 'memory', 'interconnect')
  assert step['unknown_loops'] == 0
  # A device has two of eight pictures of 32 pixels, and three of ten names. Five of six layers are scanned.
  spec = compiled_programs.prepare(_small(_SCANNED), jax.devices()[:4]).spec.model.spec
  formula = flops.TRAIN * (2 * flops.sequence(spec, 4 + 1, visual=True) + 3 * flops.sequence(spec, 8 + 1, visual=False))
  assert step['flops_per_device'] == pytest.approx(formula, rel=0.1)
