"""Runs the suites of the benchmark, after a description of the machine and the rate of its matrix products."""

import contextlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from uni_moe_jax.tools.bench import caption_rate, gpu, input_rate, settings, training_steps
from uni_moe_jax.tools.bench.cases import Context
from uni_moe_jax.tools.bench.results_table import Row, render
from uni_moe_jax.tools.bench.settings import Sizes
from uni_moe_jax.tools.bench.timing import interleaved
from uni_moe_jax.train.loop import commit
from uni_moe_jax.utils import cli, cores
from uni_moe_jax.utils.errors import UsageError

SUITE_FUNCTIONS = {
    'routers': training_steps.routers, 'mixed': training_steps.mixed, 'published': training_steps.published,
    'decoding': caption_rate.caption_rate, 'input': input_rate.input_rate, 'files': input_rate.file_rate,
    'compile': training_steps.compile_time, settings.GPU: gpu.on_gpu}
_PACKAGES = ('uni-moe-jax', 'jax', 'jaxlib', 'flax', 'optax', 'numpy', 'tensorflow-cpu', 'tensorflow')
# A call queues products up to this work, or this number: a small one alone would time its dispatch.
_FLOPS_PER_CALL, _MAX_PER_CALL = 2e10, 100


def measure(
    names: Sequence[str], sizes: Sizes, config: ml_collections.ConfigDict,
    dtype: str) -> tuple[dict[str, str], list[Row]]:
  """Run suites on the first device and return (header, rows); progress and the rows of each suite go to stderr.

  Args:
    names: of `settings.SUITES`, or `gpu`. config: whose tasks and data some suites take. dtype: of matrix products.

  Raises:
    UsageError: `gpu` without a GPU.
  """
  devices = jax.devices()[:1]
  if settings.GPU in names and devices[0].platform != 'gpu':
    raise UsageError(f"--suites=gpu needs an NVIDIA GPU and JAX for it (pip install -e '.[cuda]'), and JAX has devices "
                     f'of type {devices[0].platform}; name other suites.')
  header = _header(devices, dtype)
  peak, rows = _gemm(sizes, devices[0])
  context = Context(sizes, config, dtype, peak, devices)
  for name in names:
    start = time.perf_counter()
    print(f'{name} …', end=' ', file=sys.stderr, flush=True)
    own = SUITE_FUNCTIONS[name](context)
    print(f'{time.perf_counter() - start:.0f} s', file=sys.stderr, flush=True)
    if own:  # a failure of a later suite must not lose them
      print(render(own, {}, sizes.reduced), file=sys.stderr, flush=True)
    rows += own
  return header, rows


def _header(devices: Sequence[jax.Device], dtype: str) -> dict[str, str]:
  """Return what every figure depends on."""
  versions = []
  for name in _PACKAGES:  # one of the two builds of TensorFlow is missing; this package may be
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions.append(f'{name} {importlib.metadata.version(name)}')
  cache = 'off: compiling makes later steps of a CPU process slower; set JAX_COMPILATION_CACHE_DIR and run twice'
  return {
      'command': cli.command_line(),
      'commit': commit(),
      'device': f'{devices[0].device_kind} ({devices[0].platform}), {len(devices)} of {jax.device_count()} used',
      'cores': f'{cores.available()} usable',
      'versions': ', '.join([f'python {platform.python_version()}', *versions]),
      'dtype of products': dtype,
      'budgets': 'set for float32 on two CPU cores; those of gpu for bfloat16 on an H100',
      'compilation cache': jax.config.jax_compilation_cache_dir or cache,
  }


def _gemm(sizes: Sizes, device: jax.Device) -> tuple[float, list[Row]]:
  """Measure float32 products at JAX's default precision, n x n x n and in the shapes of a layer.

  Returns (FLOP/s of the n x n x n product's fastest round, rows).
  """
  tokens = sizes.batch_size * ((sizes.image_size // sizes.patch_size) ** 2 + 1)
  n, D, F = sizes.gemm, sizes.width, sizes.mlp_dim
  shapes = [(n, n, n), (tokens, D, 3 * D), (tokens, D, D), (tokens, D, F), (tokens, F, D)]
  rng = np.random.default_rng(0)
  product, calls, work = jax.jit(jnp.matmul), {}, {}
  for M, K, N in shapes:
    a, b = (jax.device_put(rng.normal(size=s).astype(np.float32), device) for s in ((M, K), (K, N)))
    name = f'GEMM {M} x {K} x {N}'
    times = min(_MAX_PER_CALL, max(1, int(_FLOPS_PER_CALL / (2 * M * K * N))))
    work[name] = 2.0 * M * K * N * times
    calls[name] = lambda a=a, b=b, times=times: [product(a, b) for _ in range(times)][-1]
  seconds = interleaved(calls, sizes.rounds)
  peak = next(iter(work.values())) / next(iter(seconds.seconds.values())).min()
  note = 'float32 at the default matmul precision'
  rows = [Row('machine', name, seconds.figure(work[name] / 1e9 / s), 'GFLOP/s', note=note)
          for name, s in seconds.seconds.items()]
  return float(peak), rows
