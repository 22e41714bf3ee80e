"""Task interference: how much a step on task j changes the loss of task i, by gradient direction.

With ĝ = g/‖g‖ over a set of parameters, and N independent batches a and b per task (Zhu et al., Uni-Perceiver-MoE,
section on task interference; their average of ratios is `Estimate.mean_of_ratios`):

  Δ_{j→i}(a) = g_i^a · mean_b ĝ_j^b,   I(i, j) = mean_a Δ_{j→i}(a) / mean_a Δ_{i→i}(a).

Δ is the decrease of the loss of task i by a short step along task j's mean direction, per unit of step size; I
compares it with the decrease by a step on task i itself. I < 0: steps on j hurt i. For i = j the mean leaves out
b = a, because a gradient agrees with itself however noisy it is.

Gradients are streamed in two passes: the first sums gradients and unit gradients, the second multiplies each gradient
with the sums. Memory holds a few sums per task of the size of the selected parameters, whatever N is.

Axis letters: P subsets of the parameters, T tasks, N batches, R resamples.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uni_moe_jax.utils.errors import UsageError

ALL = 'all'  # the subset of all selected parameters
CONFIDENCE = 0.95
_CHUNK = 200  # resamples in memory

Gradient = dict[str, Any]  # subset → tree of arrays


class Products(NamedTuple):
  """Inner products over one subset, for every pair of an affected task i and a task j of the step, f32 [T, T, N].

  The mean over the last axis is the same for both.
  """
  rows: jax.Array  # rows[i, j, a] = Δ_{j→i}(a)
  # columns[i, j, b] = mean_a g_i^a · ĝ_j^b (for i = j without a = b): the decrease of the loss of i along the b-th
  # direction of j.
  columns: jax.Array


@dataclasses.dataclass(frozen=True)
class Interval:
  """Values with the bounds of their 95 % bootstrap intervals; NaN where a ratio has no base."""
  value: np.ndarray
  low: np.ndarray
  high: np.ndarray


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Measurements over one subset: three matrices [T, T] (affected task, task of the step)."""
  # mean_a Δ_{j→i}(a). Its diagonal is the base of the ratios: where its interval reaches 0, the row has no meaning.
  delta: Interval
  ratio_of_means: Interval  # I(i, j) = mean_a Δ_{j→i}(a) / mean_a Δ_{i→i}(a)
  # mean_a [Δ_{j→i}(a) / Δ_{i→i}(a)], as in the published notebook; a batch whose own Δ is near 0 dominates.
  mean_of_ratios: Interval


def products(gradient: Callable[[str, int], Gradient], tasks: Sequence[str], num_batches: int) -> dict[str, Products]:
  """Measures every pair of tasks; returns {subset: Products}, `ALL` first. Does not wait for the device.

  Args:
    gradient: (task, batch) → gradient of the task's loss on its batch 0…N-1, by subset. It is called twice for each,
      in the order of the batches, and must return the same both times.
    tasks: T names.
    num_batches: N.

  Raises:
    UsageError: N is below 2.
  """
  if num_batches < 2:
    raise UsageError(f'num_batches={num_batches} must be at least 2: a task is compared with itself on another batch.')
  totals = []  # per task: (Σ_b ĝ^b, Σ_a g^a)
  for task in tasks:
    g = gradient(task, 0)
    total = _units(g), jax.tree.map(jnp.copy, g)  # a copy: `_add` donates its first arguments
    for b in range(1, num_batches):
      total = _add(*total, gradient(task, b))
    totals.append(total)
  units, sums = zip(*totals, strict=True)

  measured = [jnp.stack([_multiply(gradient(task, b), units, sums, k) for b in range(num_batches)], -1)
              for k, task in enumerate(tasks)]
  counts = num_batches - np.eye(len(tasks), dtype=np.float32)
  # The batch axis belongs to the first task axis: the affected task in `rows`, the task of the step in `columns`.
  rows, columns = (x / counts[:, None, :, None] for x in jnp.stack(measured, 1))  # [T, P, T, N]
  subsets = (ALL, *sorted(sums[0]))
  return {subset: Products(rows[:, p], columns[:, p].swapaxes(0, 1)) for p, subset in enumerate(subsets)}


def estimate(measured: Products, num_resamples: int = 2000, seed: int = 0) -> Estimate:
  """Both ratios with percentile intervals from resampling batches.

  The batches of every task are resampled with replacement, both as affected and as step batches. A resampled mean
  direction would need all T·N gradients at once. Its effect on Δ_{j→i}(a) is approximated by its effect on the mean
  over a, from `columns`: exact for ratio_of_means, except for products of both resamplings, which are of order 1/N.
  """
  rows, columns = np.asarray(measured.rows, np.float64), np.asarray(measured.columns, np.float64)
  T, _, N = rows.shape
  resamples = np.random.default_rng(seed).multinomial(N, np.full(N, 1 / N), (num_resamples, T))
  weights = np.concatenate([np.ones((1, T, N)), resamples])  # first the measurement itself
  chunks = [_ratios(rows, columns, weights[i:i + _CHUNK]) for i in range(0, len(weights), _CHUNK)]
  draws = [np.concatenate(parts) for parts in zip(*chunks, strict=True)]  # each [1 + R, T, T]
  return Estimate(*map(_interval, draws))


def _interval(draws: np.ndarray) -> Interval:
  """draws: [1 + R, …], the value and its resamples."""
  tail = (1 - CONFIDENCE) / 2
  return Interval(draws[0], *np.quantile(draws[1:], (tail, 1 - tail), axis=0))


def _ratios(rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
  """(delta, ratio of means, mean of ratios), each [R, T, T]. weights: [R, T, N], how often each batch counts."""
  N, diagonal = rows.shape[-1], np.arange(len(rows))
  shift = np.einsum('rjb,ijb->rij', weights - 1, columns) / N
  delta = np.einsum('ria,ija->rij', weights, rows) / N + shift
  by_batch = rows + shift[..., None]  # [R, T, T, N]
  with np.errstate(divide='ignore', invalid='ignore'):
    ratio = delta / delta[:, diagonal, diagonal, None]
    mean = np.einsum('ria,rija->rij', weights / N, by_batch / by_batch[:, diagonal, diagonal, None])
  return delta, np.where(np.isfinite(ratio), ratio, np.nan), np.where(np.isfinite(mean), mean, np.nan)


def _inverse_norm(tree: Any) -> jax.Array:
  """1 / norm; 0 for a gradient that is zero, which has no direction."""
  norm = optax.tree.norm(tree)
  return jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)


@jax.jit
def _units(g: Gradient) -> Gradient:
  """ĝ of every subset, `ALL` included."""
  return {subset: optax.tree.scale(_inverse_norm(tree), tree) for subset, tree in {ALL: g, **g}.items()}


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _add(units: Gradient, total: Gradient, g: Gradient) -> tuple[Gradient, Gradient]:
  return jax.tree.map(jnp.add, units, _units(g)), jax.tree.map(jnp.add, total, g)


@jax.jit
def _multiply(g: Gradient, units: Sequence[Gradient], sums: Sequence[Gradient], k: int) -> jax.Array:
  """[2, P, T]: g · Σ_b ĝ_j^b and ĝ · Σ_a g_i^a, without the product of g with itself in the sums of task k."""
  trees = {ALL: g, **g}
  rows = [[optax.tree.vdot(tree, u[subset]) for u in units] for subset, tree in trees.items()]
  columns = [[_inverse_norm(tree) * optax.tree.vdot(tree, {ALL: s, **s}[subset]) for s in sums]
             for subset, tree in trees.items()]
  own = [optax.tree.norm(tree) for tree in trees.values()]
  return jnp.array([rows, columns]).at[:, :, k].add(-jnp.array(own))
