"""Measure speed and print each figure with its budget.

  uni-moe benchmark             all suites but gpu; long
  uni-moe benchmark --quick     the same at reduced sizes, in minutes, to check that everything runs
  uni-moe benchmark --suites=routers,decoding --output=benchmark.json

Suites: routers, mixed, published, decoding, input, files, compile. `mixed`, `input` and `compile` take tasks and data
from --config (default: the quickstart); the others create their own. Everything runs on the first device, and each
suite in a process of its own.
`gpu` runs only if named: base/16 in bfloat16 and our kernels on one NVIDIA GPU, in less than half an hour. The exit
code is 1 if part of it failed.
"""

from absl import flags

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.io import files
from uni_moe_jax.tools.bench import settings, suite_process
from uni_moe_jax.utils.exit_codes import ERROR, FINISHED

_CONFIG = cli.define_config(default='quickstart')
_SUITES = flags.DEFINE_list('suites', [], f'Some of {", ".join(settings.SUITES)}, gpu; default: all but gpu.')
_QUICK = flags.DEFINE_bool(
    'quick', False, 'Reduced sizes and rounds, to check that everything runs; budgets are not checked.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Type of matrix products.')
_OUTPUT = flags.DEFINE_string('output', None, 'JSON file to write.')


def main() -> int:
  from uni_moe_jax.config.plan import make_plan
  from uni_moe_jax.data.examples import npz_records
  # Usage errors come before the slow imports below.
  names = settings.choose(_SUITES.value)
  if _OUTPUT.value:
    files.check_folder_of(_OUTPUT.value, '--output')
  config = cli.config_of(_CONFIG)
  make_plan(config)
  if set(names) & set(settings.FROM_CONFIG):
    npz_records.check_directory(config.data.dir)
  if _QUICK.value:
    settings.set_quick_xla_flags()
  if settings.GPU in names:
    settings.share_gpu_memory()
  sizes = settings.QUICK if _QUICK.value else settings.FULL
  rows = []
  for name in names:
    header, own = suite_process.measure(name, sizes, config, _DTYPE.value)
    rows += own
  from uni_moe_jax.tools.bench import results_table
  print(results_table.render(rows, header, sizes.reduced))
  if _OUTPUT.value:
    files.write_output(_OUTPUT.value, results_table.as_json(rows, header, sizes.reduced))
  return ERROR if any(row.missing == results_table.FAILED for row in rows) else FINISHED


if __name__ == '__main__':
  cli.run(main)
