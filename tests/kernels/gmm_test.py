"""Every backend of the grouped product computes the plain loop over experts, in values and gradients."""

import contextlib
import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import abstract_devices, gmm_backends, small_model
from tests.helpers.gmm_backends import SIZES, normal
from tests.helpers.jaxprs import equations
from uni_moe_jax.kernels import gmm
from uni_moe_jax.kernels.gmm import triton as gmm_triton
from uni_moe_jax.tasks.router_names import GMM_BACKENDS
from uni_moe_jax.utils.errors import UsageError

_E, _D, _F, _G = 4, 6, 5, 16
# Of an odd width and depth the last ones are cut off. Every kernel has its own.
_TRITON_TILES = gmm_triton.Tiles(4, 2, 4), gmm_triton.Tiles(8, 4, 2), gmm_triton.Tiles(2, 8, 8)


def _plain(x, kernel, member):
  """member: bool [E, G], the rows of every group."""
  return sum(jnp.where(rows[:, None], x @ w, 0) for rows, w in zip(member, kernel))


def _grouped(x, kernel, sizes, backend):
  """The backend's product, of as many rows as it needs."""
  more = gmm.num_rows(backend, x.shape[0]) - x.shape[0]
  return gmm.grouped_matmul(jnp.pad(x, ((0, more), (0, 0))), kernel, sizes, backend)[:x.shape[0]]


@functools.cache
def _program(backend, rows: int):
  """(x, kernel, member) → values, dx, dkernel of the rows in groups, by a backend or the plain loop.

  Groups are data: one program serves all.
  """
  weight = normal(2, rows, _F)

  def loss(x, kernel, member):
    y = _plain(x, kernel, member) if backend is None else _grouped(x, kernel, member.sum(1), backend)
    y = jnp.where(member.any(0)[:, None], y, 0)
    return (y * weight).sum(), y

  @small_model.jit
  def run(x, kernel, member):
    (_, y), (dx, dkernel) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, kernel, member)
    return y, jnp.where(member.any(0)[:, None], dx, 0), dkernel
  return run


def _compare(backend, sizes, starts, rows):
  """Compares the programs of a backend and of the plain loop."""
  row = np.arange(rows)
  member = np.array([(row >= a) & (row < a + n) for a, n in zip(starts, sizes)])
  operands = normal(0, rows, _D), normal(1, _E, _D, _F), member
  # Read when a program is traced: by its first call.
  triton = types.SimpleNamespace(
      grouped_matmul=functools.partial(gmm_triton.grouped_matmul, tiles=_TRITON_TILES),
      compiled_on=gmm_triton.compiled_on)
  with mock.patch.object(gmm, 'gmm_triton', triton):
    for name, a, b in zip(('y', 'dx', 'dkernel'), *(_program(b, rows)(*operands) for b in (backend, None))):
      np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('backend', [
    'ragged', 'megablox', 'triton', pytest.param('tokamax', marks=gmm_backends.TOKAMAX)])
@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES.keys())
def test_every_backend_equals_the_plain_loop(backend, sizes):
  _compare(backend, sizes, np.cumsum(sizes) - sizes, _G)


@pytest.mark.parametrize('sizes', [(4, 4, 4, 4), *(SIZES[name] for name in ('uneven', 'none', 'beyond'))])
def test_buffers_equal_the_plain_loop_over_equal_groups(sizes):
  capacity = max(4, *sizes)
  _compare('batched', sizes, capacity * np.arange(_E), capacity * _E)


def test_these_groups_differ():
  # Otherwise a backend that mixes groups up would pass.
  kernel = normal(1, _E, _D, _F)
  gaps = np.abs(kernel[:, None] - kernel[None]).max((-1, -2)) + 9 * np.eye(_E)
  assert gaps.min() > .5


def test_each_triton_kernel_has_tiles_of_its_own():
  # 128 rows, 64 → 32 columns, two experts. A product has its tiles of rows and one more for the second group.
  tiles = tuple(gmm_triton.Tiles(rows, 32) for rows in (16, 32, 64))
  product = lambda x, kernel: gmm_triton.grouped_matmul(x, kernel, jnp.array([60, 68]), tiles).sum()
  jaxpr = jax.make_jaxpr(jax.grad(product, argnums=(0, 1)))(jnp.ones((128, 64)), jnp.ones((2, 64, 32))).jaxpr
  grids = {e.params['grid_mapping'].grid for e in equations(jaxpr) if e.primitive.name == 'pallas_call'}
  assert grids == {(8 + 1, 1), (4 + 1, 2), (1, 1, 2)}


@pytest.mark.parametrize('dtype, platform', [('float32', 'cuda'), ('bfloat16', 'cuda'), ('float32', 'rocm')])
def test_a_gpus_program_has_three_kernels_of_whole_tiles(dtype, platform):
  # The product, and both of its gradients; compiled by Triton for tiles as they are, which an interpreter would not
  # need.
  x, kernel = jnp.ones((200, 48), dtype), jnp.ones((_E, 48, 96), dtype)

  def loss(x, kernel, sizes):
    return gmm.grouped_matmul(x, kernel, sizes, 'triton').astype(jnp.float32).sum()
  sizes = jax.ShapeDtypeStruct((_E,), jnp.int32)
  with abstract_devices.tracing_for(platform):
    traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(x, kernel, sizes)
    kernels = lambda platform: traced.lower(lowering_platforms=(platform,)).as_text().count('__gpu$xla.gpu.triton')
    assert (kernels(platform), kernels('cpu')) == (3, 0)


@contextlib.contextmanager
def _tokamax_for(platform: str, interpret: bool = False):
  """tokamax takes its kernel for 'tpu' or 'cuda', as it does where it finds such a device."""
  from tokamax._src.ops.ragged_dot import api, pallas_mosaic_tpu
  kernels = {'tpu': pallas_mosaic_tpu.PallasMosaicTpuRaggedDot(interpret=interpret),
             'cuda': api.IMPLEMENTATIONS.get('triton')}
  if kernels[platform] is None:
    pytest.skip('this tokamax has no Triton kernel without jax-triton')
  with (mock.patch.object(type(kernels[platform]), 'supported_on', lambda *_: True),
        mock.patch('tokamax.ragged_dot', functools.partial(api.ragged_dot, implementation=(kernels[platform],))),
        abstract_devices.tracing_for(platform)):
    yield


@gmm_backends.TOKAMAX
@pytest.mark.parametrize('platform, ours, mark', [
    ('tpu', 'megablox', 'tpu_custom_call'), ('cuda', 'triton', '__gpu$xla.gpu.triton')])
def test_tokamax_has_a_kernel_for_each_of_our_kernels(platform, ours, mark):
  x, kernel, sizes = jnp.ones((256, 128)), jnp.ones((_E, 128, 256)), jnp.array([9, 0, 90, 1])
  counts = []
  for backend in ('tokamax', ours):
    loss = lambda x, kernel: gmm.grouped_matmul(x, kernel, sizes, backend).astype(jnp.float32).sum()
    with _tokamax_for(platform):
      traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(x, kernel)
      counts.append(traced.lower(lowering_platforms=(platform,)).as_text().count(mark))
  assert counts == [3, 3]  # the product, and both of its gradients


@gmm_backends.TOKAMAX
def test_tokamaxs_kernel_for_tpus_equals_ours():
  sizes = jnp.array([3, 0, 120, 65])
  x, kernel, weight = normal(0, 256, 128), normal(1, _E, 128, 128), normal(2, 256, 128)
  results = []
  for backend in ('tokamax', 'megablox'):
    def loss(x, kernel):
      y = jnp.where(jnp.arange(256)[:, None] < 188, gmm.grouped_matmul(x, kernel, sizes, backend), 0)
      return (y * weight).sum(), y
    with _tokamax_for('tpu', interpret=True):
      compiled = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(x, kernel).compile()
    (_, y), (dx, dkernel) = compiled(x, kernel)
    results.append((y, dx[:188], dkernel))
  for name, a, b in zip(('y', 'dx', 'dkernel'), *results):
    np.testing.assert_allclose(a, b, atol=1e-3, err_msg=name)


def test_without_tokamax_the_error_names_the_extra():
  with mock.patch.dict('sys.modules', tokamax=None), pytest.raises(UsageError, match=(
      r"moe.gmm='tokamax' needs tokamax; run: pip install 'uni-moe-jax\[tokamax\]', or set moe.gmm='auto'.")):
    gmm.grouped_matmul(jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([2]), 'tokamax')


@pytest.mark.parametrize('sizes', [
    (0, 1, 4, 0, 130, 65), (0, 0, 0, 0, 0, 0), (200, 0, 0, 0, 0, 0), (64, 64, 0, 64, 0, 8)])
def test_items_cover_every_row_of_every_group_once(sizes):
  sizes, rows = np.array(sizes), 200
  group, first, start, end = (np.asarray(a) for a in gmm_triton._items(jnp.asarray(sizes), rows, 64))
  covered = [(e, r) for e, f, a, b in zip(group, first, start, end)
             for r in range(f, f + 64) if a <= r < b]
  expected = list(zip(np.repeat(np.arange(6), sizes), range(rows)))
  assert [(int(e), r) for e, r in covered] == [(int(e), r) for e, r in expected]
  np.testing.assert_array_equal(first % 64, 0)


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
def test_rounds_compute_every_row_of_every_group(sizes):
  # A round has 2 · 16 / 4 = 8 rows per group: 'uneven', 'last_only' and 'first_only' need two.
  x, kernel, end = normal(0, _G, _D), normal(1, _E, _D, _F), np.cumsum(sizes)
  member = np.arange(_G) < end[:, None]
  member[1:] &= np.arange(_G) >= end[:-1, None]
  y = small_model.jit(gmm.in_rounds)(x, kernel, jnp.array(sizes))
  np.testing.assert_allclose(np.where(member.any(0)[:, None], y, 0), _plain(x, kernel, member), atol=1e-5)


def _mesh(platform, **of_device):
  return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform, **of_device)]))


@pytest.mark.parametrize('device, capacity, auto, xla', [
    ('cpu', False, 'tiled', 'tiled'), ('cpu', True, 'batched', 'batched'), ('tpu', False, 'megablox', 'ragged'),
    ('tpu', True, 'batched', 'batched'), ('gpu', True, 'batched', 'batched'), ('gpu', False, 'triton', 'ragged')])
def test_auto_follows_the_device_and_xla_is_auto_without_the_kernels(device, capacity, auto, xla):
  for backend, expected in (('auto', auto), ('xla', xla), *zip(GMM_BACKENDS, GMM_BACKENDS)):  # a named one is kept
    assert gmm.choose(backend, capacity, _mesh(device)) == expected


def test_auto_without_a_mesh_follows_the_device_of_this_process():
  assert gmm.choose('auto', False, None) == 'tiled'


@pytest.mark.parametrize('capability, expected', [('7.5', 'ragged'), ('8.0', 'triton'), ('gfx90a', 'triton')])
def test_auto_takes_no_triton_kernel_on_a_gpu_that_cannot_compile_it(capability, expected):
  assert gmm.choose('auto', False, _mesh('gpu', compute_capability=capability)) == expected


@pytest.mark.parametrize('backend, most, rows', [
    ('portable', 200, 455), ('tiled', 200, 455),
    ('megablox', 200, 256), ('megablox', 256, 256), ('tokamax', 200, 256), ('triton', 200, 200), ('ragged', 200, 200)])
def test_rows_that_a_backend_needs(backend, most, rows):
  # A tile has at most 256 rows, and at least one of its group.
  assert gmm.num_rows(backend, most) == rows


def test_an_unknown_backend_names_the_known_ones():
  with pytest.raises(ValueError, match="backend 'loops' is not one of batched, ragged, megablox, triton, tokamax"):
    gmm.grouped_matmul(jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([2]), 'loops')
