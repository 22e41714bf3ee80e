"""Starts a command again until it has finished, unattended:

  python launch/keep_running.py -- python launch/train.py --config=configs/embedded.py --workdir=runs/embedded

After exit code 75 (stopped by a signal; saved) and after crashes it starts the command again: after --wait seconds, and after
crashes in a row later each time. It gives up after --limit starts in a row that brought no newer checkpoint, and does not repeat a
mistake in the command (exit code 2), unless the command worked before: then something that it needs may only be late. A signal to
this script goes to the command, whose end it waits for; where this script is killed, the command is asked to stop (on Linux).
"""

import sys

from absl import app, flags

from uni_moe_jax.train import restarts

_LIMIT = flags.DEFINE_integer('limit', 5, 'Starts in a row without a newer checkpoint, before it gives up.', lower_bound=1)
_WAIT = flags.DEFINE_float('wait', 10., 'Seconds before a start; doubled with every crash in a row, up to ten minutes.', lower_bound=0.)


def main(argv: list[str]) -> int:
  if len(argv) < 2:
    print('error: no command; write: python launch/keep_running.py [FLAGS] -- COMMAND [ARGUMENTS].', file=sys.stderr)
    return restarts.USAGE
  try:
    return restarts.keep_running(argv[1:], _LIMIT.value, _WAIT.value)
  except OSError as e:
    print(f'error: {argv[1]!r} is no program ({e.strerror}).', file=sys.stderr)
    return restarts.USAGE


def _parse(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(restarts.USAGE)


if __name__ == '__main__':
  app.run(lambda argv: sys.exit(main(argv)), flags_parser=_parse)
