"""Attention kernels in a training step that libtpu compiles to the end: on a mesh, with remat, in a scan."""

import json

import pytest

from tests.helpers import processes

pytestmark = pytest.mark.nightly
_LAYERS, _BATCH, _TOKENS, _PADDED, _HEAD = 4, 8, 577, (768, 640), 64

_STEPS = f"""
import collections, json, re
from tests.preflight import compiled_programs_test
from uni_moe_jax.preflight import hlo
from uni_moe_jax.preflight import cost
from uni_moe_jax.preflight import compiled_programs

def run(implementation):
  return compiled_programs.prepare(compiled_programs_test.small_config({{
      'model.num_layers': {_LAYERS}, 'model.width': 128, 'model.num_heads': 2, 'model.mlp_dim': 256,
      'model.image_size': 96, 'model.patch_size': 4, 'model.dtype': 'bfloat16', 'model.remat': True,
      'model.attention_impl': implementation, 'moe.router': 'dense', 'mesh.model': 2,
      'tasks.digit.batch_size': {_BATCH}}}), topology.devices(target))

module = hlo.parse(compiled_programs.lowered(run('auto'), None).compile().as_text())
kernels = collections.Counter(
    match[1] for c in module.computations.values() for op in c.ops.values()
    if op.opcode == 'custom-call' and (match := re.search('/splash_mha_(fwd|dq|dkv)_', op.attributes)))
splash, xla = cost.of_module(module), compiled_programs.compile_program(run('xla'), None, target).cost
print(json.dumps([kernels, splash.flops - xla.flops, splash.unknown_kernels + xla.unknown_kernels]))
"""


def test_libtpu_compiles_splash_attention_and_its_products_count():
  pytest.importorskip('libtpu')
  kernels, more_flops, unknown = json.loads(processes.printed(_STEPS, 'v5e:2x2'))
  # Forward, forward again, and backward, in the body of a loop over all layers but the last, which reads one token.
  assert kernels == {'fwd': 2, 'dkv': 1}
  assert unknown == 0
  # Of a device: one head of four examples. XLA multiplies queries and keys in 2, 2 and 4 products; the kernels do so in
  # 2, 2 and 5, and with padding.
  product = 2 * (_LAYERS - 1) * _BATCH // 2 * _HEAD
  assert more_flops == pytest.approx(product * (9 * _PADDED[0] * _PADDED[1] - 8 * _TOKENS**2), rel=.02)


_SHORT = """
import json, jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from uni_moe_jax.kernels.attention import short as short_attention
from uni_moe_jax.preflight import hlo
from uni_moe_jax.preflight import cost

def step(qkv, valid):
  y, backward = jax.vjp(lambda x: short_attention._attention(64, False, x, valid), qkv)
  return y, backward(y)

on = SingleDeviceSharding(topology.devices(target)[0])
for tokens in (65, 129, 511):
  shapes = (jax.ShapeDtypeStruct((8, 3, tokens, 1024), jnp.bfloat16, sharding=on),
            jax.ShapeDtypeStruct((8, 1, tokens), jnp.int32, sharding=on))
  total = cost.of_module(hlo.parse(jax.jit(step).lower(*shapes).compile().as_text()))
  print(json.dumps([tokens, total.flops, total.unknown_kernels]))
"""


@pytest.mark.parametrize('topology', ['v4:2x2x1', 'v5e:2x2', 'v6e:2x2'])
def test_libtpu_compiles_the_kernel_for_short_sequences(topology):
  pytest.importorskip('libtpu')
  for line in processes.printed(_SHORT, topology).splitlines():
    tokens, flops, unknown = json.loads(line)
    # Two products forward and five backward, of 16 heads; two heads of 64 numbers share the 128 lanes of each.
    assert flops == 2 * 7 * 8 * 16 * 128 * tokens**2 and unknown == 0
