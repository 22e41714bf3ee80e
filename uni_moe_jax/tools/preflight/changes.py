"""What could be changed in a config that does not fit, the cheapest first. Each is tried by compiling it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import ml_collections

from uni_moe_jax.parallel import sharding
from uni_moe_jax.tools.preflight import fit

Config = ml_collections.ConfigDict
_SINGLES, _TOGETHER = 5, 4  # how often one change, and several together, are compiled at most
_HOPE = 1.2  # times the memory: what savings add up to is not exact


@dataclasses.dataclass(frozen=True)
class Change:
  """Fields of a config and their new values, and what the change costs."""
  fields: tuple[tuple[str, object], ...]
  costs: str
  again: bool = False  # it can be made again, further

  def apply(self, config: Config) -> Config:
    """A copy of the config, changed."""
    out = config.copy_and_resolve_references()
    for name, value in self.fields:
      *path, last = name.split('.')
      node = out
      for part in path:
        node = node[part]
      node[last] = value
    return out

  @property
  def name(self) -> str:
    """Which fields it changes."""
    return ' '.join(name for name, _ in self.fields)

  @property
  def flags(self) -> str:
    """See `typed`."""
    return typed(self.fields)


def typed(fields: Iterable[tuple[str, object]]) -> str:
  """Fields and their values as on the command line; those with a name that no flag can have (an evaluator may be 'masked words'),
  as lines of the config file."""
  flags, lines = [], []
  for name, value in fields:
    parts = name.split('.')
    if all(p.isidentifier() for p in parts):
      flags.append(f'--config.{name}={value}')
    else:
      lines.append('config' + ''.join(f'.{p}' if p.isidentifier() else f'[{p!r}]' for p in parts) + f' = {value!r}')
  return ', '.join([' '.join(flags)] * bool(flags) + [f'in the config file: {"; ".join(lines)}'] * bool(lines))


def candidates(config: Config, mesh: Mapping[str, int], evaluation: bool = False) -> Iterator[Change]:
  """Changes that a config admits, in the order in which to try them: first what costs some speed, last what trains differently.

  Args:
    config: that does not fit. mesh: size per axis, as it is now. evaluation: it is evaluation that does not fit, and not the step.
  """
  m, shards = config.model, mesh['replica'] * mesh['data'] * mesh['expert']
  if evaluation:
    fields = tuple((f'evaluators.{n}.batch_size', e.batch_size // 2) for n, e in config.evaluators.items() if e.batch_size > 1)
    if fields:
      yield Change(fields, 'evaluation in twice as many calls', again=True)
  elif not m.remat:
    yield Change((('model.remat', True),), 'a third more work')
  if m.dtype == 'float32':
    yield Change((('model.dtype', 'bfloat16'),), 'products in bfloat16')
  if not config.mesh.fsdp and mesh['data'] > 1 and m.width % mesh['data'] == 0:
    yield Change((('mesh.fsdp', True),), 'parameters are gathered in every layer')
  axis = math.gcd(config.moe.num_experts, mesh['data'])
  # The data axis gives what another axis takes; where a further one is inferred, both cannot be.
  is_inferred = any(config.mesh[a] == -1 for a in sharding.AXES)
  inferred = () if is_inferred else (('mesh.data', -1),)
  gives = not is_inferred or config.mesh.data == -1
  if config.moe.router != 'dense' and mesh['expert'] == 1 and axis > 1 and gives:
    yield Change((*inferred, ('mesh.expert', axis)), 'merged kernels, or tokens, cross the expert axis')
  trained = [n for n, t in config.tasks.items() if t.batch_size]
  if not evaluation and config.train.mixture == 'all_tasks' and all(
      config.tasks[n].batch_size % (2 * fit.unit(config, n, shards)) == 0 for n in trained):
    yield Change((('train.grad_accum_steps', 2 * config.train.grad_accum_steps),), 'twice as many micro-steps; negatives are those of a micro-step',
                 again=True)
  if mesh['model'] == 1 and m.num_heads % 2 == m.mlp_dim % 2 == mesh['data'] % 2 == 0 and gives:
    yield Change((*inferred, ('mesh.model', 2)), 'activations are reduced twice in every layer')
  less = fit.scaled(config, shards, 0.5)
  fields = tuple((f'tasks.{n}.batch_size', less.tasks[n].batch_size) for n in trained if less.tasks[n].batch_size < config.tasks[n].batch_size)
  if fields and not evaluation:
    yield Change(fields, 'half the batch, where it can be halved: another training', again=True)


@dataclasses.dataclass(frozen=True)
class Trial:
  """A change, or several together, that was tried.

  Attributes:
    changes: made to the config.
    needs: bytes of a device, of the program that needed most before; None where the compiler did not say.
    lacks: name of a program that does not fit, '' where all do that must.
  """
  changes: tuple[Change, ...]
  needs: float | None
  lacks: str = ''

  @property
  def fits(self) -> bool:
    return not self.lacks


def cheapest(
    config: Config, needs: float | None, mesh_of: Callable[[Config], Mapping[str, int]], state_of: Callable[[Config], float],
    memory: float, try_it: Callable[[Config], tuple[float | None, str] | None], evaluation: bool = False) -> list[Trial]:
  """Tries changes one by one, then together in their order, until something fits: the last trial says whether it did.

  Args:
    config: that does not fit. needs: bytes that it needs on a device, or None.
    mesh_of: config → size per axis. state_of: config → bytes of the train state on a device, computed and not compiled: where
      that alone is too large, nothing is compiled.
    memory: bytes of a device. try_it: config → `needs` and `lacks` of a `Trial`, or None: there is no time.
    evaluation: see `candidates`.
  """
  trials: list[Trial] = []

  def attempt(changes: tuple[Change, ...], changed: Config) -> bool:
    found = None if state_of(changed) >= memory else try_it(changed)
    if found is None:
      return False
    trials.append(Trial(changes, *found))
    return trials[-1].fits

  saved: dict[str, float] = {}
  useless: set[str] = set()  # what saves nothing: a batch of evaluators, where a target set needs more
  for change in candidates(config, mesh_of(config), evaluation):
    if len(trials) < _SINGLES and attempt((change,), change.apply(config)):
      return trials
    if trials and trials[-1].changes == (change,) and needs and trials[-1].needs:
      saved[change.flags] = needs - trials[-1].needs
      useless |= {change.name} if saved[change.flags] <= 0 else set()
  together, changed, expected = (), config, needs or math.inf
  while len(trials) < _SINGLES + _TOGETHER:
    done = {c.name for c in together}
    follow = next((c for c in candidates(changed, mesh_of(changed), evaluation)
                   if c.name not in useless and (c.name not in done or c.again)), None)
    if follow is None:
      break
    expected -= saved.get(follow.flags, 0.0)
    # A change again, with a larger number, takes the place of the first.
    together = (*(c for c in together if c.name != follow.name), follow)
    changed = follow.apply(changed)
    hopeful = needs is None or expected <= _HOPE * memory or follow.flags not in saved
    if hopeful and together not in [t.changes for t in trials] and attempt(together, changed):
      break
  return trials
