"""A run that starts from another reads that run's parameters and nothing else, each straight onto its devices."""

import contextlib
import os
import pathlib
import shutil

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.helpers import saved_run, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer
from uni_moe_jax.model.embedders import sincos_table
from uni_moe_jax.train import adaptation, loop, trained_run, workdir
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.tree_paths import by_path

_NEW = {'embed/prompts/input', 'linear_head/kernel', 'linear_head/bias', 'linear_head/similarity_weight'}


def _config(ema_decay=0.):
  c = tiny.config('shape', data_dir=tiny.data_dir())
  c.model.num_layers = 1
  c.train.ema_decay = ema_decay
  return c


@pytest.fixture(name='saved', scope='module', params=['params', 'ema_params'])
def _saved(request, tmp_path_factory):
  """A run with prompts: (folder, its config, the field of its parameters to use, these)."""
  folder, c = tmp_path_factory.mktemp('saved'), _config(.5 * (request.param == 'ema_params'))
  c.model.num_deep_prompts = 2
  params = saved_run.save(folder, c, step=2, change=lambda state: state if state.ema_params is None else state.replace(
      ema_params=jax.tree.map(lambda x: x + 1, state.ema_params)))
  return folder, c, request.param, {p: np.asarray(x) + bool(c.train.ema_decay) for p, x in by_path(params).items()}


@pytest.fixture(name='read')
def _read(monkeypatch):
  """Names of the arrays that Orbax reads from now on."""
  names = []
  for handler in (ocp.type_handlers.ArrayHandler, ocp.type_handlers.NumpyHandler, ocp.type_handlers.ScalarHandler):
    def deserialize(self, infos, args=None, original=handler.deserialize):
      names.extend(info.name.replace('.', '/') for info in infos)
      return original(self, infos, args)
    monkeypatch.setattr(handler, 'deserialize', deserialize)
  return names


def _assert_sharded(params, run):
  chex.assert_trees_all_equal(jax.tree.map(lambda x: x.sharding, params), run.shardings.params)


@pytest.mark.nightly
def test_a_warm_start_reads_shared_parameters_onto_the_shardings_of_the_new_run(saved, read, capsys):
  folder, _, field, expected = saved
  c = _config()
  c.train.init, c.tasks.shape.linear_head, c.model.num_prefix_prompts = str(folder), True, 2
  c.mesh.update(dict(data=4, model=2, fsdp=True))
  run = train_run.build(c)
  params = train_run.read_init(run)[0]
  _assert_sharded(params, run)
  assert {len(x.sharding.device_set) for x in jax.tree.leaves(params)} == {8}
  split = [x for x in jax.tree.leaves(params) if not x.sharding.is_fully_replicated]
  assert sum(x.nbytes for x in split) > .8 * sum(x.nbytes for x in jax.tree.leaves(params))

  got = by_path(params)
  dropped = {p for p in expected if 'prompts/' in p}
  assert dropped and set(got) == {*expected} - dropped | _NEW
  assert sorted(read) == sorted(f'{field}/{path}' for path in {*expected} - dropped)
  for path in {*got} - _NEW:
    np.testing.assert_array_equal(got[path], expected[path], path)
  fresh = by_path(run.init().params)
  for path in _NEW:
    np.testing.assert_array_equal(got[path], fresh[path], path)
  assert np.abs(got['embed/prompts/input']).min() > 0
  output = capsys.readouterr().out
  assert f'fresh: {", ".join(sorted(_NEW))}; dropped: {", ".join(sorted(dropped))}\n' in output

  state = train_run.initial_state(run)
  _assert_sharded(state.params, run)
  chex.assert_trees_all_equal(state.params, params)


def test_a_predictor_reads_the_parameters_and_a_continued_run_the_moments_too(saved, read):
  folder, c, field, expected = saved
  c = c.copy_and_resolve_references()
  c.mesh.update(dict(data=4, expert=2, fsdp=True))
  run = train_run.build(c)
  with Checkpoints(folder, max_to_keep=None) as checkpoints:
    params = train_run.read_params(run, checkpoints)[0]
    assert sorted(read) == sorted(f'{field}/{path}' for path in expected)
    read.clear()
    checkpoints.restore(run.abstract_state())
    assert {name.partition('/')[0] for name in read} > {'params', 'opt_state'}  # the positive control
    host = checkpoints.restore_params()
  _assert_sharded(params, run)
  for got in (params, host):
    chex.assert_trees_all_equal(by_path(got), expected)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(host))


def test_a_frozen_position_table_stays_frozen_and_is_computed_anew_at_another_image_size(tmp_path):
  c = _config()
  c.model.posemb = 'frozen'
  saved = saved_run.save(tmp_path, c, step=2)['embed']['spatial']
  c.train.init = str(tmp_path)

  def spatial(image_size, scale):
    c.model.image_size, c.model.posemb_scale = image_size, scale
    return np.asarray(train_run.read_init(train_run.build(c, jax.devices()[:1]))[0]['embed']['spatial'])

  side, patch, width = c.model.image_size, c.model.patch_size, c.model.width
  np.testing.assert_array_equal(spatial(side, 1.), saved)  # that of the run, which is another
  np.testing.assert_array_equal(spatial(2 * side, .5), sincos_table(2 * side // patch, width, .5))
  np.testing.assert_array_equal(spatial(side, .5), sincos_table(side // patch, width, .5))
  tuned = adaptation.finetune(f'run={tmp_path},task=shape')
  assert train_run.build(tuned, jax.devices()[:1]).spec.frozen == {'embed/spatial'}


def test_a_linear_head_of_other_classes_starts_at_zero(tmp_path, capsys):
  def tuned(*texts):
    c = _config()
    c.target_sets.shapes.entries = texts or 'glyphs/class'
    c.tasks.shape.linear_head = True
    return c

  classes = tiny.CLASSES
  trained = saved_run.save(tmp_path, tuned(*classes), step=2)['linear_head']['kernel']

  def started(*texts, batch_size=4):
    c = tuned(*texts)
    c.train.init, c.tasks.shape.batch_size = str(tmp_path), batch_size
    c.evaluators.shape = config_lib.evaluator('classification', 'shape', split='train')
    c.model.extra_temperature_groups = () if batch_size else ('image_classification',)
    return np.asarray(train_run.read_init(train_run.build(c, jax.devices()[:1]))[0]['linear_head']['kernel'])

  assert np.abs(trained).max() > 0
  np.testing.assert_array_equal(started(*classes), trained)  # more examples of the same task
  np.testing.assert_array_equal(started(*classes, batch_size=0), trained)  # evaluated
  np.testing.assert_array_equal(started(*classes[::-1]), 0 * trained)
  with pytest.raises(UsageError, match='linear_head/bias of that run is for other classes .* which trains nothing'):
    started(*classes[::-1], batch_size=0)
  np.testing.assert_array_equal(started(*classes, 'cat'), np.zeros((len(trained), 4)))
  np.testing.assert_array_equal(started(), trained)  # the same classes, from the records
  assert 'fresh: nothing' in capsys.readouterr().out.splitlines()[-1]
  file = tmp_path / 'config.json'
  file.write_text(file.read_text().replace(workdir.class_digests(tmp_path)['shapes'], 'of others'))
  np.testing.assert_array_equal(started(*classes), 0 * trained)
  assert 'fresh: linear_head/bias, linear_head/kernel, linear_head/s' in capsys.readouterr().out


@pytest.fixture(name='tuned')
def _tuned(tmp_path):
  """(Folder, config, parameters) of a run that started from another, whose relative address is `parent`."""
  c = _config()
  c.moe.router = 'task'  # with names that must be those of the parent
  with contextlib.chdir(tmp_path):
    saved_run.save('parent', c, step=2)
    c.train.init, c.model.num_deep_prompts = 'parent', 2
    yield tmp_path / 'tuned', c, saved_run.save(tmp_path / 'tuned', c, step=3)


def _build(folder, **given):
  return train_run.build(workdir.load_config(folder), jax.devices()[:1], **given)


@pytest.mark.nightly
def test_a_tuned_run_works_without_its_parent_and_from_another_folder(tuned, tmp_path):
  folder, c, params = tuned
  (tmp_path / 'elsewhere').mkdir()
  os.chdir(tmp_path / 'elsewhere')  # until the end of `tuned`
  run = _build(folder, workdir=folder)
  with Checkpoints(folder, max_to_keep=None) as checkpoints:
    chex.assert_trees_all_equal(train_run.read_params(run, checkpoints)[0], params)
  assert trained_run.TrainedRun.load(folder).tasks == ('shape',)
  assert loop.train(c, str(folder), jax.devices()[:1]) == loop.FINISHED  # from step 3 to 6
  assert loop.compile_steps(c, str(folder), jax.devices()[:1]) == loop.FINISHED
  for given in ({}, {'workdir': 'new'}):  # the positive control: a run that starts needs it
    with pytest.raises(ValueError, match="workdir parent holds no run"):
      _build(folder, **given)


def test_a_tuned_run_has_its_own_tokenizer_after_its_parent_was_replaced(tuned):
  folder = tuned[0]
  before = _build(folder).data
  pathlib.Path('parent/tokenizer.model').write_bytes(pathlib.Path(tiny.tokenizer_file()).read_bytes())
  data = _build(folder, workdir=folder).data
  assert (data.tokenizer.size, data.fingerprint) == (before.tokenizer.size, before.fingerprint)
  assert data.tokenizer_file == folder / 'tokenizer.model'
  assert _build(folder).data.fingerprint != before.fingerprint  # the positive control


def test_a_run_without_a_checkpoint_has_the_tokenizer_of_its_parent_not_a_copy(tuned):
  folder = tuned[0]
  shutil.rmtree(folder / 'checkpoints')
  assert _build(folder, workdir=folder).data.tokenizer_file == pathlib.Path('parent/tokenizer.model')


def test_parameters_of_a_run_are_not_read_with_another_tokenizer_of_the_same_size(tuned, tmp_path):
  other = tmp_path / 'other.model'
  config = workdir.load_config(tuned[0])
  texts = [f'{a}{b}{a}{c}' for a in 'ABCDEFGH' for b in 'JKLMNPQR' for c in 'STUVWXYZ']  # none is a word of the parent
  SentencePieceTokenizer.train(texts, other, config.tokenizer.vocab_size)
  config.tokenizer.path = str(other)
  with pytest.raises(UsageError, match=r"config\.tokenizer\.path='.*other\.model' differs from the tokenizer of "
                                       r"config\.train\.init='parent', .*; set it to ''\."):
    train_run.build(config, jax.devices()[:1])
  other.write_bytes(pathlib.Path('parent/tokenizer.model').read_bytes())
  assert train_run.build(config, jax.devices()[:1]).data.tokenizer_file == other


def test_a_run_without_a_tokenizer_file_of_this_type_is_named(tuned):
  pathlib.Path('parent/tokenizer.model').unlink()
  with pytest.raises(ValueError, match=r"config\.train\.init='parent' has no tokenizer\.model: restore it, or, if the "
                                       r"tokenizer of that run is not of type 'sentencepiece', copy its config"):
    _build(tuned[0])
