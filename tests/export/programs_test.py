"""Programs of every readout, and of models with routers by token, equal the model at any batch size."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.export import programs
from uni_moe_jax.export.programs import ExportedTask
from uni_moe_jax.kernels import gmm
from uni_moe_jax.model import decoding, heads
from uni_moe_jax.model.sequences import InputSequence
from uni_moe_jax.model.uni_perceiver import UniPerceiver, param_shapes
from uni_moe_jax.utils.tree_paths import by_path

_RNG = np.random.default_rng(0)


def _task(task_type: str, head: bool = False) -> TaskSpec:
  return small_model.task_spec(task_type, target_set='set', linear_head=head)


def _pixels(batch: int) -> np.ndarray:
  return np.random.default_rng(batch).integers(0, 256, (batch, 1, 8, 8, 1), dtype=np.uint8)


def _program(spec, task: ExportedTask, name: str):
  """Inputs → outputs of a program after serialization."""
  params = by_path(small_model.params(spec))
  program = programs.programs(UniPerceiver(spec), task, small_model.SPE, small_model.EOT)[name]
  exported = jax.export.deserialize(program.lowered(params).serialize())
  assert exported.platforms == ('cpu', 'cuda', 'tpu')
  call = small_model.jit(exported.call)
  return lambda **x: jax.device_get(call(params, x))


@pytest.mark.parametrize('task_type, head', [('text_mlm', False), ('vqa', True)])
def test_classify_equals_the_model(task_type, head):
  spec = small_model.spec('dense', head=5 if head else 0)
  task, V = _task(task_type, head), 5 if head else small_model.VOCABULARY
  fields = {'pixels': _pixels(3)} if task.type.visual else {}
  fields |= {'text': _RNG.integers(2, small_model.VOCABULARY, (3, 4)).astype(np.int32),
             'text_valid': np.ones((3, 4), bool),
             'position': _RNG.integers(0, 4, (3, 1 if head else 2)).astype(np.int32)}
  targets = _RNG.normal(size=(V, 16)).astype(np.float32)
  log_p = _program(spec, ExportedTask(task, 1, V), 'classify')(**fields, targets=targets)['log_p']

  @small_model.jit
  def expected(values, fields, targets):
    def run(m):
      sequence = InputSequence.of_inputs(task.type, {**fields, 'id': jnp.zeros(3, jnp.uint32)})
      features = m.features(m.encode(sequence).hidden)
      logits = heads.logits(features, targets, m.scale('group'))
      return jax.nn.log_softmax(m.with_head(features, logits) if head else logits)
    return UniPerceiver(spec).apply({'params': values}, method=run)

  want = np.asarray(expected(small_model.params(spec), fields, targets))
  assert log_p.shape == ((3, V) if head else (3, 2, V))
  np.testing.assert_allclose(log_p, want[:, 0] if head else want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype, name, products', [
    # By default GPUs multiply in TF32 and TPUs in bfloat16; lowering fixes the precision of a program.
    (jnp.float32, 'classify', {('f32', True)}), (jnp.float32, 'caption', {('f32', True)}),
    (jnp.bfloat16, 'classify', {('bf16', False), ('f32', True)})])
def test_float32_products_are_full_on_every_platform(dtype, name, products):
  spec = small_model.spec('dense', dtype=jnp.dtype(dtype))
  task_type = 'image_caption' if name == 'caption' else 'image_classification'
  task = ExportedTask(_task(task_type), 1, small_model.VOCABULARY)
  program = programs.programs(UniPerceiver(spec), task, small_model.SPE, small_model.EOT)[name]
  lines = program.lowered(by_path(param_shapes(UniPerceiver(spec)))).mlir_module().splitlines()
  lines = [line for line in lines if 'stablehlo.dot_general' in line]
  assert len(lines) > 5
  assert products == {
      (re.search(r'tensor<[?\dx]*(\w+)>', line)[1], 'precision = [HIGHEST, HIGHEST]' in line) for line in lines}


def _step(router, **changes):
  spec, task = small_model.spec(router, gmm=gmm.PORTABLE, **changes), ExportedTask(_task('image_caption'), 1, 23)
  return spec, programs.programs(UniPerceiver(spec), task, small_model.SPE, small_model.EOT)['step']


@pytest.mark.parametrize('router', ['token', pytest.param('context', marks=pytest.mark.nightly)])
def test_decoding_of_routers_by_token_lowers_for_every_platform(router):
  spec, step = _step(router)
  assert step.lowered(by_path(small_model.params(spec))).platforms == programs.PLATFORMS


@pytest.mark.parametrize('platform, batched', [('cpu', False), ('cuda', True)])
def test_products_of_routers_by_token_are_batched_over_experts_but_on_cpu(platform, batched):
  spec, step = _step('token', num_layers=1)
  with mock.patch.object(programs, 'PLATFORMS', (platform,)):
    text = step.lowered(by_path(small_model.params(spec))).mlir_module()
  over_experts = re.findall(r'batching_dims = \[0\] x \[0\].*: \(tensor<4x\?x\d+xf32>, tensor<4x\d+x\d+xf32>\)', text)
  assert bool(over_experts) == batched


@pytest.mark.parametrize('router', ['token', 'context'])
def test_products_for_gpu_and_tpu_equal_those_for_cpu(router):
  spec, task = small_model.spec(router, gmm=gmm.PORTABLE, num_layers=1), _task('image_classification')
  run = programs.programs(UniPerceiver(spec), ExportedTask(task, 1, 23), 0, 1)['encode'].run
  inputs = by_path(small_model.params(spec)), {'pixels': _pixels(3)}
  on_cpu = small_model.jit(run)(*inputs)['features']
  with mock.patch.object(jax.lax, 'platform_dependent', lambda *x, cpu, default: default(*x)):
    elsewhere = small_model.jit(lambda *x: run(*x))(*inputs)['features']
  np.testing.assert_allclose(elsewhere, on_cpu, atol=1e-5)


@pytest.mark.nightly
def test_captions_of_a_context_model_equal_the_model_at_any_batch_size():
  spec, task = small_model.spec('context', gmm=gmm.PORTABLE), _task('image_caption')
  words = heads.normalize(_RNG.normal(size=(small_model.VOCABULARY, 16)).astype(np.float32))
  call = _program(spec, ExportedTask(task, 1, small_model.VOCABULARY, beam_size=2), 'caption')
  run = small_model.jit(lambda values, pixels: decoding.beam_search(
      decoding.Decoder.of(UniPerceiver(spec), values, task.type), pixels, words, temperature='group',
      spe=small_model.SPE, eot=small_model.EOT, max_len=4, beam_size=2))
  want = jax.device_get(run(small_model.params(spec), _pixels(3)))
  captions = call(pixels=_pixels(3), targets=words)
  np.testing.assert_array_equal(captions['tokens'], want.tokens[:, 0])
  np.testing.assert_allclose(captions['score'], want.scores[:, 0], rtol=1e-5)
  np.testing.assert_array_equal(call(pixels=_pixels(3)[:1], targets=words)['tokens'], captions['tokens'][:1])
