"""Attention for CPUs equals XLA's, with its gradients, and is what a model on CPU runs."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from tests.helpers.attention import arrays, with_gradients
from uni_moe_jax.model import heads_first_attention

_QUERIES, _KEYS = 5, 7
_PADDING = (7, 4, 0)  # valid keys of each example: the last one only fills the batch


def _mask(name: str) -> jax.Array | None:
  padding = (jnp.arange(_KEYS)[None] < jnp.asarray(_PADDING)[:, None])[:, None, None]
  causal = jnp.tril(jnp.ones((_QUERIES, _KEYS), bool))[None, None]
  return {'none': None, 'padding': padding, 'causal': causal, 'both': padding & causal}[name]


def _xla(q, k, v, mask):
  return jax.nn.dot_product_attention(q, k, v, mask=mask)


@pytest.mark.parametrize(
    'rounded, dtype, tolerance', [(False, jnp.float32, 1e-5), (False, jnp.bfloat16, 3e-2), (True, jnp.float32, 3e-2)])
@pytest.mark.parametrize('mask', ['none', 'padding', 'causal', 'both'])
def test_results_and_gradients_are_those_of_xla(mask, rounded, dtype, tolerance):
  attend = functools.partial(heads_first_attention.attend, rounded)
  operands = arrays(_QUERIES, _KEYS, dtype, batch=len(_PADDING))
  results = [with_gradients(f)(*operands, _mask(mask)) for f in (attend, _xla)]
  real = slice(None) if mask in ('none', 'causal') else slice(2)
  for name, a, b in zip(('out', 'dq', 'dk', 'dv'), *results, strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a[real], b[real], atol=tolerance * float(jnp.abs(b).max()), err_msg=name)
    assert float(jnp.abs(b[0]).max()) > .1


@pytest.mark.parametrize('implementation, runs', [('auto', True), ('xla', False)])
def test_a_model_on_a_cpu_runs_it(implementation, runs):
  spec = small_model.spec('dense', num_layers=2, attention_impl=implementation)
  with mock.patch.object(heads_first_attention, 'attend', side_effect=heads_first_attention.attend) as attend:
    jax.eval_shape(lambda: small_model.encode(spec, [small_model.sequence('image_caption')])[0])
  assert attend.called == runs
