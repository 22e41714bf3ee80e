"""Subjects about parts of a step: sets, optimizer, compile."""

import functools
import time

import jax
import jax.numpy as jnp
import optax
from jax.experimental.compilation_cache import compilation_cache

from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.model import batching
from uni_moe_jax.tools.bench.cases import Context, Repeated
from uni_moe_jax.tools.bench.results_table import Budget, Row
from uni_moe_jax.tools.bench.synthetic import REALISTIC
from uni_moe_jax.tools.bench.timing import estimate, interleaved, ratio
from uni_moe_jax.train.forward import StepSpec
from uni_moe_jax.train.optimizer import make_optimizer
from uni_moe_jax.train.run import Run

_COMPILE, _GROWTH = Budget(60, 30), Budget(1.3)
_COMPILES = 2  # of each depth; they are long


def sets(context: Context) -> list[Row]:
  """Encoding one target set, forward and backward: all rows of the last layer, the rows that are read, length buckets."""
  s = context.sizes
  run = context.synthetic(context.classification(), REALISTIC)
  params, (name,) = run.init().params, run.data.target_sets
  bucketed, padded = run.target_sets()[name]['buckets'], _one_bucket(run.target_sets()[name]['buckets'])
  calls = {
      'padded, all rows': (padded, True), 'padded, read rows only': (padded, False),
      'length buckets, read rows only': (bucketed, False)}
  both = interleaved({k: functools.partial(_set_gradient, run.spec, params, *a) for k, a in calls.items()}, s.rounds)
  once = interleaved({k: functools.partial(_set_features, run.spec, params, *a) for k, a in calls.items()}, s.rounds)
  shapes = ', '.join(f'{len(b["text"])} of {b["text"].shape[1]}' for b in bucketed)
  note = f'{s.names} names of realistic length, attribute routing; buckets: {shapes} tokens'
  rows, first = [], next(iter(calls))
  for mode, seconds in (('forward', once), ('forward and backward', both)):
    rows.append(Row('sets', f'{first}, {mode}', estimate(seconds[first]), 's', note=note))
    rows += [Row('sets', f'{k} / {first}, {mode}', ratio(seconds[k], seconds[first]), 'x', note=note)
             for k in calls if k != first]
  return rows


def _one_bucket(buckets):
  """All entries at the length of the longest."""
  longest = max(b['text'].shape[1] for b in buckets)
  wide = [jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, longest - x.shape[1]))), b) for b in buckets]
  return (jax.tree.map(lambda *parts: jnp.concatenate(parts), *wide),)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _set_features(spec: StepSpec, params, buckets, all_rows: bool) -> jax.Array:
  """[V, D] features of a set's entries, in the order of the buckets."""
  [s] = spec.plan.sets

  def run(model):
    in_place = jnp.arange(sum(b['text'].shape[0] for b in buckets))
    rows = model.encode(batching.set_sequences(s.name, s.condition, buckets, in_place), all_rows=all_rows).hidden
    return jnp.concatenate([model.features(r[:, 0]) for r in rows])
  return spec.model.apply({'params': params}, method=run)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _set_gradient(spec: StepSpec, params, buckets, all_rows: bool):
  """Gradient of the parameters for a cotangent as a loss would send."""
  return jax.grad(lambda p: jnp.square(_set_features(spec, p, buckets, all_rows)).mean())(params)


def optimizer(context: Context) -> list[Row]:
  """AdamW on the MoE model's parameters, with the clip and without, as a share of the train step."""
  config = context.pictures_and_names()
  step = Repeated(context.synthetic(config))
  calls = {'step': step, 'AdamW with clip': _Update(step.run, 1.0), 'AdamW without clip': _Update(step.run, 0.0)}
  seconds = interleaved(calls, context.sizes.rounds)
  total = step.run.parameter_counts()['total']
  note = f'{total:,} parameters, attribute routing; step: B {context.sizes.batch_size} of `routers`, with clip'
  rows = [Row('optimizer', 'train step', estimate(seconds['step']), 's', note=note)]
  for name in calls:
    if name != 'step':
      share = ratio(100 * seconds[name], seconds['step'])
      rows += [Row('optimizer', name, estimate(seconds[name]), 's', note=note),
               Row('optimizer', f'{name}, share of the step', share, '%', note=note)]
  return rows


class _Update:
  """The optimizer alone, on gradients that stay what they are; parameters and moments are donated."""

  def __init__(self, run: Run, clip: float):
    config = run.config.copy_and_resolve_references()
    config.optim.grad_clip_norm = clip
    tx = make_optimizer(config, run.shapes.params)[0]

    def update(params, moments, gradients):
      updates, moments = tx.update(gradients, moments, params)
      return optax.apply_updates(params, updates), moments

    self._update = jax.jit(update, donate_argnums=(0, 1))
    self._params = run.init().params
    self._gradients = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3, p.dtype), self._params)
    self._moments = jax.jit(tx.init)(self._params)

  def __call__(self):
    self._params, self._moments = self._update(self._params, self._moments, self._gradients)
    return self._params


def compile_(context: Context) -> list[Row]:
  """Compile time of the whole step of the config's tasks at two depths, without any cache."""
  s = context.sizes
  small, large = s.compiled_layers
  _compile_seconds(context, small)  # the first of a process pays for what the others find
  seconds = {small: [], large: []}
  for i in range(min(s.rounds, _COMPILES)):  # one that has compiled much is slower: neither depth always comes later
    for layers in (small, large) if i % 2 == 0 else (large, small):
      seconds[layers].append(_compile_seconds(context, layers))
  kinds = sorted({t.type.name for t in make_plan(context.own_config()).tasks})
  where = f'{len(context.devices)} {context.devices[0].platform} device{"s" * (len(context.devices) > 1)}'
  note = (f"the config's step at D {s.width} on {where}; tracing, lowering and compiling, after one compile that is not counted; "
          f'kinds: {", ".join(kinds)}')
  return [
      Row('compile', f'{small} layers, all tasks, cold', estimate(seconds[small]), 's', _COMPILE, note),
      Row('compile', f'{large} layers, all tasks, cold', estimate(seconds[large]), 's', None, note),
      Row('compile', f'{large} layers / {small} layers', ratio(seconds[large], seconds[small]), 'x', _GROWTH, note)]


def _compile_seconds(context: Context, layers: int) -> float:
  s = context.sizes
  config = context.own_config(num_layers=layers, width=s.width, num_heads=s.num_heads, mlp_dim=s.mlp_dim)
  config.train.mixture = 'all_tasks'
  run = context.build(config)
  _, batch = next(run.mixture().iterate(0, 1))
  batch, sets = run.put_batch(batch), run.target_sets()
  enabled = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # whether there is a cache is looked up once, else
  jax.clear_caches()
  try:
    start = time.perf_counter()
    run.step_fn().lower(run.abstract_state(), batch, sets).compile()
    return time.perf_counter() - start
  finally:
    jax.config.update('jax_enable_compilation_cache', enabled)
    compilation_cache.reset_cache()
