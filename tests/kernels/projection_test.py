"""Products of layers: methods for CPUs, rounded operands where the processor multiplies bfloat16, and training."""

import contextlib
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model, tiny
from uni_moe_jax.eval import predictor
from uni_moe_jax.kernels import projection
from uni_moe_jax.train import run as train_run

SHAPES = [((2, 4, 6), (6, 3, 2, 5)), ((2, 4, 3, 5), (3, 5, 6)), ((2, 4, 6), (6, 5)), ((2, 4, 5), (5, 6))]


def _normal(seed, shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _rounded(x):
  return x.astype(jnp.bfloat16).astype(jnp.float32)


def _product(x, kernel):
  return jnp.tensordot(x, kernel, x.ndim - 2)


def test_projection_by_hand():
  # Token (1, 2): (1·1 + 2·10 + .5, 1·3 + 2·30).
  y = projection.project(jnp.array([[[1., 2.]]]), jnp.array([[1., 3.], [10., 30.]]), jnp.array([.5, 0.]))
  np.testing.assert_allclose(y, [[[21.5, 63.]]])


@pytest.mark.parametrize('x, kernel, bias, product', [
    ((2, 4, 6), (6, 3, 2, 5), (3, 2, 5), 'bsd,dqnh->bsqnh'), ((2, 4, 3, 5), (3, 5, 6), (6,), 'bsnh,nhd->bsd')])
def test_one_axis_becomes_three_and_two_become_one(x, kernel, bias, product):
  x, kernel, bias = _normal(0, x), _normal(1, kernel), _normal(2, bias)
  expected = np.einsum(product, x, kernel) + np.asarray(bias)
  np.testing.assert_allclose(projection.project(x, kernel, bias), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('method', [projection.PLAIN, projection.CPU])
@pytest.mark.parametrize('x, kernel', SHAPES)
def test_a_product_has_the_same_gradients_by_every_method(x, kernel, method):
  x, kernel = _normal(0, x), _normal(1, kernel)
  bias = jnp.zeros(_product(x, kernel).shape[2:])
  expected = jax.grad(lambda *args: jnp.sin(_product(*args)).sum(), (0, 1))(x, kernel)
  grads = jax.grad(lambda *args: jnp.sin(projection.project(*args, bias, None, method)).sum(), (0, 1))(x, kernel)
  for a, b in zip(grads, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('inputs, outputs', [(32, 16), (16, 32)])
def test_the_gradient_of_a_kernel_transposes_the_narrower_side(inputs, outputs):
  x, kernel = _normal(0, (2, 64, inputs)), _normal(1, (inputs, outputs))
  loss = lambda kernel: jnp.sin(projection.dot(x, kernel, method=projection.CPU)).sum()
  text = jax.jit(jax.grad(loss)).lower(kernel).compile().as_text()
  results = re.findall(r'= f32\[([\d,]+)\]\S* dot\(', text)
  assert '16,32' in results and '32,16' not in results


@pytest.mark.parametrize('x, kernel', SHAPES)
def test_operands_are_rounded_and_sums_are_not(x, kernel):
  x, kernel = _normal(0, x), _normal(1, kernel)
  dy = _normal(2, _product(x, kernel).shape)
  y, pull = jax.vjp(lambda x, w: projection.project(x, w, jnp.zeros(dy.shape[2:]), None, projection.ROUNDED), x, kernel)
  expected, pull_expected = jax.vjp(_product, _rounded(x), _rounded(kernel))
  for a, b in zip((y, *pull(dy)), (expected, *pull_expected(_rounded(dy))), strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  assert float(jnp.abs(y - _product(x, kernel)).max()) > 1e-3  # so rounding would be seen


def test_rounding_and_a_float32_sum_by_hand():
  # 1 + 2⁻⁹ is rounded to 1. The sum 256 + 1, which bfloat16 would round to 256, is not.
  assert projection.matmul_rounded(jnp.array([[1 + 2**-9]]), jnp.ones((1, 1))).tolist() == [[1.]]
  x, y = jnp.array([[256., 1.], [0., 3.]]), jnp.array([[1.], [1.]])
  assert projection.matmul_rounded(x, y).tolist() == [[257.], [3.]]
  assert projection.transposed_matmul_rounded(x, y).tolist() == [[256.], [4.]]


@contextlib.contextmanager
def _processor(flags: str | None, folder):
  """This machine with a processor of these flags; None: a system without /proc/cpuinfo."""
  cpuinfo = folder / 'cpuinfo'
  if flags is not None:
    cpuinfo.write_text(f'model name\t: a processor\nflags\t\t: {flags}\n')
  uncached = projection.processor_flags.__wrapped__
  with mock.patch.object(projection, 'CPUINFO', cpuinfo), mock.patch.object(projection, 'processor_flags', uncached):
    yield


@pytest.mark.parametrize('flags, multiplies', [
    ('fpu amx_bf16 avx2', True), ('fpu avx512_bf16', True), ('fpu avx512f avx_vnni', False), (None, False)])
def test_processors_that_multiply_bfloat16(flags, multiplies, tmp_path):
  with _processor(flags, tmp_path):
    assert projection.multiplies_bfloat16() == multiplies


@pytest.mark.parametrize('wanted, multiplies, cpus, method', [
    (True, True, 1, projection.ROUNDED), (False, True, 1, projection.CPU), (True, False, 1, projection.CPU),
    (True, True, 2, projection.PLAIN)])
def test_the_method_of_a_mesh(wanted, multiplies, cpus, method):
  mesh = jax.make_mesh((cpus,), ('data',), devices=jax.devices()[:cpus])
  with mock.patch.object(projection, 'multiplies_bfloat16', lambda: multiplies):
    assert projection.choose(mesh, wanted) == method


@functools.cache
def _run(router: str, cpu_bfloat16: bool) -> train_run.Run:
  c = tiny.config('shape', data_dir=tiny.data_dir())
  c.model.num_layers, c.moe.router, c.train.cpu_bfloat16 = 1, router, cpu_bfloat16
  return train_run.build(c, jax.devices()[:1])


def _arguments(run: train_run.Run):
  [(_, batch)] = run.mixture().iterate(0, 1)
  return run.init(), run.put_batch(batch), run.target_sets()


@pytest.mark.nightly
@pytest.mark.parametrize('router', ['attribute', pytest.param('token', marks=pytest.mark.nightly)])
def test_training_takes_the_step_of_float32_up_to_rounding(router):
  losses = []
  for cpu_bfloat16 in (False, True):
    run = _run(router, cpu_bfloat16)
    with mock.patch.object(projection, 'multiplies_bfloat16', lambda: True):
      losses.append(float(run.step_fn()(*_arguments(run))[1]['loss/total']))
  assert 0 < abs(losses[1] - losses[0]) < .01 * losses[0]


@pytest.mark.parametrize('multiplies', [True, False])
def test_a_processor_that_does_not_multiply_bfloat16_multiplies_float32(multiplies):
  run = _run('attribute', True)
  with mock.patch.object(projection, 'multiplies_bfloat16', lambda: multiplies):
    text = run.step_fn().lower(*_arguments(run)).as_text()
  assert ('bf16' in text) == multiplies


def test_evaluation_multiplies_float32():
  run = _run('attribute', True)
  sequence = small_model.sequence('image_classification')
  with mock.patch.object(projection, 'multiplies_bfloat16', lambda: True):
    assert 'bf16' not in predictor.encode.lower(run.spec.model, run.init().params, sequence).as_text()


@pytest.mark.skipif(not projection.multiplies_bfloat16(), reason='this processor does not multiply bfloat16')
def test_products_of_training_run_in_the_library_that_multiplies_bfloat16():
  x, kernel, dy = jnp.ones((2, 64, 32)), jnp.ones((32, 128)), jnp.ones((2, 64, 128))
  pull = lambda x, kernel, dy: jax.vjp(lambda *args: projection.dot(*args, method=projection.ROUNDED), x, kernel)[1](dy)
  for function, arguments, count in ((pull, (x, kernel, dy), 2), (projection.matmul_rounded, (x, kernel), 1)):
    text = jax.jit(function).lower(*arguments).compile().as_text()
    in_library = [line for line in text.splitlines() if ' dot(' in line]
    assert len(in_library) == count and text.count('__ynn_fusion') >= count
    operands = re.findall(r'%(?:param_\d[\w.]*) = (bf16|f32)\[', text)
    assert operands.count('bf16') >= 2 * count
