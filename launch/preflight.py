"""Compile a run for absent devices: memory, FLOPs, collectives, roofline, and a change that fits.

  uni-moe preflight --config=quickstart --topology=cpu:8
  uni-moe preflight --config=pretrain:size=base --topology=v5e:16x16 --output=base.json

Compiles the real training step and evaluation without devices or data; for TPUs, only up to libtpu's plan (schedule
and buffers). TPU topologies (v4:4x4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, in chips) need the extra `preflight`.
config.preflight declares data sizes that the rest of the config does not contain.
Exit codes: 0 the run fits or the device memory is unknown, 1 it does not fit, 2 usage.
"""

import sys
import time

from absl import flags
from ml_collections import config_flags

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.io import files

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string(
    'topology', None, 'GENERATION:SHAPE in chips, such as v5e:16x16, or cpu:N.', required=True)
_DEVICE_MEMORY = flags.DEFINE_float(
    'device_memory', None, 'GiB per device; default: the memory of the chip.', lower_bound=0.0)
_SEARCH = flags.DEFINE_bool('search', True, 'Search for a change that fits, and for the largest batch; compiles more.')
_TIME_BUDGET = flags.DEFINE_float('time_budget', 9., 'Minutes within which compiles of the search must end.', 0.)
_OUTPUT = flags.DEFINE_string('output', None, 'JSON file to write.')
flags.mark_flag_as_required('config')


def main() -> int:
  started = time.monotonic()  # before the slow imports below: --time_budget is the wall time of the command
  from uni_moe_jax.config.plan import make_plan
  from uni_moe_jax.preflight import topology
  # Usage errors come before the slow imports.
  target = topology.parse(_TOPOLOGY.value)
  config = cli.config_of(_CONFIG)
  make_plan(config)
  if _OUTPUT.value:
    files.check_folder_of(_OUTPUT.value, '--output')
  topology.prepare_environment(target)
  from uni_moe_jax.preflight import findings, preflight
  name = config_flags.get_config_filename(flags.FLAGS[_CONFIG.name])  # with its argument
  memory = None if _DEVICE_MEMORY.value is None else _DEVICE_MEMORY.value * topology.GIB
  report = lambda message: print(f'{message} …', file=sys.stderr, flush=True)
  result = preflight.preflight(config, name, target, memory, _SEARCH.value, report, _TIME_BUDGET.value, started)
  print(findings.render(result))
  if _OUTPUT.value:
    files.write_output(_OUTPUT.value, findings.as_json(result))
  return 1 if result.fits is False else 0


if __name__ == '__main__':
  cli.run(main)
