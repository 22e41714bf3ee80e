"""What a config takes on devices that are not there: memory, work, traffic, the least time, and what to change if it does not fit.

  python launch/preflight.py --config=configs/quickstart.py --topology=cpu:8
  python launch/preflight.py --config=configs/pretrain.py:base-attribute-1 --topology=v5e:16x16 --json=base.json

Compiles the real training step and evaluation, without the devices and without the data; for TPUs as far as the compiler's plan.
TPUs (v4:4x4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, in chips) need the extra `preflight`. Sizes of data that no config can say by itself
stand in config.preflight.
Exit codes: 0 it fits, or nothing is known of the devices, 1 it does not fit, 2 usage.
"""

import json
import pathlib
import sys
import time

from absl import flags

from uni_moe_jax.utils import cli
from uni_moe_jax.utils.errors import UsageError

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string('topology', None, 'GENERATION:SHAPE in chips, or cpu:N virtual devices.', required=True)
_MEMORY = flags.DEFINE_float('memory', None, 'GiB of a device that may be used; by default what its chip has.')
_SEARCH = flags.DEFINE_bool('search', True, 'Look for the largest batch, and for a change that fits: more compiles.')
_MINUTES = flags.DEFINE_float('minutes', 9., 'The search ends before a compile that would not end in time.', lower_bound=0.)
_JSON = flags.DEFINE_string('json', None, 'File to write, too.')
flags.mark_flag_as_required('config')


def main() -> int:
  started = time.monotonic()  # before the slow libraries below are loaded: --minutes are those of a person who waits
  from uni_moe_jax.config import validate
  from uni_moe_jax.tools.preflight import topology
  # Mistakes are told before them.
  where = topology.parse(_TOPOLOGY.value)
  config = cli.config_of(_CONFIG)
  validate.resolve(config)
  if _JSON.value and not pathlib.Path(_JSON.value).absolute().parent.is_dir():
    raise UsageError(f'--json={_JSON.value}: its folder is not there; make it first.')
  topology.prepare_environment(where)
  from uni_moe_jax.tools.preflight import findings, preflight
  name = next(a for a in sys.argv[1:] if a.lstrip('-').startswith('config')).partition('=')[2]
  memory = None if _MEMORY.value is None else _MEMORY.value * topology.GIB
  say = lambda words: print(f'{words} …', file=sys.stderr, flush=True)
  found = preflight.preflight(config, name, where, memory, _SEARCH.value, say, _MINUTES.value, started)
  print(findings.render(found))
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(findings.as_json(found), indent=1) + '\n')
  return 1 if found.fits is False else 0


if __name__ == '__main__':
  cli.run(main)
