"""A regime is config alone: a run starts from another's parameters and tunes what its rules leave free."""

import json

import jax
import numpy as np
import pytest

from tests import small_model, tiny
from uni_moe_jax import recipes
from uni_moe_jax.train import loop, setup, step
from uni_moe_jax.model.similarity import normalise
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.model.paths import path_of

def _config(*tasks: str):
  c = tiny.config(*tasks, data_dir=tiny.data_dir())
  c.model.layers = 2
  c.train.update(dict(steps=3, save_every=100))
  return c


def _params(config, workdir):
  run = setup.build(config, jax.devices()[:1])
  with Checkpoints(workdir, 2) as checkpoints:
    state = checkpoints.restore(run.like())
  return {path_of(p): np.asarray(leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(state.params)}


@pytest.fixture(name='base', scope='module')
def _base(tmp_path_factory):
  """A trained run: (workdir, config)."""
  workdir = tmp_path_factory.mktemp('base')
  config = _config('shape', 'pair')
  assert loop.train(config, str(workdir), jax.devices()[:1]) == loop.FINISHED
  return workdir, config


def _prompt_tuning(base):
  """Another task of the same pictures, with every kind of prompt and a head; all else stands still."""
  c = _config('shape')
  c.train.init = str(base)
  c.model.prefix_prompts = 2
  c.sets.shapes.label_prompts = True
  c.tasks.shape.update(dict(head=True, per_class=2, temperature='downstream'))
  recipes.prompt_tune(c, prompts=2)
  return c


def test_prompt_tuning_moves_what_it_adds_and_leaves_the_rest_bit_identical(base, tmp_path, capsys):
  workdir, config = base
  c = _prompt_tuning(workdir)
  assert loop.train(c, str(tmp_path / 'tuned'), jax.devices()[:1]) == loop.FINISHED
  said = capsys.readouterr().out
  assert f'starts from {workdir}' in said and 'embed/spe_bias' in said
  before, after = _params(config, workdir), _params(c, tmp_path / 'tuned')
  tuned = {p for p in after if p.startswith('linear_head') or 'prompts/' in p or p == 'embed/spe_bias' or '/norm' in p
           and '_router' not in p}
  for path in set(before) & set(after):
    if path in tuned:
      assert not np.array_equal(before[path], after[path]), path
    else:
      np.testing.assert_array_equal(before[path], after[path], path)
  assert {'embed/prompts/input', 'embed/prompts/label_shapes', 'encoder/tail/block0/prompts/input'} <= tuned
  assert set(after) - set(before) == {p for p in after if 'norm' not in p and p in tuned} | {'log_scale_downstream'}


def test_a_set_with_prompts_is_evaluated_as_it_is_trained(base, tmp_path):
  c = _prompt_tuning(base[0])
  assert loop.train(c, str(tmp_path / 'tuned'), jax.devices()[:1]) == loop.FINISHED
  run = setup.build(c, jax.devices()[:1])
  with Checkpoints(tmp_path / 'tuned', 1) as checkpoints:
    predictor, params = setup.predictor(run, checkpoints)
  assert np.abs(params['embed']['prompts']['label_shapes']).min() > 0  # no longer zero

  @small_model.jit
  def trained(params, sets):
    return normalise(step.forward(run.spec, params, None, sets, {}, None)[1]['shapes'])
  np.testing.assert_allclose(predictor.target_set('shapes'), trained(params, run.sets()), rtol=1e-4, atol=1e-5)
  others = {**params, 'embed': {**params['embed'], 'prompts': {
      **params['embed']['prompts'], 'label_shapes': params['embed']['prompts']['label_shapes'][::-1]}}}
  assert np.abs(trained(others, run.sets()) - trained(params, run.sets())).max() > 1e-3


def test_words_are_those_of_the_run_it_starts_from(base):
  workdir, config = base
  one, other = (setup.build(c, jax.devices()[:1]) for c in (config, _prompt_tuning(workdir)))
  assert (workdir / 'tokenizer.model').read_bytes() == one.data.tokenizer_file.read_bytes()
  texts = tiny.columns()['glyphs'][0]['name'].tolist()
  assert one.data.tokenizer.encode_batch(texts) == other.data.tokenizer.encode_batch(texts)


def test_averaged_parameters_are_what_a_run_starts_from(tmp_path):
  c = _config('shape')
  c.train.ema = .5
  assert loop.train(c, str(tmp_path / 'a'), jax.devices()[:1]) == loop.FINISHED
  run = setup.build(c, jax.devices()[:1])
  with Checkpoints(tmp_path / 'a', 1) as checkpoints:
    state, averaged = checkpoints.restore(run.like()), checkpoints.restore_params()
  jax.tree.map(np.testing.assert_array_equal, averaged, state.ema)
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.ema, state.params)
  assert max(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize('made, said', [
    (None, r'holds no run'), ('config', r'has no checkpoint yet')])
def test_a_folder_to_start_from_that_is_none_is_named(base, tmp_path, made, said):
  workdir, _ = base
  if made:
    (tmp_path / 'none').mkdir()
    for name in ('config.json', 'tokenizer.model'):
      (tmp_path / 'none' / name).write_bytes((workdir / name).read_bytes())
    assert json.loads((tmp_path / 'none' / 'config.json').read_text())
  c = _prompt_tuning(tmp_path / 'none')
  with pytest.raises((ValueError, FileNotFoundError), match=said):
    loop.train(c, str(tmp_path / 'run'), jax.devices()[:1])
