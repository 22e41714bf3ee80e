"""A change with which all of a config fits, and not only the program that needed most.

First what training needs: a change with which every step that did not fit fits. It may make evaluation larger (an expert axis
gathers tokens there), so that evaluation is compiled with it; what it lacks, or lacked from the start, is searched from there.
"""

import dataclasses
from collections.abc import Sequence

import ml_collections

from uni_moe_jax.tools.preflight import changes
from uni_moe_jax.tools.preflight.changes import Trial
from uni_moe_jax.tools.preflight.compiled_programs import EVALUATION, Program, Which
from uni_moe_jax.tools.preflight.compiler import Compiler

Config = ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class Remedy:
  """What was found.

  Attributes:
    trials: what was tried; the last one says whether all that must fit does.
    config, programs: so changed, and what was compiled of it in the place of the own programs; where nothing fits, as given.
  """
  trials: tuple[Trial, ...]
  config: Config
  programs: dict[Which, Program]


def steps(made: dict[Which, Program], memory: float) -> list[Which]:
  """The training steps among programs, the one that is the hardest to fit first."""
  # What the compiler refused without a word may be anything.
  size = lambda p: (not p.fits(memory), float('inf') if p.needs is None else p.needs)
  return sorted((w for w in made if w != EVALUATION), key=lambda w: size(made[w]), reverse=True)


def find(compiler: Compiler, config: Config, made: dict[Which, Program], memory: float) -> Remedy:
  """Searches a change with which the programs that do not fit fit, and those that it may make larger still do.

  Args:
    compiler: for the devices. config: some program of which does not fit. made: all of them. memory: bytes of a device.
  """
  own, largest = Remedy((), config, made), steps(made, memory)
  found, failed = own, [w for w in largest if not made[w].fits(memory)]
  if failed:
    found = _search(compiler, own, failed, memory)
    if not found.trials or not found.trials[-1].fits:
      return found
    evaluated = compiler.program(compiler.prepare(found.config), EVALUATION, ', with what was changed')
    found = dataclasses.replace(found, programs={**found.programs, EVALUATION: evaluated})
    if evaluated.fits(memory):
      return found
    *before, last = found.trials
    found = dataclasses.replace(found, trials=(*before, dataclasses.replace(last, lacks=evaluated.name)))
  again = _search(compiler, found, [EVALUATION, *(failed or largest[:1])], memory)
  done = found.trials[-1].changes if found.trials else ()
  trials = (*found.trials, *(dataclasses.replace(t, changes=(*done, *t.changes)) for t in again.trials))
  return dataclasses.replace(again if trials and trials[-1].fits else own, trials=trials)


def _search(compiler: Compiler, given: Remedy, must: Sequence[Which], memory: float) -> Remedy:
  """A change to a config with which programs fit, the first of which does not."""
  made: dict[Which, Program] = {}
  evaluation = must[0] == EVALUATION

  def attempt(changed: Config) -> tuple[float | None, str] | None:
    again = [w for w in must if w == EVALUATION] if _same_steps(given.config, changed) else must
    if not compiler.has_time([*again, *([] if evaluation else [EVALUATION])]):
      return None
    run = compiler.prepare(changed)
    made.clear()  # of another change
    for which in again:
      made[which] = compiler.program(run, which, ', with a change')
      if not made[which].fits(memory):
        return made[must[0]].needs, made[which].name
    return made[must[0]].needs, ''

  trials = tuple(changes.cheapest(
      given.config, given.programs[must[0]].needs, compiler.mesh, compiler.state, memory, attempt, evaluation))
  if not trials or not trials[-1].fits:
    return dataclasses.replace(given, trials=trials)
  config = given.config
  for change in trials[-1].changes:
    config = change.apply(config)
  return Remedy(trials, config, {**given.programs, **made})


def _same_steps(config: Config, changed: Config) -> bool:
  """Whether two configs differ in their evaluators alone, of which a step knows nothing."""
  config, changed = (c.copy_and_resolve_references() for c in (config, changed))
  changed.evaluators = config.evaluators
  return changed == config
