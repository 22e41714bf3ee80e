"""Every backend of the grouped product computes the plain loop over experts, in values and gradients."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from tests.helpers import small_model
from uni_moe_jax.moe import gmm, gmm_triton

_E, _D, _F, _G = 4, 6, 5, 16
_TILES = (4,)
_TRITON_TILES = {'_ROWS': 4, '_COLUMNS': 2, '_CONTRACTED': 4}  # of an odd width and depth the last ones are cut off
# Groups within a tile, over many tiles, of whole tiles, none at all, and all rows in one; and one whose last tile
# reaches beyond all rows.
_SIZES = (('uneven', (3, 0, 9, 2)), ('whole_tiles', (4, 8, 0, 4)), ('last_only', (0, 0, 0, 14)),
          ('first_only', (16, 0, 0, 0)), ('none', (0, 0, 0, 0)), ('beyond', (3, 0, 6, 7)))


def _normal(seed: int, *shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


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
  weight = _normal(2, rows, _F)

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
  """What the programs of a backend and of the plain loop give."""
  row = np.arange(rows)
  member = np.array([(row >= a) & (row < a + n) for a, n in zip(starts, sizes)])
  operands = _normal(0, rows, _D), _normal(1, _E, _D, _F), member
  # Read when a program is traced: by its first call.
  with mock.patch.object(gmm, '_TILES', _TILES), mock.patch.multiple(gmm_triton, **_TRITON_TILES):
    return tuple(_program(b, rows)(*operands) for b in (backend, None))


class EveryBackendTest(parameterized.TestCase):

  @parameterized.named_parameters(
      (f'{name}_{backend}', sizes, backend) for name, sizes in _SIZES
      for backend in ('tiled', 'ragged', 'megablox', 'triton'))
  def test_it_equals_the_plain_loop(self, sizes, backend):
    starts = np.cumsum(sizes) - sizes
    actual, expected = _compare(backend, sizes, starts, _G)
    for name, a, b in zip(('y', 'dx', 'dkernel'), actual, expected):
      np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)

  @parameterized.named_parameters(*_SIZES[:1], ('full', (4, 4, 4, 4)), *_SIZES[4:])
  def test_buffers_equal_the_plain_loop_over_equal_groups(self, sizes):
    capacity = max(4, *sizes)
    actual, expected = _compare('batched', sizes, capacity * np.arange(_E), capacity * _E)
    for name, a, b in zip(('y', 'dx', 'dkernel'), actual, expected):
      np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)

  def test_these_groups_differ(self):
    # Otherwise a backend that mixes groups up would pass.
    kernel = _normal(1, _E, _D, _F)
    gaps = np.abs(kernel[:, None] - kernel[None]).max((-1, -2)) + 9 * np.eye(_E)
    self.assertGreater(gaps.min(), .5)


class TileTest(parameterized.TestCase):

  # At most as many rows as a group has on average: 6431 / 8 = 803, 1023 / 8 = 127, 415 / 8 = 51, 143 / 8 = 17.
  @parameterized.parameters((6431, 8, 128), (1024, 8, 128), (1023, 8, 64), (415, 8, 32), (143, 8, 32))
  def test_by_hand(self, rows, groups, tile):
    self.assertEqual(gmm._tile(rows, groups), tile)


class TritonTest(parameterized.TestCase):

  @parameterized.parameters(('float32', 'cuda'), ('bfloat16', 'cuda'), ('float32', 'rocm'))
  def test_a_gpus_program_has_three_kernels_of_whole_tiles(self, dtype, platform):
    # The product, and both of its gradients; compiled by Triton for tiles as they are, which an interpreter would not
    # need.
    x, kernel = jnp.ones((200, 48), dtype), jnp.ones((_E, 48, 96), dtype)

    def loss(x, kernel, sizes):
      return gmm.grouped_matmul(x, kernel, sizes, 'triton').astype(jnp.float32).sum()
    sizes = jax.ShapeDtypeStruct((_E,), jnp.int32)
    traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(x, kernel, sizes)
    kernels = lambda platform: traced.lower(lowering_platforms=(platform,)).as_text().count('__gpu$xla.gpu.triton')
    self.assertEqual((kernels(platform), kernels('cpu')), (3, 0))

  @parameterized.parameters(
      ((0, 1, 4, 0, 130, 65),), ((0, 0, 0, 0, 0, 0),), ((200, 0, 0, 0, 0, 0),), ((64, 64, 0, 64, 0, 8),))
  def test_items_cover_every_row_of_every_group_once(self, sizes):
    sizes, rows = np.array(sizes), 200
    group, first, start, end = (np.asarray(a) for a in gmm_triton._items(jnp.asarray(sizes), rows))
    covered = [(e, r) for e, f, a, b in zip(group, first, start, end)
               for r in range(f, f + gmm_triton._ROWS) if a <= r < b]
    expected = list(zip(np.repeat(np.arange(6), sizes), range(rows)))
    self.assertEqual([(int(e), r) for e, r in covered], [(int(e), r) for e, r in expected])
    np.testing.assert_array_equal(first % gmm_triton._ROWS, 0)


class ChooseBackendTest(parameterized.TestCase):

  @parameterized.parameters(('cpu', False, 'tiled'), ('cpu', True, 'batched'), ('tpu', False, 'megablox'),
                            ('tpu', True, 'megablox'), ('gpu', True, 'batched'), ('gpu', False, 'triton'))
  def test_auto_follows_the_device(self, device, capacity, backend):
    with mock.patch.object(jax, 'default_backend', lambda: device):
      self.assertEqual(gmm.choose_backend('auto', capacity), backend)

  @parameterized.parameters(('cpu', False, 'tiled'), ('tpu', False, 'ragged'), ('tpu', True, 'batched'),
                            ('gpu', True, 'batched'), ('gpu', False, 'ragged'))
  def test_xla_is_auto_without_the_kernel(self, device, capacity, backend):
    self.assertEqual(gmm.choose_backend('xla', capacity, device), backend)

  @parameterized.parameters(('tiled', 200, 327), ('megablox', 200, 256), ('megablox', 256, 256), ('triton', 200, 200),
                            ('ragged', 200, 200))
  def test_rows_that_a_backend_needs(self, backend, most, rows):
    # A tile of 128 rows has at least one of its group.
    self.assertEqual(gmm.num_rows(backend, most), rows)

  @parameterized.parameters(*gmm.BACKENDS)
  def test_a_named_backend_is_kept(self, backend):
    self.assertEqual(gmm.choose_backend(backend, True), backend)

  def test_an_unknown_backend_names_the_known_ones(self):
    with self.assertRaisesRegex(ValueError, "backend 'loops' is not one of tiled, batched, ragged, megablox, triton"):
      gmm.grouped_matmul(jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([2]), 'loops')


if __name__ == '__main__':
  absltest.main()
