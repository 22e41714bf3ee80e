"""The kernel for short sequences equals XLA's attention, and writes no scores on a TPU."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.attention import with_gradients
from uni_moe_jax.kernels.attention import short as short_attention
from uni_moe_jax.parallel import sharding

_LENGTHS = (13, 7, 1)  # valid keys of each example, of 13


def _arrays(num_heads: int, head_dim: int, dtype=jnp.float32):
  """(queries, keys and values [B, S, 3, N, H]; cotangent of the output; valid)."""
  rng, tokens = np.random.default_rng(0), _LENGTHS[0]
  shape = (len(_LENGTHS), tokens, num_heads, head_dim)
  qkv, dy = (jnp.asarray(2 * rng.normal(size=s), dtype) for s in ((*shape[:2], 3, *shape[2:]), shape))
  return qkv, dy, jnp.arange(tokens)[None] < jnp.asarray(_LENGTHS)[:, None]


def _short(qkv, valid, mesh=None):
  return short_attention.attend(qkv, valid, mesh)


def _xla(qkv, valid):
  mask = None if valid is None else valid[:, None, None]
  return jax.nn.dot_product_attention(*(qkv[:, :, i] for i in range(3)), mask=mask)


def _compare(results, expected, tolerance=1e-5):
  for a, b in zip(results, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))
    assert float(jnp.abs(b).max()) > .1


# Heads that share a product: all (of a width that no group divides), two in each of two groups; and one alone.
@pytest.mark.parametrize('heads', [(3, 8), (4, 64), (2, 128)])
@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_the_kernel_equals_xla(heads, dtype, tolerance):
  qkv, dy, valid = _arrays(*heads, dtype)
  for mask in (None, valid):
    _compare(*(with_gradients(attend)(qkv, dy, mask) for attend in (_short, _xla)), tolerance)


def test_padded_keys_have_no_gradient_and_an_example_without_keys_is_finite():
  qkv, dy, valid = _arrays(4, 8)
  _, gradient = with_gradients(_short)(qkv, dy, valid.at[2].set(False))
  assert not gradient[1, 7:, 1:].any() and gradient[1, :7, 1:].any() and gradient[1, 7:, 0].any()
  assert np.isfinite(gradient).all()


def test_devices_of_a_mesh_attend_in_their_own_examples_and_heads():
  mesh = sharding.make_mesh(dict(replica=1, data=2, expert=2, model=2))
  arrays = _arrays(4, 8)  # three examples on four shards
  _compare(with_gradients(functools.partial(_short, mesh=mesh))(*arrays), with_gradients(_xla)(*arrays))


def test_the_kernel_writes_no_scores():
  def lowered(attend):
    shape = jax.ShapeDtypeStruct((2, 129, 3, 4, 64), jnp.bfloat16)
    loss = lambda qkv: attend(qkv, None).astype(jnp.float32).sum()
    with mock.patch.object(jax, 'default_backend', lambda: 'tpu'):
      return jax.jit(jax.grad(loss)).trace(shape).lower(lowering_platforms=('tpu',)).as_text()
  writes_scores = lambda text: bool(re.search(r'tensor<[^>]*129x(\d+x)*129x', text))
  assert lowered(_short).count('tpu_custom_call') == 1 and not writes_scores(lowered(_short))  # backward alone
  assert writes_scores(lowered(_xla))
