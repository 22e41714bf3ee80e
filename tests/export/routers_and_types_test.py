"""Exported models with other routers and dtypes."""

import itertools

import jax
import numpy as np
import pytest

from tests.helpers import shipped, tiny
from uni_moe_jax.data.batches.mixtures import evaluation_batches
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.export import artifact, contents
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.train import run as train_run


@pytest.mark.parametrize('router, dtype, bound', [
    pytest.param('token', 'float32', 1e-5, marks=pytest.mark.nightly),
    pytest.param('context', 'float32', 1e-5, marks=pytest.mark.nightly),
    pytest.param('attribute', 'bfloat16', 0.05, marks=pytest.mark.nightly)])
def test_routers_by_token_are_exported_and_products_can_be_bfloat16(tmp_path, router, dtype, bound):
  c = tiny.config('shape', 'package', data_dir=tiny.data_dir())
  c.moe.router, c.model.dtype = router, dtype
  run = train_run.build(c, jax.devices()[:1])
  params = shipped.random_params(run.shapes.params)
  on_device = jax.device_put(params)  # as they are read from a checkpoint
  exported = contents.make_contents(run.spec.model.spec, on_device, run.plan, run.data, dtype=dtype)
  assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(exported.params))  # on any device they can be read
  artifact.write(tmp_path / 'model', exported, {'name': 'mine', 'jax': 'any'}, [])
  card = (tmp_path / 'model/README.md').read_text()
  assert (f'Its router ({router}) routes each token' in card) == (router != 'attribute')
  assert f'products in {dtype}' in card and 'was not evaluated' in card

  model = shipped.module(tmp_path / 'model').Model(tmp_path / 'model')
  spec = contents.portable(run.spec.model.spec, 'float32')
  expected = Predictor(UniPerceiver(spec), params, exported.target_sets, run.data.tokenizer)
  for task in run.plan.tasks:
    [(fields, _)] = evaluation_batches(run.data.examples(task, 'train'), np.arange(5), 5)
    features = expected.inputs(task.type, fields)
    wanted = {'encode': ('features', normalize(features)),
              'classify': ('log_p', expected.log_probabilities(features, task))}
    inputs = {name: fields[name] for name in model.manifest['tasks'][task.name]['programs']['encode']['inputs']}
    if not task.type.visual:  # padding has no influence
      more = ('text', 7), ('text_valid', False)
      inputs |= {name: np.pad(inputs[name], ((0, 0), (0, 2)), constant_values=x) for name, x in more}
    for batch, (program, (output, want)) in itertools.product((5, 2), wanted.items()):
      got = model.run(task.name, program, **{name: x[:batch] for name, x in inputs.items()})[output]
      assert np.abs(got - want[:batch, 0]).max() <= bound * np.abs(want).max(), (task.name, program)
