"""Attention and grouped products by each implementation, forward and gradients, in the sizes of base/16.

  python -m benchmarks.kernels --output=kernels.json   # one NVIDIA GPU; on a CPU with --quick: does everything run?

Grouped products have the shapes of a token router. Each Triton kernel first runs with every choice of tiles; the
fastest choice of each then runs beside the other implementations. An implementation whose results differ from the
plain one by more than rounding, or that does not run, is a line without a figure.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import paired
from uni_moe_jax.kernels import attention as attention_kernels
from uni_moe_jax.kernels import gmm
from uni_moe_jax.kernels.gmm import triton as gmm_triton
from uni_moe_jax.utils.errors import RunError

TOLERANCE = .02  # of the largest result, for bfloat16
CALLS = 10  # queued for one time, so that the host does not count
KERNELS = 'product', 'gradient of x', 'gradient of kernels'  # of Triton
# Rows, columns, contracted, warps, stages.
TILES = tuple(itertools.starmap(gmm_triton.Tiles, (
    (64, 64, 32, 4, 2), (64, 128, 32, 4, 3), (128, 64, 32, 4, 3), (64, 128, 64, 4, 3), (128, 128, 32, 4, 3),
    (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3))))


class Shapes(NamedTuple):
  """Sizes of the operands."""
  tokens: int = 256 * 197  # of a batch of attention; rows of a grouped product
  lengths: tuple[int, ...] = (197, 589, 1569)  # of attention: one frame, three, eight
  width: int = 768
  num_heads: int = 12
  mlp_dim: int = 3072
  experts: int = 8


QUICK = Shapes(tokens=4 * 197, lengths=(197,), width=128, num_heads=2, mlp_dim=256)

Function = Callable[..., jax.Array]


def main() -> None:
  options = paired.arguments(__doc__)
  report, shapes = paired.Report(options), QUICK if options.quick else Shapes()
  for length in shapes.lengths:
    operands = attention_operands(shapes, length)
    _compare(report, f'attention of {length} tokens', attention(), operands)
  for D, F in projections(shapes):
    operands, name = grouped_operands(shapes, D, F), f'{D} x {F}'
    fastest = [_fastest_tiles(report, f'{name}, Triton {KERNELS[i]}', i, operands) for i in range(len(KERNELS))]
    _compare(report, f'grouped {name}', grouped_products(tuple(fastest)), operands)
  report.write()


def attention() -> dict[str, Function]:
  """Attention without masks, as images and videos have it."""
  return {'xla': jax.nn.dot_product_attention, 'cudnn': functools.partial(
      attention_kernels.attend, valid=None, implementation=attention_kernels.CUDNN, mesh=None)}


def attention_operands(s: Shapes, length: int) -> tuple[Any, Any, jax.Array]:
  """((q, k, v), (), gradient of the result), [B, S, N, H] each."""
  shape = max(1, s.tokens // length), length, s.num_heads, s.width // s.num_heads
  q, k, v, dy = jax.random.normal(jax.random.key(0), (4, *shape), jnp.bfloat16)
  return (q, k, v), (), dy


def projections(s: Shapes) -> list[tuple[int, int]]:
  """(D, F) of the projections of a layer."""
  return [(s.width, 3 * s.width), (s.width, s.width), (s.width, s.mlp_dim), (s.mlp_dim, s.width)]


def grouped_operands(s: Shapes, D: int, F: int) -> tuple[Any, Any, jax.Array]:
  """((x [G, D], kernel [E, D, F]), (sizes [E],), gradient [G, F]); groups are about as uneven as a router's."""
  rng = np.random.default_rng(0)
  sizes = rng.multinomial(s.tokens, rng.dirichlet(np.full(s.experts, 8.)))
  normal = lambda *shape: jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16)
  return (normal(s.tokens, D), normal(s.experts, D, F)), (jnp.asarray(sizes, jnp.int32),), normal(s.tokens, F)


def loop(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
  """The grouped product as E products of all rows."""
  group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side='right')[:, None]
  return sum(jnp.where(group == e, x @ kernel[e], 0) for e in range(len(kernel)))


def grouped_products(tiles: tuple[gmm_triton.Tiles, ...]) -> dict[str, Function]:
  """Implementations by name, the plain one first. batched is left out: its groups are equal, so it is other work."""
  return {'loop': loop, 'Triton': functools.partial(gmm_triton.grouped_matmul, tiles=tiles),
          **{name: functools.partial(gmm.grouped_matmul, backend=name) for name in ('ragged', 'tokamax')}}


def programs(function: Function) -> dict[str, Callable[..., Any]]:
  """Of operands: the function, and its gradients. Those of attention need its forward pass, which counts."""
  gradients = lambda args, rest, dy: jax.vjp(lambda *args: function(*args, *rest), *args)[1](dy)
  return {'forward': jax.jit(lambda args, rest, _: function(*args, *rest)), 'gradients': jax.jit(gradients)}


def triton_program(kernel: int, tiles: gmm_triton.Tiles | None) -> Callable[..., jax.Array]:
  """One of the `KERNELS` alone, as a function of operands; without tiles that of the loop."""
  def run(args, rest, dy):
    product = lambda *args: (
        gmm_triton.grouped_matmul(*args, *rest, (tiles,) * len(KERNELS)) if tiles else loop(*args, *rest))
    return jax.vjp(product, *args)[1](dy)[kernel - 1] if kernel else product(*args)
  return jax.jit(run)


def check(results: Any, expected: Any) -> None:
  """Raise RunError if results are not the expected ones but for rounding."""
  for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
    error = float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max() / jnp.abs(b).max())
    if not error < TOLERANCE:
      raise RunError(f'results differ by {error:.2g} of the largest; at most {TOLERANCE} is rounding')


def _correct(report: paired.Report, calls: Mapping[Any, Callable[[], Any]], title: str) -> dict[Any, Callable[[], Any]]:
  """The calls that run and equal the first one; a line for each of the others."""
  correct, expected = {}, None
  for name, call in calls.items():
    try:
      results = call()
      if expected is None:
        expected = results
      check(results, expected)
    except Exception as e:  # pylint: disable=broad-exception-caught  # a kernel may fail in as many ways as there are
      report.add(f'{title}: {name}', None, '', error=f'{type(e).__name__}: {" ".join(str(e).split())[:200]}')
    else:
      correct[name] = functools.partial(lambda call: [call() for _ in range(CALLS)][-1], call)
  return correct


def _compare(report: paired.Report, title: str, functions: Mapping[str, Function], operands: Any) -> None:
  for kind in ('forward', 'gradients'):
    calls = {name: functools.partial(programs(f)[kind], *operands) for name, f in functions.items()}
    report.compare(f'{title}, {kind}', _correct(report, calls, f'{title}, {kind}'), per_call=CALLS)


def _fastest_tiles(report: paired.Report, title: str, kernel: int, operands: Any) -> gmm_triton.Tiles:
  """The tiles with which one kernel is fastest; the default ones if none runs."""
  calls = {tiles: functools.partial(triton_program(kernel, tiles), *operands) for tiles in (None, *TILES)}
  correct = _correct(report, calls, title)
  del correct[None]  # the loop, which is correct by definition
  if not correct:
    return gmm_triton.Tiles()
  seconds = paired.paired(correct, rounds=3)
  fastest = min(correct, key=lambda tiles: np.median(seconds[tiles]))
  milliseconds = 1e3 * float(np.median(seconds[fastest])) / CALLS
  report.add(f'{title}: fastest tiles', milliseconds, 'ms', tiles=str(tuple(fastest)))
  return fastest


if __name__ == '__main__':
  main()
