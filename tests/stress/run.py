"""Injects faults, and checks that nothing is lost and every failure is reported. Prints seeds, counts and findings.

  python tests/stress/run.py                                      all suites but the soak
  python tests/stress/run.py --quick                              a few cases of each, in minutes
  python tests/stress/run.py --suites=preemption --num_kills=100 --seed=7 --workdir=runs/stress
  python tests/stress/run.py --suites=soak --config=configs/embedded.py --time_budget=40 --workdir=runs/soak

Suites:
  preemption       SIGKILL at random moments, some during a save, also where folders cannot be renamed; a restarted
                   run must end like an undisturbed one
  buckets          the same with work directories on a server of GCS and on one of S3
  hangs            stalled start and input, a hung step, a full disk, one of two processes dying or failing, two
                   processes with separate work directories
  preparation      SIGKILL of prepare_data at random moments; started again, it must write the same files
  bad_input        generated configs, checkpoints, paths, data and commands: refused in one sentence or skipped
  injected_faults  trainers with faults that the checks of preemption must detect
  soak             --config under observation: memory, speed, checkpoints; needs an idle machine

The suites train configs/small.py, whose digits they prepare; the soak trains --config. The full disk needs user
namespaces.

Exit codes: 0 no findings, 1 findings, 2 usage.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from absl import flags

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.utils.errors import RunError, UsageError
from uni_moe_jax.utils.suggest import nearest

SUITES = ('preemption', 'buckets', 'hangs', 'preparation', 'bad_input', 'injected_faults')
SOAK = 'soak'
_TRIES = 3  # to detect an injected fault: kills may come too early
_NUM_ROWS = 50_000  # that are prepared
_FAULT_SAVES = 1  # kills during a save, per injected fault


@dataclasses.dataclass(frozen=True)
class Size:
  """How much the suites do.

  Attributes:
    kills, saves: kills, and how many of them at least during a save. inputs, commands: of bad input.
    fault_kills: for each injected fault. steps: of each run.
    optimized: whether XLA optimizes the programs as for users.
  """
  kills: int
  saves: int
  inputs: int
  commands: int
  fault_kills: int = 3
  steps: int = 200
  optimized: bool = True


QUICK = Size(3, 1, 600, 6, fault_kills=1, steps=60, optimized=False)


def run(suites: Sequence[str], size: Size, seed: int, folder: pathlib.Path, keep: bool) -> int:
  """Run the suites in `folder`, which is kept if there are findings or on request. Return the exit code."""
  print(f'seed {seed}, in {folder}', flush=True)
  work = Suites(size, seed, folder)
  findings = [f'{name}: {finding}' for name in suites for finding in getattr(work, name)()]
  for finding in findings:
    print(f'FOUND {finding}')
  for not_tried in work.not_tried:
    print(f'NOT TRIED {not_tried}')
  summary = f'{len(findings)} findings' if findings else 'no findings'
  print(f'{summary} in what was tried' if work.not_tried else summary, flush=True)
  if not findings and not keep:
    shutil.rmtree(folder, ignore_errors=True)
  return 1 if findings else 0


class Suites:
  """Each public method is a suite: it prints its report and returns its findings."""

  def __init__(self, size: Size, seed: int, folder: pathlib.Path):
    from tests.stress.trainer import Trainer
    from uni_moe_jax.config.schema import DataConfig
    from uni_moe_jax.data.embedded import build
    build.build(DataConfig(dir=str(folder)), 1, ['digits'])
    self._size, self._seed, self._folder = size, seed, folder
    self._trainer = Trainer(folder, overrides=(f'train.steps={size.steps}',), optimized=size.optimized)
    self._undisturbed_run = None
    self.not_tried: list[str] = []

  def preemption(self) -> list[str]:
    from tests.stress import preemption
    undisturbed = self._undisturbed()
    with _timed('preemption') as report:
      tally = preemption.series(self._trainer, undisturbed, self._size.kills, self._size.saves, self._seed)
      report.append(str(tally))
    with _timed('preemption where folders cannot be renamed') as report:
      trainer = dataclasses.replace(self._trainer, fault='no_folder_renames')
      in_place = preemption.series(trainer, undisturbed, self._size.fault_kills, _FAULT_SAVES, self._seed)
      report.append(str(in_place))
    return tally.findings + in_place.findings

  def buckets(self) -> list[str]:
    import fsspec

    from tests.helpers import object_stores
    from tests.stress import preemption
    findings = []
    for scheme, server in object_stores.SERVERS.items():
      with _timed(f'preemption in a bucket, {scheme}://') as report, server() as store:
        os.environ |= store.environment
        fsspec.config.conf.setdefault('gs', {})['token'] = 'anon'  # it reads the environment when it is imported
        trainer = dataclasses.replace(self._trainer, bucket=f'{store.address}/stress', fault='fast_heartbeats')
        trainer.run(workdir := trainer.workdir('undisturbed'), self._folder / f'undisturbed_{scheme}.log')
        undisturbed = dataclasses.replace(self._undisturbed(), save_seconds=preemption.save_seconds(workdir))
        tally = preemption.series(trainer, undisturbed, self._size.kills, self._size.saves, self._seed)
        report += [f'a save takes {undisturbed.save_seconds:.2f} s', str(tally)]
        findings += tally.findings
    return findings

  def hangs(self) -> list[str]:
    from tests.stress import hangs
    one = self._undisturbed().workdir
    two, findings = hangs.two_undisturbed(self._trainer)
    cases = [('hanging', hangs.hanging, one), ('full disk', hangs.full_disk, one),
             ('separate folders', hangs.separate_folders, one)]
    if not findings:
      cases += [('dead process', hangs.dead_process, two), ('failed process', hangs.failed_process, two)]
    for name, case, undisturbed in cases:
      with _timed(name) as report:
        try:
          lines, case_findings = case(self._trainer, undisturbed)
        except hangs.NotTried as e:
          self.not_tried.append(str(e))
          lines, case_findings = [f'not tried: {e}'], []
        report += lines
      findings += case_findings
    return findings

  def preparation(self) -> list[str]:
    from tests.stress import preparation
    folder = self._folder / 'preparation'
    source = preparation.write_rows(folder / 'in', _NUM_ROWS)
    with _timed(f'preparation, {self._size.kills} kills') as report:
      findings = preparation.kills(folder, source, self._size.kills, self._seed)
      report += findings
    return findings

  def bad_input(self) -> list[str]:
    from tests.stress import bad_files, bad_input
    findings, properties = [], {**bad_input.PROPERTIES, **bad_files.PROPERTIES}
    if not bad_files.HAS_VIDEO:
      self.not_tried.append('videos other than arrays: the extra `video` is not installed')
    examples = {**dict.fromkeys(properties, self._size.inputs // len(properties)), 'command': self._size.commands}
    for name, num_examples in examples.items():
      prop = properties.get(name, bad_input.command)
      with _timed(f'bad input: {name}') as report:
        try:
          counts = bad_input.check(prop, num_examples, self._seed, self._folder / 'bad_input', name != 'command')
          report += _lines(counts)
        except AssertionError as e:
          findings.append(' '.join((f'{name}: {e}', *getattr(e, '__notes__', ()))))
          report.append(findings[-1])
    return findings

  def injected_faults(self) -> list[str]:
    from tests.stress import injected_faults
    missed = []
    for name, words in injected_faults.DETECTED.items():
      with _timed(f'injected fault {name!r}') as report:
        for attempt in range(_TRIES):
          findings = self._findings_with(name, self._seed + attempt)
          if right := [f for f in findings if words in f]:
            break
        report.append(f'detected: {right[0]}' if right else f'MISSED; {findings[0] if findings else "no findings"}')
      if not right:
        missed.append(f'{name!r} was missed ({words!r}){f", but {findings[0]}" if findings else ""}')
    return missed

  def _findings_with(self, fault: str, seed: int) -> list[str]:
    """Return what the checks find with an injected fault."""
    from tests.stress import preemption
    undisturbed = self._undisturbed()
    trainer = dataclasses.replace(self._trainer, fault=fault)
    return preemption.series(trainer, undisturbed, self._size.fault_kills, _FAULT_SAVES, seed).findings

  def _undisturbed(self):
    """Return a run without faults; an earlier command compiles its programs."""
    from tests.stress import preemption, trainer
    if self._undisturbed_run is None:
      workdir, log = self._folder / 'undisturbed', self._folder / 'undisturbed.log'
      trainer.clear(workdir)
      if code := self._trainer.compile(log):
        raise RunError(f'compiling: {trainer.ending(code)}; see {log}.')
      code, seconds = self._trainer.run(workdir, log)
      if code:
        raise RunError(f'the undisturbed run: {trainer.ending(code)}; see {log}.')
      save_seconds = preemption.save_seconds(workdir)
      self._undisturbed_run = preemption.Undisturbed(workdir, seconds, save_seconds)
      print(f'undisturbed: {seconds:.1f} s, a save takes {save_seconds:.2f} s', flush=True)
    return self._undisturbed_run


def soak(holder: flags.FlagHolder, minutes: float, folder: pathlib.Path) -> int:
  """Run the soak of a config and write soak.json. Return the exit code."""
  from tests.stress import soak as soak_lib
  from uni_moe_jax.config.plan import make_plan
  config = cli.config_of(holder)
  make_plan(config).check_trains()
  figures = soak_lib.soak(soak_lib.config_arguments(flags.FLAGS[holder.name]), config.train, minutes, folder)
  (folder / 'soak.json').write_text(json.dumps(figures, indent=1))
  return 0 if all(figures['verdicts'].values()) else 1


def _lines(counts: dict[str, int]) -> list[str]:
  return [f'{n:6d}  {what}' for what, n in sorted(counts.items())]


@contextlib.contextmanager
def _timed(name: str) -> Iterator[list[str]]:
  """Yield a list of lines, and print it with the duration of the block."""
  began, report = time.monotonic(), []
  yield report
  print('\n'.join([f'{name}: {time.monotonic() - began:.0f} s', *(f'  {line}' for line in report)]), flush=True)


def _main() -> Callable[[], int]:
  suites = flags.DEFINE_list('suites', list(SUITES), f'Some of {", ".join((*SUITES, SOAK))}.')
  num_kills = flags.DEFINE_integer('num_kills', 30, 'SIGKILLs.', lower_bound=1)
  num_saves = flags.DEFINE_integer('num_saves', 10, 'Minimal number of SIGKILLs during a save.', lower_bound=0)
  num_inputs = flags.DEFINE_integer('num_inputs', 10_000, 'Bad inputs, apart from commands.', lower_bound=8)
  num_commands = flags.DEFINE_integer('num_commands', 100, 'Bad commands.', lower_bound=1)
  seed = flags.DEFINE_integer('seed', 0, 'Seed of random moments and inputs.')
  quick = flags.DEFINE_bool('quick', False, '3 kills, shorter runs, 600 inputs, 6 commands.')
  workdir = flags.DEFINE_string('workdir', None, 'Folder; default: a temporary one, kept if there are findings.')
  config = cli.define_config()
  time_budget = flags.DEFINE_float('time_budget', 40., 'Minutes of training on the data in the soak.', lower_bound=.1)

  def main() -> int:
    if unknown := [s for s in suites.value if s not in (*SUITES, SOAK)]:
      raise UsageError(f'--suites: {unknown[0]!r} is unknown; {nearest(unknown[0], (*SUITES, SOAK))}.')
    others, with_soak = [s for s in suites.value if s != SOAK], SOAK in suites.value
    if with_soak and not flags.FLAGS['config'].present:
      raise UsageError('--suites=soak needs --config, for example --config=configs/embedded.py.')
    folder = pathlib.Path(workdir.value or tempfile.mkdtemp(prefix='stress_')).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    size = QUICK if quick.value else Size(num_kills.value, num_saves.value, num_inputs.value, num_commands.value)
    code = run(others, size, seed.value, folder, keep=workdir.value is not None or with_soak) if others else 0
    return max(code, soak(config, time_budget.value, folder)) if with_soak else code

  return main


if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # otherwise it is the folder of this file
  cli.run(_main())
