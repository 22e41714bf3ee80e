"""Write report.html into the work directory of a run, and print its path.

  uni-moe report --workdir=runs/quickstart
"""

from absl import flags

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.reporting import html

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder that training or evaluation wrote to.', required=True)


def main() -> int:
  print(html.write_report(_WORKDIR.value))
  return 0


if __name__ == '__main__':
  cli.run(main)
