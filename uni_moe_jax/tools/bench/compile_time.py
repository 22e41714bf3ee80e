"""Suite `compile`: compile time of the whole step at two depths."""

import time

import jax
from jax.experimental.compilation_cache import compilation_cache

from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.tools.bench.cases import Context
from uni_moe_jax.tools.bench.results_table import Budget, Row
from uni_moe_jax.tools.bench.timing import estimate, ratio

_BUDGET, _GROWTH_BUDGET = Budget(60, 30), Budget(1.3)
_COMPILES = 2  # of each depth; they take long


def compile_time(context: Context) -> list[Row]:
  """Compile the step of the config's tasks at two depths, without any cache."""
  s = context.sizes
  small, large = s.compiled_layers
  _compile_seconds(context, small)  # the first compile of a process is slower
  seconds = {small: [], large: []}
  for i in range(min(s.rounds, _COMPILES)):
    # A process that has compiled much is slower: neither depth is always second.
    for layers in (small, large) if i % 2 == 0 else (large, small):
      seconds[layers].append(_compile_seconds(context, layers))
  types = sorted({t.type.name for t in make_plan(context.own_config()).tasks})
  devices = f'{len(context.devices)} {context.devices[0].platform} device{"s" * (len(context.devices) > 1)}'
  note = (f"the config's step at D {s.width} on {devices}; tracing, lowering and compiling, after one uncounted "
          f'compile; task types: {", ".join(types)}')
  growth = ratio(seconds[large], seconds[small])
  return [
      Row('compile', f'{small} layers, all tasks, cold', estimate(seconds[small]), 's', _BUDGET, note),
      Row('compile', f'{large} layers, all tasks, cold', estimate(seconds[large]), 's', None, note),
      Row('compile', f'{large} layers / {small} layers', growth, 'x', _GROWTH_BUDGET, note)]


def _compile_seconds(context: Context, layers: int) -> float:
  s = context.sizes
  config = context.own_config(num_layers=layers, width=s.width, num_heads=s.num_heads, mlp_dim=s.mlp_dim)
  config.train.mixture = 'all_tasks'
  run = context.build(config)
  _, batch = next(run.mixture().iterate(0, 1))
  batch, sets = run.put_batch(batch), run.target_sets()
  enabled = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # JAX checks only once whether there is a cache
  jax.clear_caches()
  try:
    start = time.perf_counter()
    run.step_fn().lower(run.abstract_state(), batch, sets).compile()
    return time.perf_counter() - start
  finally:
    jax.config.update('jax_enable_compilation_cache', enabled)
    compilation_cache.reset_cache()
