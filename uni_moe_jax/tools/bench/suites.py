"""Runs the suites of the benchmark."""

import sys
import time
from collections.abc import Sequence

import jax
import ml_collections

from uni_moe_jax.tools.bench import (
  caption_rate,
  compile_time,
  file_rate,
  input_rate,
  machine,
  training_steps,
)
from uni_moe_jax.tools.bench.cases import Context
from uni_moe_jax.tools.bench.results_table import Row
from uni_moe_jax.tools.bench.settings import Sizes

SUITE_FUNCTIONS = {
    'routers': training_steps.routers, 'mixed': training_steps.mixed, 'published': training_steps.published,
    'decoding': caption_rate.caption_rate, 'input': input_rate.input_rate, 'files': file_rate.file_rate,
    'compile': compile_time.compile_time}


def measure(
    names: Sequence[str], sizes: Sizes, config: ml_collections.ConfigDict,
    dtype: str) -> tuple[dict[str, str], list[Row]]:
  """Run suites on the first device and return (header, rows); progress goes to stderr.

  Args:
    names: of `settings.SUITES`. sizes: of the cases. config: whose tasks and data some suites take.
    dtype: of matrix products.
  """
  devices = jax.devices()[:1]
  header = machine.header(devices, dtype)
  peak, rows = machine.gemm(sizes, devices[0])
  context = Context(sizes, config, dtype, peak, devices)
  for name in names:
    start = time.perf_counter()
    print(f'{name} …', end=' ', file=sys.stderr, flush=True)
    rows += SUITE_FUNCTIONS[name](context)
    print(f'{time.perf_counter() - start:.0f} s', file=sys.stderr, flush=True)
  return header, rows
