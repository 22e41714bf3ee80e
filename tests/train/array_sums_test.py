"""Sums of arrays: worked by hand, changed by every bit, and the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uni_moe_jax.train.checkpoint import array_sums


def test_a_sum_by_hand():
  tree = {'a': {'b': jnp.array([[3, 5], [7, 2]], jnp.int32)}, 'c': (jnp.int32(-1), jnp.array([True, False]))}
  sums = array_sums(tree)
  assert {path: int(x) for path, x in sums.items()} == {'a/b': 3 + 5 * 3 + 7 * 5 + 2 * 7, 'c/0': 2**32 - 1, 'c/1': 1}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8', 'uint32'])
def test_every_bit_changes_the_sum(dtype):
  x = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
  before, content = int(array_sums({'x': x})['x']), x.tobytes()
  for bit in range(8 * len(content)):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    assert int(array_sums({'x': np.frombuffer(changed, x.dtype).reshape(x.shape)})['x']) != before, bit


@pytest.mark.parametrize('spec', [PartitionSpec('a', 'b'), PartitionSpec(('a', 'b')), PartitionSpec(None, 'a')])
def test_the_sum_does_not_depend_on_the_mesh(spec):
  x = jax.random.normal(jax.random.key(0), (8, 4))
  split = jax.device_put(x, NamedSharding(Mesh(np.reshape(jax.devices()[:8], (4, 2)), ('a', 'b')), spec))
  assert int(array_sums({'x': split})['x']) == int(array_sums({'x': x})['x'])
