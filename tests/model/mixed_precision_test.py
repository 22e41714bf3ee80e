"""bfloat16 products beside a float32 stream (moe/precision.py): at the published LayerScale no layer is lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from tests.helpers.jaxprs import equations
from uni_moe_jax.tasks import task_types
from uni_moe_jax.utils.tree_paths import by_path, path_of

_LAYERS, _LAYER_SCALE = 12, 1e-3
_BATCH = 64  # of 17 tokens each: a gradient of a bias is a sum of 1,088 terms


@functools.cache
def _streams_and_gradients(dtype) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
  """The stream [B, S, D] before and after every layer in training, and the gradients of all parameters by path."""
  spec = small_model.spec('dense', num_layers=_LAYERS, patch_size=2, dtype=dtype, layer_scale_init=_LAYER_SCALE)
  scale = lambda path, x: _LAYER_SCALE * x if path_of(path).endswith(('scale1', 'scale2')) else x
  values = jax.tree_util.tree_map_with_path(scale, small_model.params(spec))
  sequences = [small_model.sequence('image_classification', _BATCH)]

  def loss(values, key):
    [features], collected = small_model.encode(spec, sequences, values=values, key=key, taps=True, all_rows=True)
    return jnp.sin(features).sum(), collected

  gradients, collected = jax.jit(jax.grad(loss, has_aux=True))(values, jax.random.key(0))
  [embedded], ((stacked,),), ((last,),) = (
      collected['sequences'][0].segments, collected['blocks'][0]['taps'], collected['tail'][0]['taps'])
  streams = [embedded, *stacked, last]
  return [np.asarray(x, np.float32) for x in streams], {k: np.asarray(g) for k, g in by_path(gradients).items()}


def _distance(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_every_layer_changes_the_stream_at_the_published_layer_scale():
  streams, exact = (_streams_and_gradients(dtype)[0] for dtype in (jnp.bfloat16, jnp.float32))
  change, expected = streams[-1] - streams[0], exact[-1] - exact[0]
  assert _distance(change, expected) < .02
  assert np.mean(change == 0) < .01
  # Control: a layer adds about 1e-3, and neighbors of bfloat16 around 1 are 8e-3 apart.
  rounded = start = jnp.asarray(exact[0], jnp.bfloat16)
  for before, after in zip(exact, exact[1:]):
    rounded += jnp.asarray(after - before, jnp.bfloat16)
  assert _distance(np.asarray(rounded - start, np.float32), expected) > .3
  assert np.mean(rounded == start) > .1


def test_gradients_are_those_of_float32():
  gradients, exact = (_streams_and_gradients(dtype)[1] for dtype in (jnp.bfloat16, jnp.float32))
  distances = {path: _distance(g, exact[path]) for path, g in gradients.items() if np.any(exact[path])}
  kernels = {path: d for path, d in distances.items() if path.endswith('/kernel')}
  sums = {path: d for path, d in distances.items() if path.endswith(('scale1', 'scale2', 'bias', 'scale'))}
  assert len(kernels) > 4 and len(sums) > 8
  assert max(sums.values()) < .01, sums
  assert max(kernels.values()) < .01, kernels


def _rounded_sums(jaxpr) -> list[str]:
  """Sums of bfloat16 numbers in a traced program."""
  return [str(e) for e in equations(jaxpr) if e.primitive.name in ('reduce_sum', 'cumsum', 'scatter-add')
          and e.invars[0].aval.dtype == jnp.bfloat16]


@pytest.mark.parametrize('router', ['attribute', 'token', 'dense'])
def test_no_sum_of_a_step_is_rounded(router):
  spec = small_model.spec(
      router, dtype=jnp.bfloat16, num_deep_prompts=2, num_prefix_prompts=3, spe_bias=True, drop_path=.1, noise_std=1.)
  sequences = [small_model.sequence(t) for t in ('image_caption', 'video_classification', 'text_mlm')]
  sequences.append(small_model.target(task_types.families()['names']))

  def loss(values, key):
    return sum(jnp.sin(f).sum() for f in small_model.encode(spec, sequences, values=values, key=key)[0])

  jaxpr = jax.make_jaxpr(jax.grad(loss))(small_model.params(spec), jax.random.key(0)).jaxpr
  assert not _rounded_sums(jaxpr)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_a_rounded_sum_is_found(dtype):
  add = jax.jit(lambda x, bias: (x + bias[None]).astype(jnp.float32).sum())
  jaxpr = jax.make_jaxpr(jax.grad(add, argnums=1))(jnp.ones((3, 2), dtype), jnp.ones(2, dtype)).jaxpr
  assert bool(_rounded_sums(jaxpr)) == (dtype == jnp.bfloat16)
