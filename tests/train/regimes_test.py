"""A regime is config alone: a run starts from another's parameters and tunes what its rules leave free."""

import json

import jax
import numpy as np
import pytest

from tests import tiny
from uni_moe_jax.train import loop, setup
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.optim import path_of

_TUNED = r'prompts/|spe_bias|linear_head/|(block\d+/norm[12]|embed/norm|similarity/norm)/'


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
  """Another task of the same pictures, with prompts and a head; all else stands still."""
  c = _config('shape')
  c.train.init = str(base)
  c.model.update(dict(prompts=2, spe_bias=True))
  c.tasks.shape.update(dict(head=True, per_class=2, temperature='downstream'))
  c.optim.rules = ((_TUNED, 1.0, 0.0), (r'.*', 'freeze'))
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
  assert set(after) - set(before) == {p for p in after if 'norm' not in p and p in tuned} | {'log_scale_downstream'}


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
