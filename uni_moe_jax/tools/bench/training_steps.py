"""Subjects about training steps: routers, mixed, published."""

from typing import Any

from uni_moe_jax.moe.routers import DENSE, ROUTERS
from uni_moe_jax.tools.bench import flops, machine
from uni_moe_jax.tools.bench.cases import Context, Repeated
from uni_moe_jax.tools.bench.results_table import Budget, Row
from uni_moe_jax.tools.bench.synthetic import REALISTIC
from uni_moe_jax.tools.bench.timing import Estimate, estimate, interleaved, per_second, ratio

_MERGED = ('attribute', 'task', 'modality')
_CAPACITY = 'token, capacity 1.0'
_TRAIN = {**dict.fromkeys(_MERGED, Budget(1.10, 1.03)), 'token': Budget(2.5, 2.0), _CAPACITY: Budget(2.0, 1.8)}
_INFERENCE = {'token': Budget(2.4, 2.0)}
_MIXED = dict.fromkeys(_MERGED, Budget(1.15, 1.05))
_CONTEXT = Budget(0.1, 0.03)  # above token
_SHARE = Budget(52, 65, at_most=False)
_PUBLISHED, _PUBLISHED_REALISTIC = Budget(0.85, 0.7), Budget(0.6, 0.45)
_PUBLISHED_SECONDS = 3.2  # B 8, 1000 names of 8 tokens, dense and MoE alike


def cases() -> dict[str, dict[str, Any]]:
  """Case → fields of config.moe: dense, every router that there is, and token routing with capacity."""
  found = {r: {'router': r} for r in (DENSE, *ROUTERS)}
  found[_CAPACITY] = {'router': 'token', 'capacity_factor': 1.0}
  return found


def routers(context: Context) -> list[Row]:
  """Train and inference step of every router against dense."""
  s = context.sizes
  steps = {name: Repeated(context.synthetic(context.pictures_and_names(**moe))) for name, moe in cases().items()}
  train = interleaved(steps, s.rounds)
  # Capacity is for training: at inference that case is the exact one.
  inference = interleaved({name: step.infer for name, step in steps.items() if name != _CAPACITY}, s.rounds)
  note = f'B {s.batch_size}, {s.image_size} px, one name of {s.name_tokens} tokens per picture; train: with the optimizer'
  rows = []
  for mode, seconds, budgets in (('train', train, _TRAIN), ('inference', inference, _INFERENCE)):
    rows.append(Row('routers', f'dense {mode} step', estimate(seconds[DENSE]), 's', note=note))
    rows += [Row('routers', f'{name} / dense, {mode}', ratio(seconds[name], seconds[DENSE]), 'x', budgets.get(name), note)
             for name in seconds if name != DENSE]
    if 'token' in seconds and 'context' in seconds:
      above = ratio(seconds['context'], seconds[DENSE]).value - ratio(seconds['token'], seconds[DENSE]).value
      rows.append(Row('routers', f'context - token, {mode}', Estimate(above), 'x dense', _CONTEXT, note))
  rows += [Row('routers', f'{name}: drop rate', Estimate(100 * float(step.metrics['router/drop_rate'])), '%', note=note)
           for name, step in steps.items() if 'router/drop_rate' in step.metrics]
  return rows + [_share(context, steps[DENSE], train[DENSE])]


def _share(context: Context, dense: Repeated, seconds) -> Row:
  """Useful FLOPs of the dense train step as a share of the peak."""
  s, spec = context.sizes, dense.run.spec.model.spec
  per_sample = flops.sequence(spec, spec.patches + 1, visual=True) + flops.sequence(spec, s.name_tokens + 1, visual=False)
  work = flops.TRAIN * s.batch_size * per_sample
  return Row('routers', 'dense train, share of GEMM peak', per_second(100 * work / context.peak, seconds), '%', _SHARE,
             'FLOPs by formula: matrix products, 3 forwards, without what is rematerialised; peak: fastest round, float32')


def mixed(context: Context) -> list[Row]:
  """The mixed step of the config's tasks, every router against dense."""
  def step(router: str) -> Repeated:
    c = context.own_config()
    c.moe.router, c.train.mixture = router, 'all_tasks'
    return Repeated(context.build(c))

  steps = {r: step(r) for r in context.sizes.mixed_routers or (DENSE, *ROUTERS)}
  seconds = interleaved(steps, context.sizes.rounds)
  note = 'tasks: ' + ', '.join(f'{t.name} {t.batch_size}' for t in steps[DENSE].run.plan.tasks)
  return [Row('mixed', 'dense step', estimate(seconds[DENSE]), 's', note=note)] + [
      Row('mixed', f'{r} / dense', ratio(seconds[r], seconds[DENSE]), 'x', _MIXED.get(r), note)
      for r in steps if r != DENSE]


def published(context: Context) -> list[Row]:
  """Train step of the published setting against the recorded one, scaled by the rate of this machine."""
  s = context.sizes
  c = context.classification(published=True)
  histogram = ', '.join(f'{n}: {share:.0%}' for n, share in REALISTIC.items())
  settings = {
      f'all names {s.name_tokens} tokens': ({s.name_tokens: 1.0}, _PUBLISHED),
      'names of realistic length': (REALISTIC, _PUBLISHED_REALISTIC)}
  seconds = interleaved({name: Repeated(context.synthetic(c, lengths)) for name, (lengths, _) in settings.items()}, s.rounds)
  recorded = _PUBLISHED_SECONDS * machine.RECORDED_PEAK / context.peak
  note = (f'B {s.small_batch}, {s.names} names, attribute routing; recorded {_PUBLISHED_SECONDS} s, scaled by '
          f'{machine.RECORDED_PEAK / 1e9:.0f} GFLOP/s over the peak of this run: {recorded:.3g} s; realistic lengths are '
          f'assumed, tokens: share = {histogram}; the published code pads')
  rows = []
  for name, (_, budget) in settings.items():
    rows.append(Row('published', f'train step, {name}', estimate(seconds[name]), 's', note=note))
    rows.append(Row('published', f"{name} / the published code's", estimate(seconds[name] / recorded), 'x', budget, note))
  return rows
