"""The damage subject: it tries every file, and on whole code it finds nothing. What it finds otherwise: kills_test.py."""

import shutil

import jax.numpy as jnp
import pytest

from uni_moe_jax.faults import damage, kills
from uni_moe_jax.train.checkpoint import Checkpoints


@pytest.fixture(name='workdir', scope='module')
def _workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  with Checkpoints(folder, max_to_keep=3) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, {'params': jnp.arange(600.) + step, 'ema_params': None})
  (folder / 'checkpoints/3/empty').touch()  # nothing needs it, and nothing can be cut off of it
  return folder


@pytest.mark.slow
def test_every_file_is_harmed_in_every_way_and_nothing_gets_through(workdir, tmp_path):
  counts, findings = damage.every_file(workdir, tmp_path, seed=1)
  assert not findings
  files = sum(p.is_file() for p in (workdir / 'checkpoints/3').rglob('*'))
  assert sum(counts.values()) == ((files - 1) * 4 + 1) * 2
  assert counts.pop(f'deleted: {damage.AS_IT_WAS}') == 2  # the empty one
  for harm in damage.HARMS:  # a flipped bit of a time stamp may make another time stamp
    assert counts[f'{harm}: {damage.BEFORE}'] >= files - 2 and counts[f'{harm}: {damage.REFUSED}'] >= files - 2


class _StandIn(kills.Trainer):
  """Says what `plant` says, and puts the checkpoint of `overrides` in the place of the damaged one."""

  def run(self, workdir, log):
    log.write_text(self.plant)
    shutil.rmtree(workdir / 'checkpoints/3')
    shutil.copytree(self.folder / 'whole/checkpoints' / self.overrides[0], workdir / 'checkpoints/3')
    return 0, 1.


_SAID = 'warning: the checkpoint of step 3 in run is damaged: x is missing\nresumed from step 2\n'


@pytest.mark.parametrize('said, ends_with, found', [
    (_SAID, '3', None), (_SAID.replace('from step 2', 'from step 3'), '3', 'did not resume from step 2'),
    (_SAID[_SAID.index('resumed'):], '3', 'passed over in silence'), (_SAID, '2', 'arrays differ')])
def test_a_trainer_goes_on_from_the_one_before_whatever_the_harm(workdir, tmp_path, said, ends_with, found):
  whole = shutil.copytree(workdir, tmp_path / 'whole')
  if ends_with == '2':  # a whole one, but not what the undisturbed run ended with
    shutil.rmtree(tmp_path / 'whole/checkpoints/2')
    with Checkpoints(tmp_path / 'other', max_to_keep=1) as checkpoints:
      checkpoints.save(2, {'params': jnp.arange(600.), 'ema_params': None})
    shutil.copytree(tmp_path / 'other/checkpoints/2', tmp_path / 'whole/checkpoints/2')
  seen, findings = damage.trained_on(_StandIn(tmp_path, said, (ends_with,)), whole, seed=0)
  assert len(seen) == len(damage.HARMS) == 4
  assert len(findings) == (4 if found else 0) and all(found in f for f in findings)
