"""Suites `routers`, `mixed`, `published` and `compile`: training and inference steps, and their compile time."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.config.validate import TOKEN_ROUTER_FIELDS
from uni_moe_jax.kernels import projection
from uni_moe_jax.tasks.router_names import DENSE, DISPATCHED, ROUTERS
from uni_moe_jax.tools.bench import product_rate
from uni_moe_jax.tools.bench.cases import RECORDED_PEAK, Context, RepeatedStep
from uni_moe_jax.tools.bench.results_table import Budget, Row
from uni_moe_jax.tools.bench.timing import Estimate, Rounds, estimate, interleaved

_FLOAT32 = 'float32'  # a step without train.cpu_bfloat16
_MERGED = ('attribute', 'task', 'modality')
_CAPACITY = 'token, capacity 1.0'
_TRAIN = {**dict.fromkeys(_MERGED, Budget(1.04, 1.02)), 'token': Budget(2.1, 1.9), _CAPACITY: Budget(2.0, 1.8)}
_INFERENCE = {**dict.fromkeys(_MERGED, Budget(1.02, 1.00)), 'token': Budget(2.1, 1.9)}
_MIXED = dict.fromkeys(_MERGED, Budget(1.15, 1.05))
_CONTEXT = Budget(1.02, 1.00)  # over token
_SHARE = Budget(60, 70, at_most=False)
_PUBLISHED, _PUBLISHED_REALISTIC = Budget(0.75, 0.6), Budget(0.45, 0.35)
_PUBLISHED_SECONDS = 3.1  # B 8, 1000 names of 8 tokens, dense and MoE
# Share of names per length in tokens, `eot` included: an assumption about class names, two to three pieces each.
REALISTIC = {2: 0.15, 3: 0.30, 4: 0.25, 5: 0.15, 6: 0.08, 7: 0.04, 8: 0.03}
_COMPILE, _GROWTH = Budget(45, 30), Budget(1.3)
_COMPILES = 2  # of each depth; they take long
_OTHER_NUMBERS = {'seed': 1, 'train.steps': 1001, 'optim.learning_rate': 1e-4, 'optim.warmup_steps': 7}


def router_cases() -> dict[str, dict[str, Any]]:
  """Return {case: fields of config.moe}: dense, every router, and token routing with capacity."""
  cases = {r: {'router': r} for r in ROUTERS}
  return {**cases, _CAPACITY: {'router': 'token', 'capacity_factor': 1.0}}


def routers(context: Context) -> list[Row]:
  """Measure the training and inference step of every router against dense."""
  s = context.sizes
  runs = {name: context.synthetic(context.images_and_names(**moe)) for name, moe in router_cases().items()}
  steps = {name: RepeatedStep(run) for name, run in runs.items()}
  train = interleaved(steps, s.rounds)
  # Capacity limits training alone: at inference that case is the exact one.
  inference = interleaved({name: step.infer for name, step in steps.items() if name != _CAPACITY}, s.rounds)
  note = f'B {s.batch_size}, {s.image_size} px, one name of {s.name_tokens} tokens per image; train: with the optimizer'
  rows = []
  for mode, seconds, budgets in (('train', train, _TRAIN), ('inference', inference, _INFERENCE)):
    ratios = {name: seconds.figure(s / seconds[DENSE]) for name, s in seconds.seconds.items() if name != DENSE}
    rows.append(Row('routers', f'dense {mode} step', seconds.figure(seconds[DENSE]), 's', note=note))
    rows += [Row('routers', f'{name} / dense, {mode}', r, 'x', budgets.get(name), note) for name, r in ratios.items()]
    ratio = seconds.figure(seconds['context'] / seconds['token'])
    rows.append(Row('routers', f'context / token, {mode}', ratio, 'x', _CONTEXT, note))
  rows += [Row('routers', f'{name}: drop rate', Estimate(100 * float(step.metrics['router/drop_rate'])), '%', note=note)
           for name, step in steps.items() if 'router/drop_rate' in step.metrics]
  rows += product_rate.of_layer('routers', s, context.devices[0])
  return rows + [_share_of_peak(context, steps[DENSE], train)]


def _share_of_peak(context: Context, dense: RepeatedStep, train: Rounds) -> Row:
  """Useful FLOPs of the dense training step as a share of the peak."""
  work = dense.run.step_flops(None, dense.batch, dense.sets)
  return Row('routers', 'dense train, share of GEMM peak', train.figure(100 * work / context.peak / train[DENSE]), '%',
             _SHARE, 'FLOPs: matrix products of 3 forward passes, without remat; peak: fastest round, float32')


def mixed(context: Context) -> list[Row]:
  """Measure the step of all tasks of the config, every router against dense, and its products against float32.

  Only the steps that are compared are in memory: on CPU a compiled kernel takes three memory maps and a step of all
  tasks 7,000 or more, and Linux allows a process 65,530 by default.
  """
  def step(router: str, cpu_bfloat16: bool = True) -> RepeatedStep:
    c = with_router(context.own_config(), router)
    c.train.mixture = 'all_tasks'
    c.train.cpu_bfloat16 &= cpu_bfloat16
    return RepeatedStep(context.build(c))

  dense = step(DENSE)
  note = 'tasks: ' + ', '.join(f'{t.name} {t.batch_size}' for t in dense.run.plan.tasks)
  if dense.run.rounds_products:
    note += '; products of layers in bfloat16'
  rounds = context.sizes.rounds
  routers = [r for r in context.sizes.mixed_routers or ROUTERS if r != DENSE]
  compared = {r: interleaved({DENSE: dense, r: step(r)}, rounds) for r in routers}
  first = compared[routers[0]]
  rows = [Row('mixed', 'dense step', first.figure(first[DENSE]), 's', note=note)] + [
      Row('mixed', f'{r} / dense', seconds.figure(seconds[r] / seconds[DENSE]), 'x', _MIXED.get(r), note)
      for r, seconds in compared.items()]
  if dense.run.rounds_products:
    r = routers[0]
    seconds = interleaved({r: step(r), _FLOAT32: step(r, cpu_bfloat16=False)}, rounds)
    ratio = seconds.figure(seconds[r] / seconds[_FLOAT32])
    rows.append(Row('mixed', f'{r}, bfloat16 / float32 products', ratio, 'x', note=note))
  return rows


def with_router(config: ml_collections.ConfigDict, router: str) -> ml_collections.ConfigDict:
  """Give a config another router, without the fields that only token routers have if it is none; return it."""
  config.moe.router = router
  if router not in DISPATCHED:
    config.moe.update(dict.fromkeys(TOKEN_ROUTER_FIELDS, 0))
  return config


def published(context: Context) -> list[Row]:
  """Measure the training step of the published setting against the recorded one."""
  s = context.sizes
  histogram = ', '.join(f'{n}: {share:.0%}' for n, share in REALISTIC.items())
  full, realistic = f'all names {s.name_tokens} tokens', 'names of realistic length'
  settings = {full: ({s.name_tokens: 1.0}, _PUBLISHED, False), realistic: (REALISTIC, _PUBLISHED_REALISTIC, False)}
  if context.dtype == _FLOAT32 and projection.multiplies_bfloat16():
    settings |= {f'{name}, cpu_bfloat16': (settings[name][0], None, True) for name in (full, realistic)}
  steps = {}
  for name, (lengths, _, cpu_bfloat16) in settings.items():
    c = context.published_classification()
    c.train.cpu_bfloat16 = cpu_bfloat16
    steps[name] = RepeatedStep(context.synthetic(c, lengths))
  seconds = interleaved(steps, s.rounds)
  recorded = _PUBLISHED_SECONDS * RECORDED_PEAK / context.peak
  note = (f'B {s.small_batch}, {s.names} names, attribute routing; recorded {_PUBLISHED_SECONDS} s, scaled by '
          f'{RECORDED_PEAK / 1e9:.0f} GFLOP/s over the peak of this run: {recorded:.3g} s; realistic lengths '
          f'are assumed, tokens: share = {histogram}; the published code pads, in float32')
  rows = []
  for name, (_, budget, _) in settings.items():
    relative = seconds.figure(seconds[name] / recorded)
    rows.append(Row('published', f'train step, {name}', seconds.figure(seconds[name]), 's', note=note))
    rows.append(Row('published', f"{name} / the published code's", relative, 'x', budget, note))
  return rows


def compile_time(context: Context) -> list[Row]:
  """Compile the step of the config's tasks at two depths without any cache, and again with other numbers from one."""
  s, (small, large) = context.sizes, context.sizes.compiled_layers
  with tempfile.TemporaryDirectory() as cache:
    _compile_seconds(context, small, cache)  # the first compile of a process is slower
    cached = [_compile_seconds(context, small, cache, **_OTHER_NUMBERS) for _ in range(min(s.rounds, _COMPILES))]
  lowering, reading = np.transpose(cached)
  seconds = {small: [], large: []}
  for i in range(min(s.rounds, _COMPILES)):
    # A process that has compiled much is slower: neither depth is always second.
    for layers in (small, large) if i % 2 == 0 else (large, small):
      seconds[layers].append(sum(_compile_seconds(context, layers)))
  types = sorted({t.type.name for t in make_plan(context.own_config()).tasks})
  devices = f'{len(context.devices)} {context.devices[0].platform} device{"s" * (len(context.devices) > 1)}'
  note = (f"the config's step at D {s.width} on {devices}; tracing, lowering and compiling, after one uncounted "
          f'compile; task types: {", ".join(types)}')
  other = f'{small} layers, all tasks, other numbers'
  changed = 'the program was compiled before these changes: ' + ', '.join(
      f'{name}={value}' for name, value in _OTHER_NUMBERS.items())
  return [
      Row('compile', f'{small} layers, all tasks, cold', estimate(seconds[small]), 's', _COMPILE, note),
      Row('compile', f'{large} layers, all tasks, cold', estimate(seconds[large]), 's', None, note),
      Row('compile', f'{large} layers / {small} layers', estimate(np.divide(seconds[large], seconds[small])), 'x',
          _GROWTH, note),
      Row('compile', f'{other}: tracing and lowering', estimate(lowering), 's', None, changed),
      Row('compile', f'{other}: reading from the cache', estimate(reading), 's', None, changed)]


def _compile_seconds(context: Context, layers: int, cache: str | None = None, **changes: Any) -> tuple[float, float]:
  """Seconds of (tracing and lowering, compiling) the step of a changed config; cache: a folder of compiled programs."""
  s = context.sizes
  config = context.own_config(num_layers=layers, width=s.width, num_heads=s.num_heads, mlp_dim=s.mlp_dim)
  config.update_from_flattened_dict({'train.mixture': 'all_tasks', **changes})
  run = context.build(config)
  _, batch = next(run.mixture().iterate(0, 1))
  batch, sets = run.put_batch(batch), run.target_sets()
  with compilation_cache_in(cache):
    jax.clear_caches()
    start = time.perf_counter()
    lowered = run.step_fn().lower(run.abstract_state(), batch, sets)
    between = time.perf_counter()
    lowered.compile()
    return between - start, time.perf_counter() - between


@contextlib.contextmanager
def compilation_cache_in(folder: str | None) -> Iterator[None]:
  """Uses a folder as JAX's compilation cache, for programs of any size, or none."""
  def use(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX checks only once whether there is a cache, and where

  wanted = {'jax_enable_compilation_cache': folder is not None, 'jax_compilation_cache_dir': folder,
            'jax_persistent_cache_min_compile_time_secs': 0}
  before = {name: getattr(jax.config, name) for name in wanted}
  use(wanted)
  try:
    yield
  finally:
    use(before)
