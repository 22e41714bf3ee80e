"""Programs of a small run on two virtual devices: memory, FLOPs and traffic by hand and by formula. Their compiler."""

import dataclasses
import functools
import json
import math
import runpy
import time
from unittest import mock

import jax
import pytest

from tests.helpers import flops_formula, processes, tiny
from tests.helpers.processes import ROOT
from uni_moe_jax import config
from uni_moe_jax.model.flops import TRAIN
from uni_moe_jax.preflight import compiled_programs, findings, preflight, remedies, topology
from uni_moe_jax.preflight.compiled_programs import EVALUATION, Compiler, Program

_TOKENS = (tiny.IMAGE_SIZE // 8) ** 2 + 1  # of an image, with its prefix


def _config():
  """Images against three names, a dense model without remat."""
  c = tiny.config('shape')
  c.model.update(dict(num_layers=4, width=32, mlp_dim=64))
  c.moe.router = 'dense'
  c.target_sets.shapes = config.target_set(('a', 'b', 'c'), family='names', max_len=8)
  c.tasks.shape.batch_size = 32
  c.data.dir = '/nowhere'  # no data is read
  return c


def _preflight(c, memory: float | None = None, search: bool = True) -> findings.Findings:
  target = topology.parse('cpu:2')
  return preflight.preflight(c, 'tiny', target, memory, search, lambda _: None, math.inf, time.monotonic())


@functools.cache
def _findings() -> findings.Findings:
  return _preflight(_config(), search=False)


def _step() -> Program:
  return _findings().programs[0]


@pytest.mark.nightly
def test_every_device_has_all_parameters_and_two_moments_of_each():
  total = _findings().parameters['total']
  assert _step().memory.params == 4 * total
  # Two moments, and a few counters.
  assert 0 <= _step().memory.optimizer - 8 * total < 100
  assert _step().memory.temporaries > 4 * total  # gradients at least
  assert _findings().parameters['active'] == total


def test_flops_are_those_of_the_formula():
  spec = compiled_programs.prepare(_config(), jax.devices()[:2]).spec.model.spec
  # A device has half of the 32 images, and two of the three names.
  images, names = flops_formula.sequence(spec, _TOKENS, visual=True), flops_formula.sequence(spec, 8 + 1, visual=False)
  formula = TRAIN * (16 * images + 2 * names)
  assert _step().cost.flops == pytest.approx(formula, rel=0.1)
  assert _step().cost.unknown_loops == 0


def test_gradients_are_reduced_once_for_each_array():
  payload = _step().cost.payload['all-reduce']
  total = 4 * _findings().parameters['total']
  # On CPU the gradient of each product with a kernel is reduced separately: most kernels multiply images and names.
  assert total < payload < 2.1 * total
  assert _step().cost.sent['all-reduce'] == payload  # of two devices each sends half, twice
  # Features of the names are gathered, and little else.
  assert set(_step().cost.calls) == {'all-reduce', 'all-gather'}
  assert _step().cost.payload['all-gather'] < 0.1 * payload


def test_evaluation_encodes_a_batch_and_needs_no_optimizer():
  [_, evaluation] = _findings().programs
  assert (evaluation.name, evaluation.examples) == ('evaluation, image_classification', 32)
  assert evaluation.memory.optimizer == 0
  assert evaluation.cost.flops < _step().cost.flops


@pytest.mark.parametrize('entries, words, steps', [
    (5, dict(), ['shape', 'other']),  # names: 8 · 5 + 3 · 9 = 67 tokens, or 4 · 5 + 9 · entries: 65
    (6, dict(), ['many', 'other']),  # 74; words: 2 · 17 + 32 · 3 = 130, or 17 + 3 · V: 137
    (6, dict(softmax='sampled', num_sampled=37), ['many', 'text'])])  # 17 + 3 · 37 = 128
def test_of_a_task_type_the_step_with_most_tokens_is_compiled_those_of_its_target_set_included(entries, words, steps):
  c = tiny.config('shape', 'text')
  c.train.mixture, c.tasks.text.batch_size = 'one_task', 2
  c.target_sets.many = config.target_set('glyphs/class', family='names')
  c.preflight.target_lengths.update(dict(shapes=((8, 3),), many=((8, entries),)))
  c.tasks.many = config.task('image_classification', 'glyphs', batch_size=4, target_set='many', label_column='class')
  c.target_sets.all_words = config.target_set('vocabulary', family='words', **words)
  c.tasks.other = config.task(
      'text_mlm', 'paragraphs', batch_size=1, target_set='all_words', max_len=16, max_predictions=3)
  run = compiled_programs.prepare(c, jax.devices()[:1])
  assert set(compiled_programs.training_steps(run)) == set(steps)


def test_during_training_evaluation_needs_the_whole_state_of_training_besides():
  def evaluation_memory(evaluate_every, largest=''):
    c = _config()
    c.model.num_layers = 1
    c.evaluators.shape = config.evaluator('classification', 'shape', split='val', during_training=True)
    if largest:
      c.evaluators[largest] = config.evaluator('classification', 'shape', split='val', batch_size=512)
    c.train.update(dict(evaluate_every=evaluate_every, log_every=1, ema_decay=0.9))
    run = compiled_programs.prepare(c, jax.devices()[:1])
    return compiled_programs.compile_program(run, EVALUATION).memory, run.parameter_counts()['total']

  (after, _), (during, total) = evaluation_memory(0), evaluation_memory(1)
  state = during.total - after.total
  assert state == during.optimizer and after.optimizer == 0
  # The largest evaluation alone is compiled; one that follows training has no such state beside it.
  assert evaluation_memory(1, largest='after training')[0].optimizer == 0
  assert 0 <= state - 3 * 4 * total < 100  # two moments and an average of every parameter, and a few counters


def test_the_evaluated_sequence_is_the_one_with_most_tokens():
  def evaluated(c):
    name, examples, sequence = compiled_programs.evaluated(compiled_programs.prepare(c, jax.devices()[:2]))
    is_set = name.startswith('target set')
    for x in jax.tree.leaves(sequence):  # a batch is split over two devices; texts are on both
      assert x.sharding.shard_shape(x.shape) == ((x.shape[0] // 2, *x.shape[1:]) if x.shape and not is_set else x.shape)
    return name, examples, (sequence.text if sequence.pixels is None else sequence.pixels).shape
  c = _config()
  assert evaluated(c) == ('image_classification', 32, (32, 1, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 1))
  c.evaluators.shape = config.evaluator('classification', 'shape', split='test', batch_size=7)
  assert evaluated(c) == ('image_classification', 8, (8, 1, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 1))  # on two shards
  del c.evaluators.shape
  # 32 images have 160 tokens; 50 names of 3 tokens have fewer, 300 of 8 more.
  c.target_sets.shapes = config.target_set('glyphs/class', family='names', max_len=8)
  c.preflight.target_lengths.shapes = ((3, 50), (8, 300))
  assert evaluated(c) == ('target set shapes', 300, (300, 8))
  # A vocabulary is encoded in parts of at most 4,096 words.
  c = tiny.config('text')
  c.tokenizer.vocab_size = 9_000
  assert evaluated(c) == ('target set words', 3_000, (3_000, 2))


def test_the_report_has_every_figure():
  text = findings.render(_findings())
  assert text.startswith('tiny on cpu:2: 2 devices (data 2)\nparameters: ')
  assert 'assumptions: shapes 3 entries' in text
  assert 'train step: 32 examples per call' in text
  assert 'all-reduce: ' in text and 'roofline' not in text  # the peaks of a CPU are unknown
  result = json.loads(json.dumps(findings.as_json(_findings())))
  [step, _] = result['programs']
  assert result['fits'] is None
  assert step['flops'] == 2 * _step().cost.flops and step['flops_per_example'] == step['flops'] / 32
  assert step['bytes'] == pytest.approx(sum(step['memory'].values()))
  assert len(step['largest_traffic']) == 10 and '  what moves most, of a device:\n' in text
  label, moved = step['largest_traffic'][0]
  assert 0 < moved < step['memory_traffic'] and f'%) {label}\n' in text
  assert result['seconds'] > sum(p['compile_seconds'] for p in result['programs'])
  assert text.endswith(f'\nPreflight took {result["seconds"]:.0f} s.')


def test_the_report_for_a_chip_has_times_and_a_verdict():
  chip = dataclasses.replace(_findings(), topology=topology.parse('v5e:2x2'), memory=_step().memory.total - 1)
  text = findings.render(chip)
  assert 'DOES NOT FIT' in text and 'roofline: ' in text and 'bound by ' in text
  assert findings.as_json(chip)['fits'] is False
  fitting = dataclasses.replace(chip, memory=_step().memory.total)
  assert findings.as_json(fitting)['programs'][0]['fits'] is True


_FLAG, _COST = '--config.model.remat=True', 'a third more work'


@pytest.mark.parametrize('trial, line', [
    (dict(needs=2.0**30), f'{_FLAG}: 1.00 GiB, fits ({_COST})\nChange this: {_FLAG}\n'),
    (dict(needs=None, too_large='evaluation, mlm'),
     f'{_FLAG}: unknown bytes, evaluation, mlm does not fit ({_COST})\nNo trial fits: use more devices.\n')])
def test_the_report_names_the_change(trial, line):
  trials = (remedies.Trial((remedies.Change({'model.remat': True}, _COST),), **trial),)
  assert line in findings.render(dataclasses.replace(_findings(), memory=1.0, trials=trials))


def test_the_report_has_the_largest_batch():
  estimate = findings.BatchEstimate(24.4, ((12, 2.0**30), (24, 2.0**31)))
  line = 'largest batch per device: about 24 examples, by a straight line through 12 (1.00 GiB) and 24 (2.00 GiB)\n'
  assert line in findings.render(dataclasses.replace(_findings(), largest_batch=estimate))


def test_mixed_images_have_two_classes_and_videos_the_frames_of_their_task():
  c = tiny.config('shape', 'motion')
  c.preflight.target_lengths.update(dict(shapes=((4, 3),), motions=((4, 2),)))
  c.tasks.shape.mixup_alpha, c.tasks.motion.num_frames = 0.8, 3
  c.tasks.shape.batch_size = c.tasks.motion.batch_size = 8
  run = compiled_programs.prepare(c, jax.devices()[:2])
  batch = compiled_programs.batch_shapes(run, run.plan.tasks)
  assert batch['image_classification']['label'].shape == batch['image_classification']['weight'].shape == (2, 4, 2)
  assert batch['video_classification']['label'].shape == (2, 4, 1)
  assert batch['video_classification']['pixels'].shape == (2, 4, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 1)


@pytest.mark.parametrize('router, capacity_factor, gmm, expected', [
    ('token', 1.25, 'auto', 'xla'), ('context', 0.0, 'megablox', 'xla'), ('token', 1.25, 'tiled', 'tiled'),
    ('token', 0.0, 'tokamax', 'xla'),
    ('attribute', 0.0, 'auto', 'auto')])
def test_xlas_products_replace_the_tpu_kernel(router, capacity_factor, gmm, expected):
  """With a capacity or without one: training and evaluation differ in that."""
  c = _config()
  c.moe.update(dict(router=router, capacity_factor=capacity_factor, gmm=gmm))
  assert preflight.for_tpu(c).moe.gmm == expected
  assert c.moe.gmm == gmm  # the result is a copy


def test_a_run_that_starts_from_another_is_refused():
  c = _config()
  c.train.init = 'runs/other'
  with pytest.raises(ValueError, match='config.train.init=.runs/other.: preflight cannot start from another run'):
    _preflight(c)


@pytest.mark.nightly
def test_the_search_finds_a_change_and_estimates_a_larger_batch():
  memory = 3 * _step().memory.total
  result = _preflight(_config(), memory)
  assert result.largest_batch.examples > 32 and len(result.largest_batch.compiled) == 2
  memory = 0.9 * _step().memory.total
  result = _preflight(_config(), memory)
  assert result.trials[-1].fits and result.trials[-1].needs <= memory
  assert result.largest_batch.examples < 16


@pytest.mark.nightly
def test_a_smaller_batch_is_suggested_for_an_evaluation_that_does_not_fit():
  c = _config()
  c.tasks.shape.batch_size = 2
  c.evaluators.shape = config.evaluator('classification', 'shape', split='test', batch_size=4096)
  step, evaluation = (p.memory.total for p in _preflight(c, search=False).programs)
  assert step < 0.9 * evaluation
  result = _preflight(c, 0.9 * evaluation)
  assert result.trials[-1].fits and result.trials[-1].flags == '--config.evaluators.shape.batch_size=2048'


@pytest.fixture
def compile_program():
  """A step takes 40 seconds, evaluation 5."""
  fake = mock.Mock(side_effect=lambda run, which, _: Program('', 8, None, None, None, 5 if which == EVALUATION else 40))
  with mock.patch.multiple(compiled_programs, prepare=mock.DEFAULT, compile_program=fake):
    yield fake


@pytest.fixture
def compiler(compile_program):
  """With a minute left, after a step and an evaluation."""
  made = Compiler(None, (), lambda _: None, time.monotonic() + 60)
  made.program(config.base(), None)
  made.program(config.base(), EVALUATION)
  return made


def test_there_is_time_for_a_step_and_an_evaluation_but_not_for_two_steps_even_if_the_last_compile_was_short(compiler):
  assert compiler.has_time([None, EVALUATION])
  assert not compiler.out_of_time
  assert not compiler.has_time([None, None])
  assert compiler.out_of_time
  assert not compiler.has_time([EVALUATION])  # the search is over


def test_a_program_is_compiled_once_and_a_step_does_not_depend_on_evaluators(compiler, compile_program):
  c = config.base()
  c.evaluators.shape = config.evaluator('classification', 'shape', split='test')
  compiler.program(c, None)
  assert compile_program.call_count == 2
  compiler.program(c, EVALUATION)
  assert compile_program.call_count == 3
  c.model.width *= 2
  compiler.program(c, None)
  assert compile_program.call_count == 4


def test_each_compile_is_reported(compile_program):
  messages = []
  compiler = Compiler(None, (), messages.append, 0.0)
  for which in (None, 'coco', EVALUATION):
    compiler.program(config.base(), which, ', with a change')
  assert messages == [
      f'compiling {name}, with a change' for name in ('the training step', 'the training step of coco', 'evaluation')]


@pytest.mark.parametrize('name', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])
def test_libtpu_has_one_device_per_chip_with_the_tabulated_memory(name):
  """libtpu reports the memory if a program is too large."""
  pytest.importorskip('libtpu')
  script = """
import jax, numpy as np
from uni_moe_jax.parallel import sharding
devices = topology.devices(target)
mesh = sharding.make_mesh(sharding.mesh_shape(dict(replica=1, data=-1, expert=1, model=1), len(devices)), devices)
x = jax.ShapeDtypeStruct((1 << 20, 1 << 16), np.float32, sharding=sharding.replicated(mesh))
try:
  jax.jit(lambda x: (x @ x.T).sum()).lower(x).compile()
except jax.errors.JaxRuntimeError as e:
  print(len(devices), str(e).replace(chr(10), ' '))
"""
  devices, _, message = processes.printed(script, name).partition(' ')
  assert int(devices) == 4
  limit = topology.parse(name).chip.memory / topology.GIB
  assert f'exceeds available HBM ({limit:.2f}G)' in message, message[:500]


def small_config(fields):
  """configs/small.py with changed fields, by dotted name."""
  c = runpy.run_path(str(ROOT / 'configs/small.py'))['get_config']()
  c.update_from_flattened_dict(fields)
  return c


@pytest.mark.nightly
def test_libtpu_evaluates_a_token_model_on_the_selected_experts_alone():
  """Two of eight experts for every token, although training has a capacity."""
  pytest.importorskip('libtpu')
  script = """
import dataclasses
from tests.helpers import flops_formula
from tests.preflight import compiled_programs_test
from uni_moe_jax.preflight import preflight
from uni_moe_jax.preflight import compiled_programs
config = compiled_programs_test.small_config({
    'model.num_layers': 4, 'model.width': 128, 'model.num_heads': 2, 'model.mlp_dim': 256, 'model.image_size': 128,
    'moe.router': 'token', 'moe.num_experts': 8, 'moe.capacity_factor': 1.25, 'tasks.digit.batch_size': 64})
run = compiled_programs.prepare(preflight.for_tpu(config), topology.devices(target))
spec, program = run.spec.model.spec, compiled_programs.compile_program(run, compiled_programs.EVALUATION)
dense = dataclasses.replace(spec, router='dense')
formula = 64 // 4 * flops_formula.sequence(dense, spec.patches + 1, visual=True)
print(program.cost.flops / formula, program.cost.unknown_kernels)
"""
  ratio, unknown = map(float, processes.printed(script, 'v5e:2x2').split())
  assert 1.6 < ratio < 2 and unknown == 0  # of a dense model; every expert for every token would be more than six times


@pytest.mark.nightly
def test_libtpu_compiles_the_step_for_absent_devices(tmp_path):
  pytest.importorskip('libtpu')
  model = {'num_layers': 6, 'width': 128, 'num_heads': 2, 'mlp_dim': 256}
  fields = {'moe.router': 'dense', **{f'model.{name}': value for name, value in model.items()}}
  process = processes.python(
      'launch/preflight.py', '--config=configs/small.py', '--topology=v5e:2x2', '--nosearch',
      f'--output={tmp_path}/preflight.json', *(f'--config.{name}={value}' for name, value in fields.items()))
  assert process.returncode == 0, process.stderr
  result = json.loads((tmp_path / 'preflight.json').read_text())
  assert result['fits'] and result['devices'] == 4
  step = result['programs'][0]
  assert step['roofline']['bound'] in ('compute', 'memory', 'interconnect')
  assert step['unknown_loops'] == 0
  # A device has two of eight images of 32 pixels, and three of ten names. Five of six layers are scanned.
  spec = compiled_programs.prepare(small_config(fields), jax.devices()[:4]).spec.model.spec
  images, names = flops_formula.sequence(spec, 4 + 1, visual=True), flops_formula.sequence(spec, 8 + 1, visual=False)
  formula = TRAIN * (2 * images + 3 * names)
  assert step['flops_per_device'] == pytest.approx(formula, rel=0.1)
