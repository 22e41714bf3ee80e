"""The subjects of launch/faults.py, one after the other, with what they print."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence

from uni_moe_jax import failures
from uni_moe_jax.faults import damage, inputs, kills, moves, planted, stops
from uni_moe_jax.train import manifest
from uni_moe_jax.train.workdir import CHECKPOINTS


@dataclasses.dataclass(frozen=True)
class Amounts:
  """How many kills, how many of them at least inside a save, inputs and commands; planted: which faults; journey: of moves."""
  kills: int
  saves: int
  inputs: int
  commands: int
  planted: tuple[str, ...] = tuple(planted.FAULTS)
  journey: moves.Journey = moves.FULL


QUICK = Amounts(4, 2, 600, 6, ('one_bit', 'no_sums'), moves.SHORT)
_PLANTED_KILLS, _PLANTED_SAVES = 3, 1


def run(subjects: Sequence[str], amounts: Amounts, seed: int, folder: pathlib.Path, keep: bool) -> int:
  """Runs the subjects in `folder`, which stays if something is found, or on request. Returns the exit code."""
  print(f'seed {seed}, in {folder}', flush=True)
  work = _Work(amounts, seed, folder)
  findings = [f'{name}: {finding}' for name in subjects for finding in getattr(work, name)()]
  for finding in findings:
    print(f'FOUND {finding}')
  print(f'{len(findings)} findings' if findings else 'nothing was lost, read wrongly or left unsaid', flush=True)
  if not findings and not keep:
    shutil.rmtree(folder, ignore_errors=True)
  return 1 if findings else 0


class _Work:
  """Each public method is a subject: it prints its counts and returns its findings."""

  def __init__(self, amounts: Amounts, seed: int, folder: pathlib.Path):
    self._amounts, self._seed, self._folder = amounts, seed, folder
    self._undisturbed: tuple[pathlib.Path, float] | None = None

  def kills(self) -> list[str]:
    whole, seconds = self._whole()
    with _timed('kills') as say:
      tally = kills.series(kills.Trainer(self._folder), whole, seconds, self._amounts.kills, self._amounts.saves, self._seed)
      say(_told(tally))
    return tally.findings

  def damage(self) -> list[str]:
    whole, _ = self._whole()
    with _timed('damage') as say:
      counts, findings = damage.every_file(whole, self._folder, self._seed)
      say('\n'.join(f'  {n:6d}  {what}' for what, n in sorted(counts.items())))
    return findings

  def stops(self) -> list[str]:
    whole, _ = self._whole()
    findings = []
    for name, happen in (('hangs', stops.hangs), ('full disk', stops.full_disk)):
      with _timed(name) as say:
        seen, found = happen(kills.Trainer(self._folder), whole)
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
    for name, judge, number in (('inputs', inputs.through_boundary, self._amounts.inputs),
                                ('commands', inputs.through_command_line, self._amounts.commands)):
      with _timed(name) as say:
        result = judge(number, self._seed, self._folder / name)
        say('\n'.join(f'  {n:6d}  {what}' for what, n in sorted(result.counts.items())))
      findings += result.findings
    return findings

  def planted(self) -> list[str]:
    whole, seconds = self._whole()
    missed = []
    for name in self._amounts.planted:
      with _timed(f'planted fault {name!r}') as say:
        found = self._found_without_sums(whole) if name == 'no_sums' else kills.series(
            kills.Trainer(self._folder, name), whole, seconds, _PLANTED_KILLS, _PLANTED_SAVES, self._seed).findings
        say(f'  found: {found[0]}' if found else '  NOT FOUND')
      if not found:
        missed.append(f'{name!r} was not found')
    return missed

  def _found_without_sums(self, whole: pathlib.Path) -> list[str]:
    plain, errors = manifest.damage, os.dup(2)
    planted.FAULTS['no_sums']()
    try:
      with (self._folder / 'no_sums.log').open('wb') as log:
        os.dup2(log.fileno(), 2)  # libraries say much of damaged files, from threads of C++, too
        return damage.every_file(whole, self._folder, self._seed)[1]
    finally:
      os.dup2(errors, 2)
      manifest.damage = plain

  def _whole(self) -> tuple[pathlib.Path, float]:
    """(work directory, seconds) of a run that is left alone; its programs are compiled by one before it."""
    if self._undisturbed is None:
      trainer = kills.Trainer(self._folder)
      for name in ('compiled', 'whole'):
        shutil.rmtree(self._folder / name, ignore_errors=True)
        log = self._folder / f'{name}.log'
        code, seconds = trainer.run(self._folder / name, log)
        if code:
          raise failures.Failure(f'the undisturbed run ended with exit code {code}; see {log}.')
      kept = sorted((self._folder / 'whole' / CHECKPOINTS).iterdir())
      print(f'undisturbed: {seconds:.1f} s, checkpoints {", ".join(p.name for p in kept)}', flush=True)
      self._undisturbed = self._folder / 'whole', seconds
    return self._undisturbed


def _told(tally: kills.Tally) -> str:
  return (f'  {tally.kills} kills, {tally.inside_saves} of them inside a save; {tally.starts} starts, '
          f'{tally.finished} runs came to their end')


@contextlib.contextmanager
def _timed(name: str) -> Iterator:
  began, said = time.monotonic(), []
  yield said.append
  print('\n'.join([f'{name}: {time.monotonic() - began:.0f} s', *said]), flush=True)
