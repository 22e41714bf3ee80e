"""All subjects, one after the other."""

import sys
import time
from collections.abc import Sequence

import jax
import ml_collections

from uni_moe_jax.bench import decoding, exported, feeding, files, machine, parts, steps
from uni_moe_jax.bench.problems import Context
from uni_moe_jax.bench.settings import Sizes
from uni_moe_jax.bench.table import Row

MEASURE = {
    'routers': steps.routers, 'mixed': steps.mixed, 'published': steps.published, 'sets': parts.sets,
    'decoding': decoding.decoding, 'exported': exported.exported, 'input': feeding.feeding,
    'files': files.files, 'optimizer': parts.optimizer, 'compile': parts.compile_}


def measure(
    subjects: Sequence[str], sizes: Sizes, config: ml_collections.ConfigDict, dtype: str,
    devices: Sequence[jax.Device] | None = None) -> tuple[dict[str, str], list[Row]]:
  """(header, rows) of the subjects, in their order; what runs is said on stderr.

  Args:
    subjects: keys of `settings.SUBJECTS`. sizes: of the problems. config: whose tasks and data some subjects take.
    dtype: of products. devices: to run on; the first one by default, for which the budgets are set.
  """
  devices = jax.devices()[:1] if devices is None else devices
  header = machine.header(devices, dtype)
  peak, rows = machine.gemm(sizes, devices[0])
  context = Context(sizes, config, dtype, peak, devices)
  for subject in subjects:
    start = time.perf_counter()
    print(f'{subject} …', end=' ', file=sys.stderr, flush=True)
    rows += MEASURE[subject](context)
    print(f'{time.perf_counter() - start:.0f} s', file=sys.stderr, flush=True)
  return header, rows
