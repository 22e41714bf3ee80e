"""Writes report.html into the workdir of a run, and prints its path.

  python launch/report.py --workdir=/tmp/quickstart
  python launch/report.py --workdir=/tmp/quickstart --curves=quickstart.png
"""

import pathlib

from absl import flags

from uni_moe_jax.reporting import curves, html
from uni_moe_jax.utils import cli
from uni_moe_jax.utils.errors import UsageError

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder that training or evaluation wrote to.', required=True)
_CURVES = flags.DEFINE_string('curves', None, 'Picture to draw losses and accuracies into: a path that ends with .png or .svg.')


def main() -> int:
  print(html.write_report(_WORKDIR.value))
  if _CURVES.value:
    metrics = pathlib.Path(_WORKDIR.value, 'metrics.jsonl')
    if not metrics.exists():
      raise UsageError(f'{metrics} is not there: this run has logged nothing yet.')
    curves.draw(_CURVES.value, curves.read(metrics.read_text())[0], ('loss', 'accuracy'), _WORKDIR.value)
    print(_CURVES.value)
  return 0


if __name__ == '__main__':
  cli.run(main, remote=True)
