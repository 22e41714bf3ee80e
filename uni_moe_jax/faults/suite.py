"""The subjects of launch/faults.py, one after the other, with what they print."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence

from uni_moe_jax.faults import bad_files, damage, inputs, kills, moves, planted, stops
from uni_moe_jax.faults.kills import Undisturbed
from uni_moe_jax.train import manifest
from uni_moe_jax.train.workdir import CHECKPOINTS
from uni_moe_jax.utils.errors import RunError


@dataclasses.dataclass(frozen=True)
class Amounts:
  """How many kills, how many of them at least inside a save, inputs and commands.

  Attributes:
    planted_kills: for each planted fault. steps: of each run. journey: of moves.
    optimised: whether runs are compiled as people's are, see `kills.Trainer`; but for those of moves.
  """
  kills: int
  saves: int
  inputs: int
  commands: int
  planted_kills: int = 3
  steps: int = 200
  journey: moves.Journey = moves.FULL
  optimised: bool = True


QUICK = Amounts(3, 1, 600, 6, planted_kills=1, steps=60, journey=moves.SHORT, optimised=False)
_PLANTED_SAVES = 1
_TRIES = 3  # kills may come too early to bring a planted fault to light


def run(subjects: Sequence[str], amounts: Amounts, seed: int, folder: pathlib.Path, keep: bool) -> int:
  """Runs the subjects in `folder`, which stays if something is found, or on request. Returns the exit code."""
  print(f'seed {seed}, in {folder}', flush=True)
  work = _Work(amounts, seed, folder)
  findings = [f'{name}: {finding}' for name in subjects for finding in getattr(work, name)()]
  for finding in findings:
    print(f'FOUND {finding}')
  for untried in work.untried:
    print(f'NOT TRIED {untried}')
  if findings:
    print(f'{len(findings)} findings', flush=True)
  elif work.untried:
    print('no findings in what was tried', flush=True)
  else:
    print('nothing was lost, read wrongly or left unsaid', flush=True)
  if not findings and not keep:
    shutil.rmtree(folder, ignore_errors=True)
  return 1 if findings else 0


class _Work:
  """Each public method is a subject: it prints its counts and returns its findings."""

  def __init__(self, amounts: Amounts, seed: int, folder: pathlib.Path):
    self._amounts, self._seed, self._folder = amounts, seed, folder
    self._trainer = kills.Trainer(folder, overrides=(f'train.steps={amounts.steps}',), optimised=amounts.optimised)
    self._undisturbed: Undisturbed | None = None
    self.untried: list[str] = []

  def kills(self) -> list[str]:
    whole = self._whole()
    with _timed('kills') as say:
      tally = kills.series(self._trainer, whole, self._amounts.kills, self._amounts.saves, self._seed)
      say(_told(tally))
    return tally.findings

  def damage(self) -> list[str]:
    whole = self._whole().workdir
    with _timed('damage') as say:
      counts, findings = damage.every_file(whole, self._folder, self._seed)
      say('\n'.join(f'  {n:6d}  {what}' for what, n in sorted(counts.items())))
    with _timed('trained on damage') as say:
      seen, found = damage.trained_on(self._trainer, whole, self._seed)
      say('\n'.join(f'  {line}' for line in seen))
    return findings + found

  def stops(self) -> list[str]:
    one = self._whole().workdir
    two, findings = stops.two_undisturbed(self._trainer)
    tried = [('hangs', stops.hangs, one), ('full disk', stops.full_disk, one)]
    if not findings:
      tried += [('dead process', stops.dead_process, two), ('failed process', stops.failed_process, two)]
    for name, happen, whole in tried:
      with _timed(name) as say:
        try:
          seen, found = happen(self._trainer, whole)
        except stops.NotTried as e:
          self.untried.append(str(e))
          seen, found = [f'not tried: {e}'], []
        say('\n'.join(f'  {line}' for line in seen))
      findings += found
    return findings

  def moves(self) -> list[str]:
    with _timed('moves') as say:
      seen = moves.travel(self._amounts.journey, self._folder / 'moves')
      say('\n'.join(f'  {line}' for line in seen.said))
    return seen.findings

  def inputs(self) -> list[str]:
    findings = []
    if not bad_files.HAVE_VIDEO:
      self.untried.append('clips but of arrays: the extra `video` is not installed')
    for name, judge, number in (('inputs', inputs.through_boundary, self._amounts.inputs),
                                ('commands', inputs.through_command_line, self._amounts.commands)):
      with _timed(name) as say:
        result = judge(number, self._seed, self._folder / name)
        say('\n'.join(f'  {n:6d}  {what}' for what, n in sorted(result.counts.items())))
      findings += result.findings
    return findings

  def planted(self) -> list[str]:
    missed = []
    for name, (_, words) in planted.FAULTS.items():
      with _timed(f'planted fault {name!r}') as say:
        for attempt in range(_TRIES):
          found = self._found(name, self._seed + attempt)
          if right := [f for f in found if words in f]:
            break
        say(f'  found: {right[0]}' if right else f'  NOT FOUND; {found[0] if found else "nothing was"}')
      if not right:
        missed.append(f'{name!r} was not found ({words!r}){f", but {found[0]}" if found else ""}')
    return missed

  def _found(self, name: str, seed: int) -> list[str]:
    """What the checks say of a trainer with a planted fault."""
    whole = self._whole()
    if name == 'no_sums':
      return self._found_without_sums(whole.workdir)
    trainer = dataclasses.replace(self._trainer, plant=name)
    return kills.series(trainer, whole, self._amounts.planted_kills, _PLANTED_SAVES, seed).findings

  def _found_without_sums(self, whole: pathlib.Path) -> list[str]:
    plain, errors = manifest.damage, os.dup(2)
    planted.FAULTS['no_sums'][0]()
    try:
      with (self._folder / 'no_sums.log').open('wb') as log:
        os.dup2(log.fileno(), 2)  # libraries say much of damaged files, from threads of C++, too
        return damage.every_file(whole, self._folder, self._seed, ('bit flipped',))[1]
    finally:
      os.dup2(errors, 2)
      manifest.damage = plain

  def _whole(self) -> Undisturbed:
    """A run that is left alone; its programs are compiled by one before it."""
    if self._undisturbed is None:
      workdir, log = self._folder / 'whole', self._folder / 'whole.log'
      shutil.rmtree(workdir, ignore_errors=True)
      if code := self._trainer.compile(log):
        raise RunError(f'compiling: {kills.ending(code)}; see {log}.')
      code, seconds = self._trainer.run(workdir, log)
      if code:
        raise RunError(f'the undisturbed run: {kills.ending(code)}; see {log}.')
      kept = sorted((workdir / CHECKPOINTS).iterdir())
      self._undisturbed = Undisturbed(workdir, seconds, kills.save_seconds(workdir))
      print(f'undisturbed: {seconds:.1f} s, checkpoints {", ".join(p.name for p in kept)}, a save takes '
            f'{self._undisturbed.save_seconds:.2f} s', flush=True)
    return self._undisturbed


def _told(tally: kills.Tally) -> str:
  stages = ', '.join(f'{what} {n}' for what, n in sorted(tally.stages.items()))
  return (f'  {tally.kills} kills, {tally.before_steps} of them before the first step, {tally.inside_saves} inside a save'
          f'{f" ({stages})" if stages else ""}; {tally.starts} starts, {tally.finished} runs came to their end')


@contextlib.contextmanager
def _timed(name: str) -> Iterator:
  began, said = time.monotonic(), []
  yield said.append
  print('\n'.join([f'{name}: {time.monotonic() - began:.0f} s', *said]), flush=True)
