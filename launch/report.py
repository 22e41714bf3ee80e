"""Writes report.html into the workdir of a run, and prints its path.

  python launch/report.py --workdir=/tmp/quickstart
  python launch/report.py --workdir=/tmp/quickstart --curves=quickstart.png
"""

import pathlib
import sys

from absl import app
from absl import flags

from uni_moe_jax import report
from uni_moe_jax import training_curves

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder that training or evaluation wrote to.')
_CURVES = flags.DEFINE_string('curves', None, 'Picture to draw losses and accuracies into: a path that ends with .png or .svg.')

_USAGE = 2


def _parse(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    print(error, file=sys.stderr)
    sys.exit(_USAGE)


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    print(f'unexpected argument {argv[1]!r}: write --workdir=FOLDER.', file=sys.stderr)
    return _USAGE
  if _WORKDIR.value is None:
    print('--workdir is missing: write --workdir=FOLDER, the folder of a run.', file=sys.stderr)
    return _USAGE
  try:
    print(report.write_report(_WORKDIR.value))
    if _CURVES.value:
      metrics = pathlib.Path(_WORKDIR.value, 'metrics.jsonl')
      training_curves.draw(_CURVES.value, training_curves.read(metrics.read_text())[0], ('loss', 'accuracy'), _WORKDIR.value)
      print(_CURVES.value)
  except (FileNotFoundError, ValueError) as error:
    print(error, file=sys.stderr)
    return _USAGE
  return 0


if __name__ == '__main__':
  app.run(main, flags_parser=_parse)
