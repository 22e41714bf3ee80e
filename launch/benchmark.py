"""Measures speed and prints each figure with its budget.

  python launch/benchmark.py                                   everything; long
  python launch/benchmark.py --quick                           everything at reduced sizes, in minutes: does it run?
  python launch/benchmark.py --subjects=routers,decoding --output=benchmark.json

Subjects: routers, mixed, published, sets, decoding, exported, input, files, optimizer, compile. `mixed`, `input` and `compile` take
tasks and data from --config (the quickstart's by default); the others make their own. One device is used: the first.
"""

import json
import pathlib

from absl import flags

from uni_moe_jax.tools.bench import settings
from uni_moe_jax.utils import cli
from uni_moe_jax.utils.errors import UsageError

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_CONFIG = cli.define_config(default=str(_ROOT / 'configs/quickstart.py'))
_SUBJECTS = flags.DEFINE_list('subjects', [], f'Some of {", ".join(settings.SUBJECTS)}; none: all.')
_QUICK = flags.DEFINE_bool('quick', False, 'Reduced sizes and rounds: no figure is one of the budgets\'.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of products.')
_OUTPUT = flags.DEFINE_string('output', None, 'JSON file to write.')


def main() -> int:
  from uni_moe_jax.config import validate
  from uni_moe_jax.data.pipeline import npz_records
  # Mistakes are told before the slow libraries below are loaded.
  subjects = settings.choose(_SUBJECTS.value)
  if _OUTPUT.value and not pathlib.Path(_OUTPUT.value).absolute().parent.is_dir():
    raise UsageError(f'--output={_OUTPUT.value}: its folder is not there; make it first.')
  config = cli.config_of(_CONFIG)
  validate.resolve(config)
  if set(subjects) & set(settings.FROM_DATA):
    npz_records.check_directory(config.data.dir)
  if _QUICK.value:
    settings.compile_quickly()
  from uni_moe_jax.tools.bench import results_table, suites
  sizes = settings.QUICK if _QUICK.value else settings.FULL
  header, rows = suites.measure(subjects, sizes, config, _DTYPE.value)
  print(results_table.render(rows, header, sizes.reduced))
  if _OUTPUT.value:
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(results_table.as_json(rows, header, sizes.reduced), indent=1) + '\n')
  return 0


if __name__ == '__main__':
  cli.run(main)
