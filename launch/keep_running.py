"""Restart a command until it has finished.

  uni-moe keep-running -- uni-moe train --config=embedded --workdir=runs/embedded

Restarts the command after exit code 75 (saved and stopped by a signal) and after crashes, waiting --backoff seconds,
doubled with every consecutive crash. Gives up after --max_restarts consecutive starts without a newer checkpoint. Exit
code 2, a mistake in the command, is final unless the command has worked before (a disk may not be mounted yet). Passes
signals on to the command and waits for it to end; if this script is killed, the command receives SIGTERM (on Linux).
"""

import sys

from absl import app, flags

from uni_moe_jax.cli import output
from uni_moe_jax.train import restarts
from uni_moe_jax.utils.errors import UsageError

_MAX_RESTARTS = flags.DEFINE_integer(
    'max_restarts', 5, 'Consecutive starts without a newer checkpoint before giving up.', lower_bound=1)
_BACKOFF = flags.DEFINE_float(
    'backoff', 10., 'Seconds before a restart, doubled with every consecutive crash, to ten minutes at most.',
    lower_bound=0.)


def main(argv: list[str]) -> int:
  if len(argv) < 2:
    print('error: no command; write: uni-moe keep-running [FLAGS] -- COMMAND [ARGUMENTS].', file=sys.stderr)
    return restarts.USAGE
  output.outlive_readers()
  try:
    return restarts.keep_running(argv[1:], _MAX_RESTARTS.value, _BACKOFF.value)
  except UsageError as e:
    print(f'error: {e}', file=sys.stderr)
    return restarts.USAGE


def _parse(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except SystemExit:  # --help, for which absl exits with 1
    sys.exit(restarts.FINISHED)
  except flags.Error as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(restarts.USAGE)


if __name__ == '__main__':
  app.run(lambda argv: sys.exit(main(argv)), flags_parser=_parse)
