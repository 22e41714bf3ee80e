"""Exported models of other routers and types."""

import jax
import numpy as np
import pytest

from tests import shipped, tiny
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.export import artifact, contents
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.train import setup


@pytest.mark.slow
@pytest.mark.parametrize('router, dtype, bound', [('context', 'float32', 1e-5), ('attribute', 'bfloat16', 0.05)])
def test_routers_that_look_at_tokens_go_along_and_products_can_be_bfloat16(tmp_path, router, dtype, bound):
  c = tiny.config('shape', data_dir=tiny.data_dir())
  c.moe.router, c.model.dtype = router, dtype
  run = setup.build(c, jax.devices()[:1])
  shapes, rng = run.shapes.params, np.random.default_rng(0)
  params = jax.tree.map(lambda x: np.asarray(0.3 * rng.normal(size=x.shape), np.float32), shapes)
  found = contents.collect(run.spec.model.spec, params, run.plan, run.data, dtype=dtype)
  artifact.write(tmp_path / 'model', found, {'name': 'mine', 'jax': 'any'}, [])
  card = (tmp_path / 'model/README.md').read_text()
  assert ('Its router (context) looks at tokens' in card) == (router == 'context')
  assert f'products in {dtype}' in card and 'was not evaluated' in card

  model = shipped.module(tmp_path / 'model').Model(tmp_path / 'model')
  pixels = np.random.default_rng(1).integers(0, 256, (5, 1, tiny.SIDE, tiny.SIDE, 1), dtype=np.uint8)
  [task] = run.plan.tasks
  expected = Predictor(UniPerceiver(contents.portable(run.spec.model.spec, 'float32')), params, found.sets, run.data.tokenizer)
  features = expected.inputs(task.kind, {'pixels': pixels, 'id': np.zeros(5, np.uint32)})
  want = expected.log_probabilities(features, task)[:, 0]
  for batch in (5, 2):
    got = np.asarray(model.run('shape', 'classify', pixels=pixels[:batch])['log_p'])
    assert np.abs(got - want[:batch]).max() <= bound * np.abs(want).max()
