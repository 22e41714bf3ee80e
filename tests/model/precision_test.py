"""Which products a TPU and a GPU may not round, read from programs that are lowered for them; no device is needed."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from tests.helpers.jaxprs import equations
from uni_moe_jax.eval import predictor
from uni_moe_jax.kernels import gmm
from uni_moe_jax.kernels.gmm import tiled as gmm_tiled
from uni_moe_jax.model import decoding, heads, merging
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.moe import precision, routers
from uni_moe_jax.tasks import task_types

_PLATFORMS = 'tpu', 'cuda'


@functools.cache
def _products(traced, platform: str) -> list[tuple[str, bool]]:
  """(type of the left operand, whether it is exact) of every product of a program lowered for a platform.

  A product of bfloat16 whose result is float32 is transposed to one that rounds by its own `algorithm`.
  """
  lines = [line for line in traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
           if 'stablehlo.dot_general' in line and 'algorithm =' not in line]
  return [(re.search(r': \(tensor<[\dx]*(\w+)>', line)[1], 'precision = [HIGHEST, HIGHEST]' in line) for line in lines]


@functools.cache
def _traced_step(router: str, dtype):
  """The gradient of similarities and linear logits of captions, texts and images, routed by the router."""
  spec = small_model.spec(router, dtype=dtype, head=3, noise_std=1.)
  sequences = [small_model.sequence(t) for t in ('image_caption', 'image_classification', 'text_mlm')]
  model = UniPerceiver(spec)

  def loss(values, targets, key):
    features, collected = small_model.encode(spec, sequences, values=values, key=key)
    usages = [x for block in collected['tail'] for x in block['router_stats'].values()]
    auxiliary = sum(jnp.sum(x.importance if routers.routes_tokens(router) else x.entropy) for x in usages)
    logits = [heads.logits(f, targets, 10.) for f in features]
    own = model.apply({'params': values}, features[1], logits[1], method='with_head')
    return sum(jnp.sin(x).sum() for x in (*logits, own)) + auxiliary

  return jax.jit(jax.grad(loss)).trace(small_model.params(spec), jnp.ones((3, spec.width)), jax.random.key(0))


@pytest.mark.parametrize('router', ['attribute', pytest.param('context', marks=pytest.mark.nightly)])
def test_every_float32_product_of_a_bfloat16_step_is_exact(router):
  traced = _traced_step(router, jnp.bfloat16)
  for platform in _PLATFORMS:
    products = _products(traced, platform)
    assert set(products) == {('bf16', False), ('f32', True)}
    assert products.count(('f32', True)) > 15  # gates, merges or biases, heads, similarities; forward and backward


def test_a_float32_step_leaves_the_products_of_layers_to_the_platform():
  exact, rounded = _products(_traced_step('attribute', jnp.bfloat16), 'tpu'), _products(
      _traced_step('attribute', jnp.float32), 'tpu')
  assert set(rounded) == {('f32', True), ('f32', False)}
  assert rounded.count(('f32', True)) == exact.count(('f32', True))


@pytest.mark.parametrize('router', ['attribute', 'token'])
def test_evaluation_of_a_float32_model_multiplies_everything_in_float32(router):
  model, words = UniPerceiver(small_model.spec(router)), jnp.ones((small_model.VOCABULARY, 16))
  values, image = small_model.params(model.spec), small_model.sequence('image_classification')
  options = tuple(dict(temperature='group', spe=0, eot=1, max_len=3, beam_size=2, length_penalty=0.).items())
  decoder = decoding.Decoder.of(model, values, task_types.TASK_TYPES['image_caption'])
  traced = [
      predictor.encode.trace(model, values, image),
      predictor._log_p.trace(model, values, jnp.ones((2, 1, 16)), words, 'group', False, True),
      predictor._captions.trace(options, decoder, image.pixels, words)]
  for program in traced:
    assert set(_products(program, 'tpu')) == {('f32', True)}


def test_experts_are_merged_exactly_at_export():
  spec = small_model.spec('attribute')
  conditions = task_types.TASK_TYPES['image_classification'].conditions
  merge = lambda params: merging.merge_params(spec, params, routers.distinct_inputs(spec.router, conditions))
  for platform in _PLATFORMS:
    assert set(_products(jax.jit(merge).trace(small_model.params(spec)), platform)) == {('f32', True)}


def test_a_product_of_the_platforms_precision_is_found():
  for traced, expected in ((jax.jit(jnp.matmul).trace(jnp.ones((2, 3)), jnp.ones((3, 2))), ('f32', False)),
                           (jax.jit(heads.logits).trace(jnp.ones((2, 3)), jnp.ones((4, 3)), 1.), ('f32', True))):
    for platform in _PLATFORMS:
      assert _products(traced, platform) == [expected]


def _precisions(jaxpr) -> set:
  """Precisions of all products of a traced program."""
  return {e.params['precision'] for e in equations(jaxpr) if e.primitive.name == 'dot_general'}


def _tiled(x, kernel, sizes):
  tokens = jnp.arange(gmm.num_rows('tiled', len(x))) % len(x)
  return gmm_tiled.routed_matmul(x, kernel, jnp.ones(tokens.shape), jnp.zeros(x.shape), tokens, sizes)


@pytest.mark.parametrize('run', [
    *(functools.partial(gmm.grouped_matmul, backend=b) for b in ('megablox', 'triton')), _tiled],
    ids=['megablox', 'triton', 'tiled'])
def test_kernels_of_grouped_products_evaluate_in_float32(run):
  def traced(dtype):
    with precision.of_evaluation(dtype):
      operands = jnp.ones((128, 128), dtype), jnp.ones((2, 128, 128), dtype), jnp.array([64, 64])
      return _precisions(jax.make_jaxpr(run)(*operands).jaxpr)
  assert traced(jnp.float32) == {(precision.EXACT, precision.EXACT)}
  assert (precision.EXACT, precision.EXACT) not in traced(jnp.bfloat16)  # which TPU kernels refuse


def test_why_one_rounded_pass_moves_similarities_and_choices():
  """A TPU's default: operands are rounded to bfloat16, their products are not."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  rounded = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
  left, right = heads.normalize(normal(500, 384)), heads.normalize(normal(500, 384))
  exact = heads.logits(left, right, 100.)
  assert .01 < jnp.abs(100 * rounded(left) @ rounded(right).T - exact).max() < .1
  tokens, gate = normal(4000, 384), normal(384, 8) * .07
  chosen, of_rounded = (np.sort(routers.keep_top_k(h @ w, 2)[0]) for h, w in (
      (tokens, gate), (rounded(tokens), rounded(gate))))
  assert .0005 < np.any(chosen != of_rounded, axis=1).mean() < .01
