"""Expert usage of a run: its conditions and tokens, independent of the layout of the batch."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from uni_moe_jax.analysis import run_expert_usage
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train import workdir
from uni_moe_jax.utils.errors import UsageError


def _config(router, *tasks, **changes):
  c = tiny.config(*tasks, data_dir=tiny.data_dir())
  c.model.num_layers = 1
  c.moe.update(dict(router=router, gmm='batched'))
  c.train.update(changes)
  return c


@functools.cache
def _usage(router, tasks, devices=1, accum=1):
  run = train_run.build(_config(router, *tasks, grad_accum_steps=accum), jax.devices()[:devices])
  return run_expert_usage.compute_usage(run, run.init().params, 'init', 2, 0)


@pytest.mark.nightly
def test_routers_by_token_are_measured_on_batches_task_by_task():
  content = _usage('token', ('caption', 'pair'))
  assert content['conditions'] == [
      'caption visual', 'caption words', 'caption queries', 'set words', 'pair visual', 'pair paired text']
  assert content['tasks'] == {
      'caption': {'visual': 0, 'words': 1, 'queries': 2, 'set words': 3}, 'pair': {'visual': 4, 'paired text': 5}}
  shares, tokens = np.array(content['coefficients']), content['tokens']
  assert shares.shape == (1, 2, 6, 4)
  np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)
  # 2 batches of 4 images of each task, as `spe` and 4 patches; 32 sampled words as [spe, v, eot].
  assert tokens[0] == 2 * 4 * 5 and tokens[4] == 2 * 4 * 5 and tokens[3] == 2 * 32 * 3
  assert tokens[1] == tokens[2] <= 2 * 4 * 6
  assert np.ptp(shares[0, 1], axis=0).max() > .02  # conditions differ
  assert 0 < min(np.ravel(content['router_entropy'])) and max(np.ravel(content['router_entropy'])) <= np.log(2) + 1e-5
  # The entropy of a mean is never below the mean of the entropies.
  assert (np.array(content['entropy']) >= np.array(content['router_entropy']) - 1e-5).all()


@pytest.mark.nightly
def test_the_layout_of_the_batch_changes_nothing():
  """package and answer share a group, whose layout differs on two devices."""
  one, two = (_usage('token', ('package', 'answer'), devices) for devices in (1, 2))
  assert one['tokens'] == two['tokens'] and one['conditions'] == two['conditions']
  for key in ('coefficients', 'router_entropy', 'mean_task_overlap'):
    np.testing.assert_allclose(one[key], two[key], atol=1e-4)
  assert np.abs(np.subtract(*np.array(one['coefficients'])[0, 0, [0, 2]])).max() > 1e-3  # the two tasks differ


@pytest.mark.nightly
def test_accumulation_counts_every_micro_step():
  one, two = (_usage('token', ('package', 'answer'), accum=accum) for accum in (1, 2))
  assert one['conditions'] == two['conditions'] == ['answer text', 'set answers', 'package text', 'set packages']
  micro_steps = [2 if 'set' in condition else 1 for condition in one['conditions']]  # each encodes the set
  np.testing.assert_array_equal(two['tokens'], np.multiply(one['tokens'], micro_steps))
  np.testing.assert_allclose(one['coefficients'], two['coefficients'], atol=1e-4)


def test_merging_routers_need_no_batch():
  content = _usage('task', ('caption', 'pair'))
  assert content['num_batches'] == 0 and content['tokens'] is None
  caption = content['tasks']['caption']
  assert [content['conditions'][caption[s]] for s in ('visual', 'words', 'queries')] == ['caption'] * 3
  assert content['router_entropy'] == content['entropy']
  assert max(np.ravel(content['effective_experts'])) <= 2 + 1e-5  # two experts are kept


def test_after_an_evaluation_the_command_is_printed_only_of_a_run_that_it_can_measure(tmp_path, capsys):
  run = train_run.build(_config('token', 'caption', 'pair'), jax.devices()[:1])
  untrained = dataclasses.replace(run, plan=dataclasses.replace(run.plan, tasks=()))
  for measured, printed in ((run, f'uni-moe experts --workdir={tmp_path} measures which experts tokens use.\n'),
                            (untrained, '')):
    run_expert_usage.write_after_evaluation(measured, None, 9, tmp_path)
    assert capsys.readouterr().out == printed


def test_files_have_the_name_of_the_checkpoint_and_a_dense_model_is_an_error(tmp_path):
  paths = run_expert_usage.measure_expert_usage(_config('task', 'shape'), tmp_path, None, True, 1, 0, jax.devices()[:1])
  assert [p.name for p in paths] == ['experts_init.json', 'experts_init.png']
  assert json.loads(paths[0].read_text())['checkpoint'] == 'init'
  with pytest.raises(ValueError, match="config.moe.router='dense'.*has no experts"):
    run_expert_usage.measure_expert_usage(_config('dense', 'shape'), tmp_path, None, True, 1, 0, jax.devices()[:1])
  with pytest.raises(ValueError, match='has no checkpoint yet'):
    run_expert_usage.measure_expert_usage(_config('task', 'shape'), tmp_path, None, False, 1, 0, jax.devices()[:1])


def test_a_run_is_read_on_one_device_if_its_mesh_does_not_fit_and_other_data_is_noted(tmp_path, capsys):
  c = _config('task', 'shape')
  c.mesh.update(dict(expert=4, data=4))  # of 16 devices
  workdir.claim_workdir(tmp_path, c, 'of the version before')
  assert len(run_expert_usage.measure_expert_usage(c, tmp_path, None, True, 1, 0)) == 2
  notes = capsys.readouterr().err
  assert 'does not fit here (devices: 8); one device is used' in notes and 'was trained on different data' in notes


@pytest.mark.parametrize('router, advice', [
    ('task', ', or --at_init for its parameters in the tasks of this one.'), ('token', '.')])
def test_a_run_that_trains_no_task_names_what_can_be_measured(tmp_path, router, advice):
  init = str(tmp_path / 'trained')
  workdir.claim_workdir(init, _config(router, 'pair'), 'print')
  c = tiny.untrained(init)
  c.moe.router = router
  with pytest.raises(UsageError) as error:
    run_expert_usage.measure_expert_usage(c, tmp_path, None, False, 1, 0, jax.devices()[:1])
  assert str(error.value) == ('this run trains no task and has no checkpoints; give --workdir of the run that it '
                              f'starts from, {init!r}{advice}')
