"""Grouped matmul on GPUs: Pallas kernels that Triton compiles.

A tile of rows may have rows of several groups. So the work is split into *items*, each the part of one tile in one
group: there are at most tiles + E - 1 of them, whatever the groups are, and each writes its own rows alone. Incomplete
tiles are masked, and nothing is padded or copied.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_GPUS = 'cuda', 'rocm'


class Tiles(NamedTuple):
  """Sizes of a kernel's tiles, powers of two, and how Triton compiles it.

  No GPU has measured the defaults: a float32 tile of each operand is 8 kB, twice that in flight.
  `python -m benchmarks.kernels` measures others, by shape.
  """
  rows: int = 64  # of the output
  columns: int = 64  # of the output
  contracted: int = 32
  warps: int = 4
  stages: int = 2

  @property
  def params(self) -> triton.CompilerParams:
    return triton.CompilerParams(num_warps=self.warps, num_stages=self.stages)


def compiled_on(platforms: Sequence[str], kernel: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
  """kernel(*operands, interpret=…): compiled on its own platforms, interpreted on others, as in tests.

  The platform of the lowering counts, not the machine that lowers: programs for TPUs and GPUs are also made without
  one.
  """
  compiled = functools.partial(kernel, interpret=False)
  return jax.lax.platform_dependent(
      *operands, default=functools.partial(kernel, interpret=True), **dict.fromkeys(platforms, compiled))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    x: jax.Array, kernel: jax.Array, sizes: jax.Array, tiles: tuple[Tiles, Tiles, Tiles] = (Tiles(),) * 3) -> jax.Array:
  """x [G, D], kernel [E, D, F], sizes int32 [E] → [G, F]; as `gmm.grouped_matmul`.

  tiles: of the product, and of the gradients of x and of kernel.
  """
  product = functools.partial(_products, contract=0, tiles=tiles[0])
  return compiled_on(_GPUS, product, x, kernel, sizes)


def _backward(tiles, saved, dy):
  x, kernel, sizes = saved
  product = functools.partial(_products, contract=1, tiles=tiles[1])
  gradient = functools.partial(_gradients, dtype=kernel.dtype, tiles=tiles[2])
  dx = compiled_on(_GPUS, product, dy, kernel, sizes)
  return dx, compiled_on(_GPUS, gradient, x, dy, sizes), None


grouped_matmul.defvjp(lambda *operands: (grouped_matmul(*operands), operands[:3]), _backward)


def _products(
    x: jax.Array, kernel: jax.Array, sizes: jax.Array, *, contract: int, tiles: Tiles, interpret: bool) -> jax.Array:
  """x [G, ·] times kernel [E, …], contracted over axis `contract` (0 or 1) of a group's kernel: [G, ·]."""
  items = _items(sizes, x.shape[0], tiles.rows)
  width = kernel.shape[2 - contract]
  call = pl.pallas_call(
      functools.partial(_product, contract=contract, tiles=tiles), compiler_params=tiles.params, interpret=interpret,
      out_shape=jax.ShapeDtypeStruct((x.shape[0], width), x.dtype),
      grid=(items[0].shape[0], pl.cdiv(width, tiles.columns)))
  return call(*items, x, kernel)


def _items(sizes: jax.Array, rows: int, tile_rows: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """(group, first row of the tile, first row, end row) of every item, int32 [tiles + E - 1] each."""
  end = jnp.cumsum(sizes)
  start = end - sizes
  tile = start // tile_rows
  count = jnp.where(sizes > 0, (end - 1) // tile_rows - tile + 1, 0)
  stop = jnp.cumsum(count)
  item = jnp.arange(pl.cdiv(rows, tile_rows) + sizes.shape[0] - 1, dtype=jnp.int32)
  idle = item >= stop[-1]
  group = jnp.where(idle, 0, (stop[None] <= item[:, None]).sum(1, dtype=jnp.int32))
  first = tile_rows * (tile[group] + item - (stop - count)[group])
  return group, jnp.where(idle, 0, first), jnp.where(idle, 0, start[group]), jnp.where(idle, 0, end[group])


def _product(group, first, start, end, x, kernel, out, *, contract: int, tiles: Tiles):
  item, column = pl.program_id(0), pl.program_id(1) * tiles.columns + jnp.arange(tiles.columns)
  g, row = group[item], first[item] + jnp.arange(tiles.rows)
  in_group, in_width = (row >= start[item]) & (row < end[item]), column < out.shape[1]
  depth = x.shape[1]

  def add(i, total):
    inner = i * tiles.contracted + jnp.arange(tiles.contracted)
    in_depth = inner < depth
    a = _load(x, (), row, inner, in_group, in_depth)
    if contract == 0:
      return total + triton.dot(a, _load(kernel, (g,), inner, column, in_depth, in_width))
    return total + triton.dot(a, _load(kernel, (g,), column, inner, in_width, in_depth), trans_b=True)

  # Idle items may be most of them: with expert parallelism a device has slots for all rows, and its own are a part.
  @pl.when(start[item] < end[item])
  def _():
    zero = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(depth, tiles.contracted), add, zero)
    triton.store(out.at[row[:, None], column[None]], total.astype(out.dtype), mask=in_group[:, None] & in_width[None])


def _gradients(
    x: jax.Array, dy: jax.Array, sizes: jax.Array, *, dtype: jnp.dtype, tiles: Tiles, interpret: bool) -> jax.Array:
  """x^T dy of every group's rows: [E, D, F]."""
  end = jnp.cumsum(sizes)
  shape = sizes.shape[0], x.shape[1], dy.shape[1]
  return pl.pallas_call(
      functools.partial(_gradient, tiles=tiles), out_shape=jax.ShapeDtypeStruct(shape, dtype),
      compiler_params=tiles.params, interpret=interpret,
      grid=(pl.cdiv(shape[1], tiles.rows), pl.cdiv(shape[2], tiles.columns), shape[0]))(end - sizes, end, x, dy)


def _gradient(start, end, x, dy, out, *, tiles: Tiles):
  inner = pl.program_id(0) * tiles.rows + jnp.arange(tiles.rows)
  column = pl.program_id(1) * tiles.columns + jnp.arange(tiles.columns)
  g = pl.program_id(2)
  in_depth, in_width = inner < x.shape[1], column < dy.shape[1]
  low, high = start[g], end[g]

  def add(i, total):
    row = low + i * tiles.contracted + jnp.arange(tiles.contracted)
    in_group = row < high
    x_tile, dy_tile = _load(x, (), row, inner, in_group, in_depth), _load(dy, (), row, column, in_group, in_width)
    return total + triton.dot(x_tile, dy_tile, trans_a=True)

  steps = jax.lax.div(high - low + tiles.contracted - 1, tiles.contracted)
  total = jax.lax.fori_loop(0, steps, add, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
  mask = in_depth[:, None] & in_width[None]
  triton.store(out.at[g, inner[:, None], column[None]], total.astype(out.dtype), mask=mask)


def _load(x, lead, rows, columns, row_mask, column_mask):
  """x [*lead, ·, ·] at rows [R] and columns [C], 0 where masked: [R, C]."""
  return triton.load(x.at[(*lead, rows[:, None], columns[None])], mask=row_mask[:, None] & column_mask[None], other=0)
