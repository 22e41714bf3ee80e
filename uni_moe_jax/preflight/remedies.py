"""Changes to a config: a search for one with which it fits in memory, and FSDP where memory traffic bounds a step."""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from uni_moe_jax.parallel import sharding
from uni_moe_jax.preflight.compiled_programs import EVALUATION, Compiler, Config, Program, Which
from uni_moe_jax.preflight.cost import Roofline, roofline
from uni_moe_jax.preflight.topology import Chip
from uni_moe_jax.tasks.router_names import DENSE

_MAX_SINGLE, _MAX_COMBINED = 5, 8  # trials of one change, and of several changes together


@dataclasses.dataclass(frozen=True)
class Change:
  """New values of config fields."""
  fields: Mapping[str, Any]  # by dotted name without 'config.'
  cost: str  # what the change costs, for the report
  repeatable: bool = False  # the change can be made again, with a further value

  def apply(self, config: Config) -> Config:
    """Return a changed copy of the config."""
    changed = config.copy_and_resolve_references()
    for name, value in self.fields.items():
      *path, last = name.split('.')
      functools.reduce(operator.getitem, path, changed)[last] = value
    return changed

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(self.fields)


@dataclasses.dataclass(frozen=True)
class Trial:
  """One or several changes that were compiled together."""
  changes: tuple[Change, ...]
  needs: float | None  # bytes per device of the program that needed most before; None if they were not reported
  too_large: str = ''  # name of a program that still does not fit; '' if all of them fit

  @property
  def fits(self) -> bool:
    return not self.too_large

  @property
  def flags(self) -> str:
    """See `as_flags`."""
    return as_flags(field for change in self.changes for field in change.fields.items())


FSDP = Change({'mesh.fsdp': True}, 'parameters are gathered in every layer')


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The training step whose roofline is highest, with and without a change."""
  step: str  # name of the program
  change: Change
  before: Roofline
  after: Roofline


def as_flags(fields: Iterable[tuple[str, Any]]) -> str:
  """Format fields as flags; names that are no identifiers ('masked words') as lines of the config file."""
  flags, lines = [], []
  for name, value in fields:
    parts = name.split('.')
    if all(p.isidentifier() for p in parts):
      flags.append(f'--config.{name}={value}')
    else:
      lines.append('config' + ''.join(f'.{p}' if p.isidentifier() else f'[{p!r}]' for p in parts) + f' = {value!r}')
  return ', '.join([' '.join(flags)] * bool(flags) + [f'in the config file: {"; ".join(lines)}'] * bool(lines))


def batch_unit(config: Config, task: str, shards: int) -> int:
  """Return the divisor of a task's batch: micro-steps × shards, × 2 if examples are mixed in pairs."""
  t = config.tasks[task]
  return shards * config.train.grad_accum_steps * (2 if t.mixup_alpha or t.cutmix_alpha else 1)


def scale_batches(config: Config, shards: int, factor: float) -> Config:
  """Return a copy with batches scaled by about `factor`: to multiples of `batch_unit`, at least one."""
  scaled = config.copy_and_resolve_references()
  for name, t in scaled.tasks.items():
    if t.batch_size:
      unit = batch_unit(config, name, shards)
      t.batch_size = max(1, round(t.batch_size * factor / unit)) * unit
  return scaled


def candidates(config: Config, mesh: Mapping[str, int], evaluation: bool = False) -> Iterator[Change]:
  """Yield the changes that a config admits: those that cost speed first, other trainings last.

  mesh: size per axis. evaluation: evaluation does not fit, as opposed to a training step.
  """
  m, shards = config.model, sharding.batch_shards(mesh)
  if evaluation:
    halved = {f'evaluators.{n}.batch_size': e.batch_size // 2 for n, e in config.evaluators.items() if e.batch_size > 1}
    if halved:
      yield Change(halved, 'evaluation in twice as many calls', repeatable=True)
  elif not m.remat:
    yield Change({'model.remat': True}, 'a third more work')
  if m.dtype == 'float32':
    yield Change({'model.dtype': 'bfloat16'}, 'products in bfloat16')
  if _admits_fsdp(config, mesh):
    yield FSDP
  # A new axis takes devices from the data axis. That needs an inferred data axis, and only one axis can be inferred.
  is_inferred = any(config.mesh[a] == -1 for a in sharding.AXES)
  inferred = {} if is_inferred else {'mesh.data': -1}
  can_split = not is_inferred or config.mesh.data == -1
  experts = math.gcd(config.moe.num_experts, mesh['data'])
  if config.moe.router != DENSE and mesh['expert'] == 1 and experts > 1 and can_split:
    yield Change({**inferred, 'mesh.expert': experts}, 'merged kernels or tokens are sent over the expert axis')
  trained = [n for n, t in config.tasks.items() if t.batch_size]
  if not evaluation and config.train.mixture == 'all_tasks' and all(
      config.tasks[n].batch_size % (2 * batch_unit(config, n, shards)) == 0 for n in trained):
    yield Change({'train.grad_accum_steps': 2 * config.train.grad_accum_steps},
                 'twice as many micro-steps; negatives come from one micro-step', repeatable=True)
  if mesh['model'] == 1 and m.num_heads % 2 == m.mlp_dim % 2 == mesh['data'] % 2 == 0 and can_split:
    yield Change({**inferred, 'mesh.model': 2}, 'activations are reduced twice in every layer')
  half = scale_batches(config, shards, 0.5)
  halved = {f'tasks.{n}.batch_size': half.tasks[n].batch_size for n in trained
            if half.tasks[n].batch_size < config.tasks[n].batch_size}
  if halved and not evaluation:
    yield Change(halved, 'half the batch where possible; the training differs', repeatable=True)


def _admits_fsdp(config: Config, mesh: Mapping[str, int]) -> bool:
  return not config.mesh.fsdp and mesh['data'] > 1 and config.model.width % mesh['data'] == 0


def steps_by_need(programs: Mapping[Which, Program], memory: float) -> list[Which]:
  """Return the training steps, the one that needs most memory (or too much, but unknown) first."""
  size = lambda p: (not p.fits(memory), math.inf if p.needs is None else p.needs)
  return sorted((w for w in programs if w != EVALUATION), key=lambda w: size(programs[w]), reverse=True)


def compare_fsdp(
    compiler: Compiler, config: Config, programs: Mapping[Which, Program], chip: Chip) -> Comparison | None:
  """Compile the step whose roofline is highest with FSDP, which moves less memory: every device updates a part.

  None: the config has FSDP or does not admit it, something else bounds that step, or there is no time to compile it.
  programs: of the config, all of which fit.
  """
  limits = {which: limit for which, p in programs.items() if which != EVALUATION and (limit := roofline(p.cost, chip))}
  which = max(limits, key=lambda w: limits[w].seconds, default=EVALUATION)
  if (which == EVALUATION or limits[which].bound != 'memory' or not _admits_fsdp(config, compiler.mesh(config))
      or not compiler.has_time([which])):
    return None
  changed = compiler.program(FSDP.apply(config), which, ', with FSDP')
  after = roofline(changed.cost, chip)
  return after and Comparison(changed.name, FSDP, limits[which], after)


def search(compiler: Compiler, config: Config, programs: Mapping[Which, Program], memory: float) -> tuple[Trial, ...]:
  """Compile with one change after another, then with several together, until every program fits.

  A trial compiles the steps that did not fit, and evaluation, which a change for a step may enlarge (an expert axis
  gathers tokens there). If only evaluation did not fit, it compiles evaluation and the largest step. If the last trial
  fits, it is the remedy. programs: of the config, one of which does not fit `memory`, the bytes per device.
  """
  steps = steps_by_need(programs, memory)
  failed = [which for which in steps if not programs[which].fits(memory)]
  required = [*failed, EVALUATION] if failed else [EVALUATION, *steps[:1]]
  trials: list[Trial] = []

  def attempt(changes: tuple[Change, ...], changed: Config) -> Trial | None:
    """Return the trial, or None without a compile: the state alone is too large, or no time is left."""
    if compiler.state_bytes(changed) >= memory or not compiler.has_time(required):
      return None
    compiled: list[Program] = []
    for which in required:
      compiled.append(compiler.program(changed, which, ', with a change'))
      if not compiled[-1].fits(memory):
        break
    trials.append(Trial(changes, compiled[0].needs, '' if compiled[-1].fits(memory) else compiled[-1].name))
    return trials[-1]

  is_evaluation = lambda trial: trial.too_large.startswith(EVALUATION[0])
  before, useless = programs[required[0]].needs, set()
  combined, changed = (), config
  for change in candidates(config, compiler.mesh(config), evaluation=not failed):
    trial = attempt((change,), change.apply(config)) if len(trials) < _MAX_SINGLE else None
    if trial is None:
      continue
    if trial.fits:
      return tuple(trials)
    if failed and is_evaluation(trial):  # every step fits now: continue from this change
      combined, changed = (change,), change.apply(config)
      break
    if before and trial.needs and trial.needs >= before:  # e.g. a smaller batch where a target set needs most
      useless.add(change.names)
  evaluation = bool(combined) or not failed
  for _ in range(_MAX_COMBINED):
    made = {c.names for c in combined}
    change = next((c for c in candidates(changed, compiler.mesh(changed), evaluation)
                   if c.names not in useless and (c.repeatable or c.names not in made)), None)
    if change is None:
      break
    # A repeated change replaces its former value.
    combined = (*(c for c in combined if c.names != change.names), change)
    changed = change.apply(changed)
    if combined not in [t.changes for t in trials] and (trial := attempt(combined, changed)):
      evaluation = is_evaluation(trial)
      if trial.fits:
        break
  return tuple(trials)
