"""The rate of float32 matrix products at JAX's default precision: of a large one, and in the shapes of a layer."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.tools.bench.results_table import Row
from uni_moe_jax.tools.bench.settings import Sizes
from uni_moe_jax.tools.bench.timing import interleaved

# A call queues products up to this work, or this number: a small one alone would time its dispatch.
_FLOPS_PER_CALL, _MAX_PER_CALL = 2e10, 100


def peak(suite: str, sizes: Sizes, device: jax.Device) -> tuple[float, list[Row]]:
  """Return (FLOP/s of the fastest round of an n x n x n product, its row). suite: whose process measures it."""
  return _rates(suite, [(sizes.gemm,) * 3], sizes.rounds, device)


def of_layer(suite: str, sizes: Sizes, device: jax.Device) -> list[Row]:
  """Return the rates of the products of a layer."""
  tokens = sizes.batch_size * ((sizes.image_size // sizes.patch_size) ** 2 + 1)
  D, F = sizes.width, sizes.mlp_dim
  return _rates(suite, [(tokens, D, 3 * D), (tokens, D, D), (tokens, D, F), (tokens, F, D)], sizes.rounds, device)[1]


def _rates(
    suite: str, shapes: Sequence[tuple[int, int, int]], rounds: int, device: jax.Device) -> tuple[float, list[Row]]:
  """Return (FLOP/s of the fastest round of the first product, rows)."""
  rng = np.random.default_rng(0)
  product, calls, work = jax.jit(jnp.matmul), {}, {}
  for M, K, N in shapes:
    a, b = (jax.device_put(rng.normal(size=s).astype(np.float32), device) for s in ((M, K), (K, N)))
    name = f'GEMM {M} x {K} x {N}'
    times = min(_MAX_PER_CALL, max(1, int(_FLOPS_PER_CALL / (2 * M * K * N))))
    work[name] = 2.0 * M * K * N * times
    calls[name] = lambda a=a, b=b, times=times: [product(a, b) for _ in range(times)][-1]
  seconds = interleaved(calls, rounds)
  fastest = next(iter(work.values())) / next(iter(seconds.seconds.values())).min()
  note = 'float32 at the default matmul precision'
  rows = [Row(suite, name, seconds.figure(work[name] / 1e9 / s), 'GFLOP/s', note=note)
          for name, s in seconds.seconds.items()]
  return float(fastest), rows
