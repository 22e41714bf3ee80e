"""A run can be extended to more steps, and says what becomes of its learning rate."""

import functools
import json
import shutil

import chex
import jax
import numpy as np
import pytest

from tests.helpers import saved_run, tiny
from uni_moe_jax.train import loop
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train import workdir as workdir_lib


def _config(steps, schedule='cosine', decay_steps=0):
  c = tiny.config('shape', data_dir=tiny.data_dir())
  c.model.num_layers = 1
  c.optim.update(dict(schedule=schedule, decay_steps=decay_steps, final_lr_fraction=.25, warmup_steps=1))
  c.train.steps = steps
  return c


def _train(workdir, *args):
  assert loop.train(_config(*args), str(workdir), jax.devices()[:1]) == loop.FINISHED
  return workdir


@pytest.fixture(autouse=True)
def _one_step(monkeypatch):
  saved_run.share_steps(monkeypatch)


@functools.cache
def _run() -> train_run.Run:
  return train_run.build(_config(1), jax.devices()[:1])


def _state(workdir):
  return saved_run.state(_run(), workdir)


def _assert_equal(a, b):
  chex.assert_trees_all_equal(_state(a), _state(b))
  assert saved_run.lines(a) == saved_run.lines(b)


def _claim(workdir, *args, **given):
  workdir_lib.claim_workdir(workdir, _config(*args), 'print', **{'extends': True, **given})


@pytest.mark.nightly
def test_with_a_constant_rate_four_steps_and_then_seven_equal_seven_at_once(tmp_path, capsys):
  parts = _train(tmp_path / 'parts', 4, 'constant')
  _train(parts, 7, 'constant')
  assert f'{parts} is extended from 4 to 7 steps\n' in capsys.readouterr().out
  _assert_equal(parts, _train(tmp_path / 'one', 7, 'constant'))
  content = json.loads((parts / workdir_lib.CONFIG_FILE).read_text())
  assert (content['config']['train']['steps'], content['extended']) == (7, [4])
  assert workdir_lib.provenance(parts, 7)['extended from'] == '4 steps'


def test_a_start_that_versions_refuse_extends_nothing(tmp_path):
  saved_run.save(tmp_path, _config(4), 4)
  path = tmp_path / workdir_lib.CONFIG_FILE
  content = json.loads(path.read_text())
  path.write_text(json.dumps({**content, 'versions': {**content['versions'], 'jax': '0.1.0'}}))
  before = path.read_text()
  with pytest.raises(ValueError, match='different package versions'):
    loop.train(_config(7, 'cosine', 4), str(tmp_path), jax.devices()[:1])
  assert path.read_text() == before
  assert loop.train(_config(7, 'cosine', 4), str(tmp_path), jax.devices()[:1], allow_version_mismatch=True) == 0
  content = json.loads(path.read_text())  # the control: an allowed one does
  assert (content['extended'], content['versions']) == ([4], workdir_lib.versions())


@pytest.mark.nightly
def test_with_a_cosine_the_rate_keeps_its_last_value_or_is_drawn_over_all_steps(tmp_path):
  held = _train(tmp_path / 'held', 4)
  stretched = shutil.copytree(held, tmp_path / 'stretched')
  _train(held, 7, 'cosine', 4)
  _assert_equal(held, _train(tmp_path / 'one', 7, 'cosine', 4))
  _train(stretched, 7, 'cosine', 7)
  rates = {d: [line['learning_rate'] for line in saved_run.lines(d)] for d in (held, stretched)}
  # Peak .01: a step of warm-up, then cosines of 3 and of 6 steps to a quarter of it.
  cosine = lambda t, end: .01 * (.25 + .75 * (1 + np.cos(np.pi * min((t - 1) / (end - 1), 1))) / 2)
  np.testing.assert_allclose(rates[held], [.01, *(cosine(t, 4) for t in range(1, 7))], rtol=1e-5)
  np.testing.assert_allclose(rates[stretched][:4], rates[held][:4])
  np.testing.assert_allclose(rates[stretched][4:], [cosine(t, 7) for t in range(4, 7)], rtol=1e-5)
  step, state = _state(stretched)
  differs = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.params, _state(held)[1].params)
  assert step == 7 and any(jax.tree.leaves(differs))


def test_a_schedule_that_ends_with_the_run_needs_a_choice(tmp_path):
  _claim(tmp_path, 1000)
  message = (r'schedule ends at step 1000, and config.train.steps=2000 extends it\. Add '
             r'--config.optim.decay_steps=1000, which keeps the rate at its last value, 0.0025, or '
             '--config.optim.decay_steps=2000, which spreads')
  with pytest.raises(ValueError, match=message):
    _claim(tmp_path, 2000)
  _claim(tmp_path, 2000, 'cosine', 1000)
  _claim(tmp_path, 2000, 'cosine', 1000)  # resumed
  with pytest.raises(ValueError, match='optim.decay_steps: 1000 → 2000'):  # a choice, but no extension
    _claim(tmp_path, 2000, 'cosine', 2000)
  with pytest.raises(ValueError, match='ends at step 1000, and config.train.steps=3000'):
    _claim(tmp_path, 3000)
  _claim(tmp_path, 3000, 'cosine', 3000)
  assert json.loads((tmp_path / workdir_lib.CONFIG_FILE).read_text())['extended'] == [1000, 2000]


def test_a_schedule_that_was_planned_longer_than_the_run_needs_none(tmp_path):
  _claim(tmp_path, 1000, 'cosine', 2000)
  _claim(tmp_path, 1500, 'cosine', 2000)
  _claim(tmp_path, 2000)  # where it ends, too


def test_the_published_cosine_can_only_be_spread(tmp_path):
  _claim(tmp_path, 1000, 'published')
  with pytest.raises(ValueError, match='Add --config.optim.decay_steps=2000, which spreads the schedule') as raised:
    _claim(tmp_path, 2000, 'published')
  assert 'last value' not in str(raised.value)
  _claim(tmp_path, 2000, 'published', 2000)


def test_a_run_cannot_be_shortened_and_only_training_extends_it(tmp_path):
  _claim(tmp_path, 1000, 'constant')
  with pytest.raises(ValueError, match='has a run of 1000 steps, which config.train.steps=999 cannot shorten'):
    _claim(tmp_path, 999, 'constant')
  with pytest.raises(ValueError, match='train.steps: 1000 → 2000'):
    _claim(tmp_path, 2000, 'constant', extends=False)
  with pytest.raises(ValueError, match="optim.schedule: 'constant' → 'cosine'; train.steps: 1000 → 2000"):
    _claim(tmp_path, 2000, 'cosine')
  with pytest.raises(ValueError, match='the data'):
    workdir_lib.claim_workdir(tmp_path, _config(2000, 'constant'), 'another print', extends=True)
  for given in ({'writes': False}, {'writes': True}):
    _claim(tmp_path, 2000, 'constant', **given)
    assert workdir_lib.load_config(tmp_path).train.steps == (2000 if given['writes'] else 1000)


def test_an_extended_run_that_continues_with_another_field_keeps_the_list_of_its_extensions(tmp_path):
  _claim(tmp_path, 1000, 'constant')
  _claim(tmp_path, 2000, 'constant')
  c = _config(2000, 'constant')
  c.train.max_to_keep = 9
  workdir_lib.claim_workdir(tmp_path, c, 'print', extends=True)
  content = json.loads((tmp_path / workdir_lib.CONFIG_FILE).read_text())
  assert (content['config']['train']['max_to_keep'], content['extended']) == (9, [1000])


@pytest.mark.parametrize('damage', [{'extended': 3}, {'extended': ['x']}])
def test_other_extensions_than_numbers_are_damage(tmp_path, damage):
  _claim(tmp_path, 1000)
  path = tmp_path / workdir_lib.CONFIG_FILE
  path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
  with pytest.raises(ValueError, match='config.json is damaged .its earlier numbers of steps are not whole'):
    workdir_lib.load_config(tmp_path)
