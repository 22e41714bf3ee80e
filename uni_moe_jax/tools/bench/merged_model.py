"""Subject: a merged model against the dense one of its sizes; operations and FLOPs are compared in tests/export."""

import functools

import jax

from uni_moe_jax.eval import predictor
from uni_moe_jax.export.merge import merged
from uni_moe_jax.model import batching
from uni_moe_jax.model.initialization import init_params
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.moe.routers import DENSE
from uni_moe_jax.tools.bench.cases import Context
from uni_moe_jax.tools.bench.results_table import Row
from uni_moe_jax.tools.bench.timing import estimate, interleaved, ratio


def exported(context: Context) -> list[Row]:
  """Features of pictures: dense, merged for one condition, and with experts."""
  s, runs = context.sizes, {r: context.synthetic(context.pictures_and_names(router=r)) for r in (DENSE, 'attribute')}
  models = {r: (run.spec.model.spec, init_params(run.spec.model, jax.random.key(0))) for r, run in runs.items()}
  [task] = runs[DENSE].plan.tasks
  models['merged'] = merged(*models['attribute'], task.type.conditions)
  shape = (s.batch_size, 1, s.image_size, s.image_size, runs[DENSE].config.model.channels)
  fields = {'pixels': jax.random.normal(jax.random.key(1), shape), 'id': jax.numpy.arange(s.batch_size, dtype='uint32')}
  sequence = batching.input_sequence(task.type, fields)
  calls = {name: functools.partial(predictor.encode, UniPerceiver(spec), jax.device_put(params), sequence)
           for name, (spec, params) in models.items()}
  seconds = interleaved(calls, s.rounds)
  note = f'B {s.batch_size}, {s.image_size} px, pictures only; information: their operations and FLOPs are equal'
  return [Row('exported', 'dense', estimate(seconds[DENSE]), 's', note=note)] + [
      Row('exported', f'{name} / dense', ratio(seconds[name], seconds[DENSE]), 'x', note=note)
      for name in ('merged', 'attribute')]
