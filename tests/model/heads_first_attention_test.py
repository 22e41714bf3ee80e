"""Attention for CPUs equals XLA's, with its gradients, and is what a model on CPU runs."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.model import heads_first_attention

_B, _Q, _K, _N, _H = 3, 5, 7, 2, 8
_PADDING = (7, 4, 0)  # valid keys of each example: the last one only fills the batch


def _arrays(dtype):
  """q, k, v and the cotangent of the output."""
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(2 * rng.normal(size=(_B, n, _N, _H)), dtype) for n in (_Q, _K, _K, _Q))


def _mask(name: str) -> jax.Array | None:
  padding = (jnp.arange(_K)[None] < jnp.asarray(_PADDING)[:, None])[:, None, None]
  causal = jnp.tril(jnp.ones((_Q, _K), bool))[None, None]
  return {'none': None, 'padding': padding, 'causal': causal, 'both': padding & causal}[name]


@functools.cache
def _program(function):
  """(q, k, v, dy, mask) → output and gradients in float32."""
  @small_model.jit
  def run(q, k, v, dy, mask):
    out, backward = jax.vjp(lambda *qkv: function(*qkv, mask), q, k, v)
    assert out.dtype == q.dtype
    return jax.tree.map(lambda x: x.astype(jnp.float32), (out, *backward(dy)))
  return run


def _xla(q, k, v, mask):
  return jax.nn.dot_product_attention(q, k, v, mask=mask)


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize('mask', ['none', 'padding', 'causal', 'both'])
def test_results_and_gradients_are_those_of_xla(mask, dtype, tolerance):
  arrays = _arrays(dtype)
  results = [_program(f)(*arrays, _mask(mask)) for f in (heads_first_attention.attend, _xla)]
  real = slice(None) if mask in ('none', 'causal') else slice(2)
  for name, a, b in zip(('out', 'dq', 'dk', 'dv'), *results, strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a[real], b[real], atol=tolerance * float(jnp.abs(b).max()), err_msg=name)
    assert float(jnp.abs(b[0]).max()) > .1


@pytest.mark.parametrize('implementation, runs', [('auto', True), ('xla', False)])
def test_a_model_on_a_cpu_runs_it(implementation, runs):
  spec = small_model.spec('dense', num_layers=2, attention_impl=implementation)
  with mock.patch.object(heads_first_attention, 'attend', side_effect=heads_first_attention.attend) as attend:
    small_model.encode(spec, [small_model.sequence('image_caption')])
  assert attend.called == runs
