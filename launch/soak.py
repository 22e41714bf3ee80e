"""Watches a long run: memory, speed against one batch that is always the same, checkpoints. Prints PASS or FAIL for each.

  python launch/soak.py --config=configs/embedded.py --minutes=40 --folder=runs/soak

It wants a machine that does nothing else. It compiles first, in another process. The run on the data takes --minutes; every now and
then it is stopped, and the same loop on one batch has a turn, in a process of its own. Writes soak.json.

Exit codes: 0 all passed, 1 something failed, 2 usage.
"""

import json
import pathlib

from absl import flags

from uni_moe_jax.utils import cli

_CONFIG = cli.define_config()
_MINUTES = flags.DEFINE_float('minutes', 40., 'Of the run on the data.', lower_bound=.1)
_FOLDER = flags.DEFINE_string('folder', None, 'Where its work directories go.', required=True)
flags.mark_flag_as_required('config')


def main() -> int:
  from uni_moe_jax.config.plan import make_plan
  config = cli.config_of(_CONFIG)
  make_plan(config).check_trains()
  from uni_moe_jax.faults import soak
  folder = pathlib.Path(_FOLDER.value).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  figures = soak.soak(soak.arguments_of(flags.FLAGS[_CONFIG.name]), config.train, _MINUTES.value, folder)
  (folder / 'soak.json').write_text(json.dumps(figures, indent=1))
  return 0 if all(figures['verdicts'].values()) else 1


if __name__ == '__main__':
  cli.run(main)
