"""Task interference: how much a step on task j changes the loss of task i, by gradient direction.

With ĝ = g/‖g‖ over a set of parameters and N independent batches a, b per task (Zhu et al., Uni-Perceiver-MoE, the section on
task interference; theirs averages ratios, see `Estimate`):

  Δ_{j→i}(a) = g_i^a · mean_b ĝ_j^b,   I(i, j) = mean_a Δ_{j→i}(a) / mean_a Δ_{i→i}(a).

Δ is what a short step against task j's mean direction takes from the loss of task i, per unit of step size; I compares it
with what a step on task i itself takes. I < 0: steps on j hurt i. Where i and j share their batches, i = j above all, the
mean is without b = a: a gradient agrees with itself however noisy it is.

Gradients are streamed in two passes: the first adds up gradients and unit gradients, the second multiplies each gradient with
the sums. In memory are a few sums per task of the size of the parameters that are asked about, whatever N is.

Axis letters here: P parts, T tasks, N batches, R resamples.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uni_moe_jax.analysis import interference_file
from uni_moe_jax.utils.errors import UsageError

WHOLE = 'all'  # the part that holds every parameter that was asked about
CONFIDENCE = 0.95
_AT_ONCE = 200  # resamples in memory

Parts = dict[str, Any]  # part → tree of gradients


@dataclasses.dataclass(frozen=True)
class Products:
  """Inner products over one part of the parameters, for every pair of a harmed task i and a stepped task j.

  Attributes:
    rows: f32 [T, T, N], rows[i, j, a] = Δ_{j→i}(a).
    columns: f32 [T, T, N], columns[i, j, b] = mean_a g_i^a · ĝ_j^b (without a = b where i and j share their batches): what
      the b-th direction of j takes from i. Over the last axis it has the mean of `rows`.
  """
  rows: jax.Array
  columns: jax.Array


@dataclasses.dataclass(frozen=True)
class Interval:
  """Values with the bounds of their 95 % bootstrap intervals; NaN where a ratio has no base."""
  value: np.ndarray
  low: np.ndarray
  high: np.ndarray


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What was measured for one part: [T, T] (harmed, stepped), and two scalars.

  Attributes:
    delta: mean_a Δ_{j→i}(a). Its diagonal is the base of the ratios: where its interval reaches 0, the row says nothing.
    ratio_of_means: I(i, j) = mean_a Δ_{j→i}(a) / mean_a Δ_{i→i}(a).
    mean_of_ratios: mean_a [Δ_{j→i}(a) / Δ_{i→i}(a)], as the published notebook has it; a batch whose own Δ is near 0 rules it.
    between: mean of ratio_of_means over pairs of different tasks, in the rows that have a base; NaN of none.
    negative: share of these pairs that is below 0. Resampling makes pairs near 0 change sides, so that its interval is wide.
  """
  delta: Interval
  ratio_of_means: Interval
  mean_of_ratios: Interval
  between: Interval
  negative: Interval


def products(
    gradient: Callable[[str, int], Parts], tasks: Sequence[str], batches: int, streams: Sequence[str] = ()
) -> dict[str, Products]:
  """Measures every pair of tasks.

  Args:
    gradient: (task, batch) → gradient of the task's loss on its batch 0…N-1, in parts. It is asked twice for each, in the
      order of the batches, and must answer the same.
    tasks: T names.
    batches: N, at least 2.
    streams: per task, a name of where its batches come from: tasks of one stream share their batches. By default each task
      has its own.

  Returns:
    {part: Products}, `WHOLE` first. They stay on the device: nothing here waits for them.

  Raises:
    UsageError: too few batches.
  """
  if batches < 2:
    raise UsageError(f'batches={batches} must be at least 2: a task is compared with itself on another batch.')
  streams = list(streams or tasks)
  units, sums = [], []  # per task: Σ_b ĝ^b, Σ_a g^a
  for task in tasks:
    g = gradient(task, 0)
    total = _units(g), jax.tree.map(jnp.copy, g)  # a copy: what is added to is donated
    for b in range(1, batches):
      total = _add(*total, gradient(task, b))
    units.append(total[0])
    sums.append(total[1])

  rows = [[None] * batches for _ in tasks]
  columns = [[None] * batches for _ in tasks]
  for stream in dict.fromkeys(streams):
    members = [k for k, s in enumerate(streams) if s == stream]
    for b in range(batches):
      here = {k: gradient(tasks[k], b) for k in members}
      for k, g in here.items():
        row, column = _against(g, units, sums)
        count = np.full((1, len(tasks)), batches, np.float32)
        for m, other in here.items():  # leave out the product of two gradients of one batch
          own_row, own_column = _pair(g, other)
          row, column = row.at[:, m].add(-own_row), column.at[:, m].add(-own_column)
          count[0, m] -= 1
        rows[k][b], columns[k][b] = row / count, column / count
  rows, columns = (jnp.array([jnp.stack(of_task, -1) for of_task in x]) for x in (rows, columns))  # [T, P, T, N]
  # The batch is that of the first axis: of the harmed task among the rows, of the stepped one among the columns.
  return {part: Products(rows[:, p], columns[:, p].swapaxes(0, 1)) for p, part in enumerate((WHOLE, *sorted(sums[0])))}


def estimate(measured: Products, streams: Sequence[str], resamples: int = 2000, seed: int = 0) -> Estimate:
  """Both ratios with percentile intervals from resampling batches.

  The batches of every stream are drawn anew with replacement, for what they do as harmed and as stepped ones. A resampled
  mean direction would need all T·N gradients at once; its effect on Δ_{j→i}(a) is taken as its effect on the mean over a,
  which `columns` holds: exact for ratio_of_means but for products of both resamplings, which are of order 1/N.

  Args:
    measured: of one part.
    streams: as `products` got them; the task names where each task has its own batches.
    resamples: R.
    seed: of the resampling.
  """
  rows, columns = np.asarray(measured.rows, np.float64), np.asarray(measured.columns, np.float64)
  N = rows.shape[-1]
  names = list(dict.fromkeys(streams))
  place = [names.index(s) for s in streams]
  rng = np.random.default_rng(seed)
  value = _ratios(rows, columns, np.ones((1, len(place), N)))  # each [1, T, T]
  drawn = []
  for start in range(0, resamples, _AT_ONCE):
    counts = rng.multinomial(N, np.full(N, 1 / N), (min(_AT_ONCE, resamples - start), len(names)))
    drawn.append(_ratios(rows, columns, counts[:, place].astype(np.float64)))
  drawn = [np.concatenate(draws) for draws in zip(*drawn)]  # each [R, T, T]
  delta, ratio, mean = (_interval(middle, draws) for middle, draws in zip(value, drawn))
  sure = interference_file.has_base({'delta': vars(delta)})
  pairs = np.array(sure)[:, None] & ~np.eye(len(place), dtype=bool)
  if not pairs.any():
    nothing = Interval(*[np.array(np.nan)] * 3)
    return Estimate(delta, ratio, mean, nothing, nothing)
  middle, draws = value[1][:, pairs], drawn[1][:, pairs]  # [·, pairs]
  return Estimate(delta, ratio, mean, _interval(middle.mean(-1), draws.mean(-1)),
                  _interval((middle < 0).mean(-1), (draws < 0).mean(-1)))


def _interval(value: np.ndarray, draws: np.ndarray) -> Interval:
  """value: [1, …], draws: [R, …]."""
  tail = (1 - CONFIDENCE) / 2
  return Interval(value[0], *np.quantile(draws, (tail, 1 - tail), axis=0))


def _ratios(rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
  """(delta, ratio of means, mean of ratios) [R, T, T], each batch of each task counted `weights` [R, T, N] times."""
  N, diagonal = rows.shape[-1], np.arange(len(rows))
  shift = np.einsum('rjb,ijb->rij', weights - 1, columns) / N
  delta = np.einsum('ria,ija->rij', weights, rows) / N + shift
  each = rows + shift[..., None]  # [R, T, T, N]
  with np.errstate(divide='ignore', invalid='ignore'):
    ratio = delta / delta[:, diagonal, diagonal, None]
    mean = np.einsum('ria,rija->rij', weights / N, each / each[:, diagonal, diagonal, None])
  return delta, np.where(np.isfinite(ratio), ratio, np.nan), np.where(np.isfinite(mean), mean, np.nan)


def _parts(g: Parts) -> Parts:
  return {WHOLE: g, **g}


def _inverse(tree: Any) -> jax.Array:
  """1 / norm; 0 of a gradient that is zero: it has no direction."""
  norm = optax.tree.norm(tree)
  return jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)


@jax.jit
def _units(g: Parts) -> Parts:
  """ĝ of every part, the whole included."""
  return {part: optax.tree.scale(_inverse(tree), tree) for part, tree in _parts(g).items()}


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _add(units: Parts, total: Parts, g: Parts) -> tuple[Parts, Parts]:
  return jax.tree.map(jnp.add, units, _units(g)), jax.tree.map(jnp.add, total, g)


@jax.jit
def _against(g: Parts, units: list[Parts], sums: list[Parts]) -> tuple[jax.Array, jax.Array]:
  """([P, T] g · Σ_b ĝ_j^b, [P, T] ĝ · Σ_a g_i^a)."""
  rows = [[optax.tree.vdot(tree, u[part]) for u in units] for part, tree in _parts(g).items()]
  columns = [[_inverse(tree) * optax.tree.vdot(tree, _parts(s)[part]) for s in sums] for part, tree in _parts(g).items()]
  return jnp.array(rows), jnp.array(columns)


@jax.jit
def _pair(g: Parts, other: Parts) -> tuple[jax.Array, jax.Array]:
  """([P] g · ĝ_other, [P] ĝ · g_other)."""
  both = [(_inverse(a), _inverse(b), optax.tree.vdot(a, b)) for a, b in zip(_parts(g).values(), _parts(other).values())]
  return jnp.array([b * dot for _, b, dot in both]), jnp.array([a * dot for a, _, dot in both])
