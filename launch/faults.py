"""Makes things go wrong, and checks that nothing is lost and that everything is said. Prints seeds, counts and findings.

  python launch/faults.py                                    everything
  python launch/faults.py --quick                            a few of each
  python launch/faults.py --subjects=kills --kills=100 --seed=7 --folder=runs/faults

kills: SIGKILL at random moments, some inside a save; each run is started again, and must end bit for bit as one that was never
disturbed. damage: every file of a checkpoint cut off, with a bit flipped, full of zeros, deleted: for who reads it, and for the
trainer. stops: a start and input that stall, a step that hangs, a full disk (where user namespaces are allowed), and a process that
dies or fails while another trains with it. moves: a run over every sort of source goes on at checkpoints with other numbers of (virtual)
devices and processes, and must get the rows and losses of one device; faults are planted in it, too. inputs: generated mistakes in
configs, damage of what runs keep, paths that cannot be reached, and rows, texts, pictures and clips as people have them, through
the commands' error boundary and as commands; each must be refused in one sentence, or skipped and counted (clips need the extra
`video`). planted: trainers with faults in them, which the checks of kills and damage must find. It trains configs/small.py and
uni_moe_jax/faults/moved_run.py, and needs no prepared data.

Exit codes: 0 nothing was found (and every planted fault was), 1 something was, 2 usage.
"""

import pathlib
import tempfile

from absl import flags

from uni_moe_jax.utils import cli
from uni_moe_jax.utils.errors import UsageError

SUBJECTS = ('kills', 'damage', 'stops', 'moves', 'inputs', 'planted')
_SUBJECTS = flags.DEFINE_list('subjects', [], f'Some of {", ".join(SUBJECTS)}; none: all.')
_KILLS = flags.DEFINE_integer('kills', 30, 'SIGKILLs.', lower_bound=1)
_SAVES = flags.DEFINE_integer('saves', 10, 'At least so many of them inside a save.', lower_bound=0)
_INPUTS = flags.DEFINE_integer('inputs', 10_000, 'Generated inputs that are bad, in this process.', lower_bound=1)
_COMMANDS = flags.DEFINE_integer('commands', 100, 'Generated commands.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Draws moments, places and inputs.')
_QUICK = flags.DEFINE_bool(
    'quick', False, '3 kills, one inside a save, of shorter runs; two moves; 600 inputs, 6 commands.')
_FOLDER = flags.DEFINE_string('folder', None, 'Where to work; a temporary folder by default, which is kept if something is found.')


def main() -> int:
  from uni_moe_jax.utils.suggest import nearest
  if unknown := [s for s in _SUBJECTS.value if s not in SUBJECTS]:
    raise UsageError(f'--subjects: {unknown[0]!r} is unknown; {nearest(unknown[0], SUBJECTS)}.')
  from uni_moe_jax.faults import suite
  folder = pathlib.Path(_FOLDER.value or tempfile.mkdtemp(prefix='faults_')).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  amounts = suite.QUICK if _QUICK.value else suite.Amounts(_KILLS.value, _SAVES.value, _INPUTS.value, _COMMANDS.value)
  return suite.run(_SUBJECTS.value or SUBJECTS, amounts, _SEED.value, folder, keep=_FOLDER.value is not None)


if __name__ == '__main__':
  cli.run(main)
