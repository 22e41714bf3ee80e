"""Runs the suites of the benchmark, after a description of the machine and the rate of its matrix products."""

import contextlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Sequence

import jax
import ml_collections

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.tools.bench import caption_rate, gpu, input_rate, product_rate, settings, training_steps
from uni_moe_jax.tools.bench.cases import Context
from uni_moe_jax.tools.bench.results_table import Row, render
from uni_moe_jax.tools.bench.settings import Sizes
from uni_moe_jax.train.loop import commit
from uni_moe_jax.utils import cores
from uni_moe_jax.utils.errors import UsageError

SUITE_FUNCTIONS = {
    'routers': training_steps.routers, 'mixed': training_steps.mixed, 'published': training_steps.published,
    'decoding': caption_rate.caption_rate, 'input': input_rate.input_rate, 'files': input_rate.file_rate,
    'compile': training_steps.compile_time, settings.GPU: gpu.on_gpu}
_PACKAGES = ('uni-moe-jax', 'jax', 'jaxlib', 'flax', 'optax', 'numpy', 'tensorflow-cpu', 'tensorflow')


def measure(
    name: str, sizes: Sizes, config: ml_collections.ConfigDict, dtype: str) -> tuple[dict[str, str], list[Row]]:
  """Run a suite on the first device and return (header, rows); progress and its rows go to stderr.

  Args:
    name: of `settings.SUITES`, or `gpu`.
    sizes: of its cases.
    config: whose tasks and data some suites take.
    dtype: of matrix products.

  Raises:
    UsageError: `gpu` without a GPU.
  """
  devices = jax.devices()[:1]
  if name == settings.GPU and devices[0].platform != 'gpu':
    raise UsageError(f"--suites=gpu needs an NVIDIA GPU and JAX for it (pip install -e '.[cuda]'), and JAX has devices "
                     f'of type {devices[0].platform}; name other suites.')
  start = time.perf_counter()
  print(f'{name} …', end=' ', file=sys.stderr, flush=True)
  peak, rows = product_rate.peak(name, sizes, devices[0])
  rows += SUITE_FUNCTIONS[name](Context(sizes, config, dtype, peak, devices))
  print(f'{time.perf_counter() - start:.0f} s', file=sys.stderr, flush=True)
  print(render(rows, {}, sizes.reduced), file=sys.stderr, flush=True)  # a failure of a later suite must not lose them
  return _header(devices, dtype), rows


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
