"""All subjects, one after the other."""

import sys
import time
from collections.abc import Sequence

import jax
import ml_collections

from uni_moe_jax.tools.bench import (
  caption_rate,
  file_rate,
  input_rate,
  machine,
  merged_model,
  step_parts,
  training_steps,
)
from uni_moe_jax.tools.bench.cases import Context
from uni_moe_jax.tools.bench.results_table import Row
from uni_moe_jax.tools.bench.settings import Sizes

MEASURE = {
    'routers': training_steps.routers, 'mixed': training_steps.mixed, 'published': training_steps.published, 'sets': step_parts.sets,
    'decoding': caption_rate.caption_rate, 'exported': merged_model.exported, 'input': input_rate.feeding,
    'files': file_rate.files, 'optimizer': step_parts.optimizer, 'compile': step_parts.compile_}


def measure(
    subjects: Sequence[str], sizes: Sizes, config: ml_collections.ConfigDict, dtype: str,
    devices: Sequence[jax.Device] | None = None) -> tuple[dict[str, str], list[Row]]:
  """(header, rows) of the subjects, in their order; what runs is said on stderr.

  Args:
    subjects: keys of `settings.SUITES`. sizes: of the cases. config: whose tasks and data some subjects take.
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
