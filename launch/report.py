"""Write report.html into the work directory of a run, and print its path.

  uni-moe report --workdir=runs/quickstart
  uni-moe report --workdir=runs/quickstart --output=quickstart.png
"""

from absl import flags

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.io import storage
from uni_moe_jax.reporting import curves, html
from uni_moe_jax.utils.errors import UsageError

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder that training or evaluation wrote to.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Also draw losses, accuracies and evaluations to this .png or .svg file.')


def main() -> int:
  if _OUTPUT.value and not _OUTPUT.value.endswith(('.png', '.svg')):
    raise UsageError(f'--output={_OUTPUT.value}: its name must end in .png or .svg. report.html is always written '
                     'to the work directory.')
  print(html.write_report(_WORKDIR.value))
  if _OUTPUT.value:
    metrics = storage.path(_WORKDIR.value) / 'metrics.jsonl'
    if not metrics.exists():
      raise UsageError(f'{metrics} does not exist: this run has not logged anything yet.')
    curves.draw(_OUTPUT.value, curves.read(metrics.read_text())[0], ('loss', 'accuracy', 'eval'), _WORKDIR.value)
    print(_OUTPUT.value)
  return 0


if __name__ == '__main__':
  cli.run(main)
