"""Attention over separate parts of keys, against attention over concatenated keys."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uni_moe_jax.kernels.attention import heads_first
from uni_moe_jax.kernels.attention.parts import attend

_B, _Q, _N, _H = 4, 3, 2, 8


def _keys(seed: int, b: int, S: int, dtype=jnp.float32):
  return tuple(jnp.asarray(x, dtype) for x in np.random.default_rng(seed).normal(size=(2, b, S, _N, _H)))


def _q(dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(9).normal(size=(_B, _Q, _N, _H)) * 3, dtype)


def _part(kv, mask=None):
  return (*(heads_first(x) for x in kv), mask)


def test_attention_by_hand():
  # One head of one number: scores 0 and log 3, one in each part: weights 1/4 and 3/4 of the values 8 and 4.
  one = lambda x: jnp.full((1, 1, 1, 1), x)
  out = attend(one(1.), [(one(0.), one(8.), None), (one(np.log(3)), one(4.), None)])
  np.testing.assert_allclose(out, one(5.), rtol=1e-6)


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_parts_equal_concatenated_keys(dtype, tolerance):
  own, shared, all_share = _keys(0, _B, 5, dtype), _keys(1, 2, 7, dtype), _keys(2, 1, 4, dtype)
  mask = jnp.asarray(np.random.default_rng(3).random((_B, 1, 1, 5)) < .5)
  structure = jnp.asarray(np.tril(np.ones((_Q, 5), bool)))[None, None]

  @jax.jit
  def separate(q, own, shared, all_share):
    return attend(q, [_part(shared), _part(all_share), _part(own, mask & structure)])

  @jax.jit
  def joined(q, own, shared, all_share):
    # Rows 0 and 1 share the first of two, rows 2 and 3 the second.
    k, v = (jnp.concatenate([jnp.repeat(s, 2, 0), jnp.repeat(a, 4, 0), o], 1)
            for s, a, o in zip(shared, all_share, own))
    seen = jnp.concatenate([jnp.ones((_B, 1, _Q, 11), bool), mask & structure], -1)
    return jax.nn.dot_product_attention(q, k, v, mask=seen)

  args = (_q(dtype), own, shared, all_share)
  a, b = separate(*args), joined(*args)
  assert a.dtype == dtype
  chex.assert_trees_all_close(a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance)
  assert float(jnp.abs(b - joined(args[0], _keys(7, _B, 5, dtype), *args[2:])).max()) > .1  # keys matter
  if dtype == jnp.float32:
    total = lambda f: lambda *args: (f(*args) * jnp.arange(_B * _Q * _N * _H).reshape(_B, _Q, _N, _H)).sum()
    grads = [jax.jit(jax.grad(total(f), argnums=(0, 1, 2, 3)))(*args) for f in (separate, joined)]
    chex.assert_trees_all_close(*grads, rtol=1e-4, atol=1e-3)


def test_a_fully_masked_part_adds_nothing():
  kept, hidden = _keys(0, _B, 5), _keys(1, _B, 3)
  nothing, q = jnp.zeros((_B, 1, 1, 3), bool), _q()
  chex.assert_trees_all_equal(attend(q, [_part(hidden, nothing), _part(kept)]), attend(q, [_part(kept)]))
  grads = jax.grad(lambda kv: attend(q, [_part(kv, nothing), _part(kept)]).sum())(hidden)
  chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, hidden))
  assert not np.array_equal(attend(q, [_part(hidden, ~nothing), _part(kept)]), attend(q, [_part(kept)]))


def test_large_scores_do_not_overflow():
  k, v = _keys(0, _B, 5)
  out = attend(_q() * 1e4, [_part((k, v)), _part(_keys(1, _B, 2))])
  assert bool(jnp.isfinite(out).all())
