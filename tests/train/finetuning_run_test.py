"""A run that starts from the parameters of another run and trains those that it does not freeze."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest

from tests.helpers import saved_run, small_model, tiny
from uni_moe_jax.config import presets
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.train import loop
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train import workdir as workdir_lib
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.forward import forward
from uni_moe_jax.utils.tree_paths import by_path


def _config(*tasks: str):
  c = tiny.config(*tasks, data_dir=tiny.data_dir())
  c.model.num_layers = 2
  c.train.update(dict(steps=3, checkpoint_every=100))
  return c


def _params(config, workdir):
  _, state = saved_run.state(train_run.build(config, jax.devices()[:1]), workdir)
  return {path: np.asarray(leaf) for path, leaf in by_path(state.params).items()}


@pytest.fixture(name='base', scope='module')
def _base(tmp_path_factory):
  """A run to start from: (workdir, config)."""
  workdir, config = tmp_path_factory.mktemp('base'), _config('shape', 'pair')
  saved_run.save(workdir, config, step=2)
  return workdir, config


def _prompt_tuning(base):
  """Another task on the same images, with all prompts and a head; everything else is frozen."""
  c = _config('shape')
  c.train.init = str(base)
  c.model.num_prefix_prompts = 2
  c.target_sets.shapes.label_prompts = True
  c.tasks.shape.update(dict(linear_head=True, shots=2, temperature='downstream'))
  presets.prompt_tune(c, num_prompts=2)
  return c


@pytest.fixture(name='tuned', scope='module')
def _tuned(base, tmp_path_factory):
  """The prompt-tuned run: (workdir, config, output)."""
  workdir, c = tmp_path_factory.mktemp('tuned'), _prompt_tuning(base[0])
  with contextlib.redirect_stdout(io.StringIO()) as output:
    assert loop.train(c, str(workdir), jax.devices()[:1]) == loop.FINISHED
  return workdir, c, output.getvalue()


@pytest.mark.nightly
def test_prompt_tuning_changes_new_parameters_and_norms_and_leaves_the_rest_bit_identical(base, tuned):
  (workdir, config), (tuned_workdir, c, output) = base, tuned
  assert f'starts from {workdir}' in output and 'embed/spe_bias' in output
  before, after = _params(config, workdir), _params(c, tuned_workdir)
  changed = {p for p in after if p.startswith('linear_head') or 'prompts/' in p or p == 'embed/spe_bias' or '/norm' in p
           and '_router' not in p}
  for path in set(before) & set(after):
    if path in changed:
      assert not np.array_equal(before[path], after[path]), path
    else:
      np.testing.assert_array_equal(before[path], after[path], path)
  assert {'embed/prompts/input', 'embed/prompts/label_shapes', 'encoder/tail/block0/prompts/input'} <= changed
  assert set(after) - set(before) == {p for p in after if 'norm' not in p and p in changed} | {'log_scale_downstream'}


def test_evaluation_encodes_a_set_with_label_prompts_as_training_does(tuned):
  workdir, c, _ = tuned
  run = train_run.build(c, jax.devices()[:1])
  with Checkpoints(workdir, 1) as checkpoints:
    params, _ = train_run.read_params(run, checkpoints)
  assert np.abs(params['embed']['prompts']['label_shapes']).min() > 0  # no longer zero

  @small_model.jit
  def trained(params, sets):
    return normalize(forward(run.spec, params, {}, sets, {}, None)[0].target_sets['shapes'])
  np.testing.assert_allclose(
      run.predictor(params).target_set('shapes'), trained(params, run.target_sets()), rtol=1e-4, atol=1e-5)
  others = {**params, 'embed': {**params['embed'], 'prompts': {
      **params['embed']['prompts'], 'label_shapes': params['embed']['prompts']['label_shapes'][::-1]}}}
  assert np.abs(trained(others, run.target_sets()) - trained(params, run.target_sets())).max() > 1e-3


def test_a_run_records_the_classes_of_its_head_and_label_prompts(tuned):
  folder, c, _ = tuned
  recorded = workdir_lib.class_digests(folder)
  assert recorded == train_run.build(c, jax.devices()[:1]).class_digests and [*recorded] == ['shapes']


@pytest.mark.parametrize('files, message', [
    (None, r'holds no run'), ('config', r'has no checkpoint yet')])
def test_a_work_directory_without_a_run_or_a_checkpoint_is_named(base, tmp_path, files, message):
  workdir, _ = base
  if files:
    (tmp_path / 'none').mkdir()
    for name in ('config.json', 'tokenizer.model'):
      (tmp_path / 'none' / name).write_bytes((workdir / name).read_bytes())
    assert json.loads((tmp_path / 'none' / 'config.json').read_text())
  c = _prompt_tuning(tmp_path / 'none')
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    loop.train(c, str(tmp_path / 'run'), jax.devices()[:1])
