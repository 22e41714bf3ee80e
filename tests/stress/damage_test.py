"""The damage suite tries every file and has no findings in correct code. run_test.py has findings in faulty code."""

import shutil

import jax.numpy as jnp
import pytest

from tests.stress import damage
from tests.stress.trainer import Trainer
from uni_moe_jax.train.checkpoint import Checkpoints


@pytest.fixture(name='workdir', scope='module')
def _workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  with Checkpoints(folder, max_to_keep=3) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, {'params': jnp.arange(600.) + step, 'ema_params': None})
  (folder / 'checkpoints/3/empty').touch()  # nothing needs it, and it cannot be truncated
  return folder


@pytest.mark.slow
def test_no_damage_of_any_file_is_read(workdir, tmp_path):
  counts, findings = damage.damage_every_file(workdir, tmp_path, seed=1)
  assert not findings
  files = sum(p.is_file() for p in (workdir / 'checkpoints/3').rglob('*'))
  assert sum(counts.values()) == ((files - 1) * 4 + 1) * 2
  assert counts.pop(f'deleted: {damage.UNCHANGED}') == 2  # the empty one
  for name in damage.DAMAGES:  # a flipped bit of a timestamp may change only the timestamp
    assert counts[f'{name}: {damage.PREVIOUS}'] >= files - 2 and counts[f'{name}: {damage.REFUSED}'] >= files - 2


class _StandIn(Trainer):
  """Prints `fault`, and replaces the damaged checkpoint by that of the step in `overrides`."""

  def run(self, workdir, log):
    log.write_text(self.fault)
    shutil.rmtree(workdir / 'checkpoints/3')
    shutil.copytree(self.folder / 'undisturbed/checkpoints' / self.overrides[0], workdir / 'checkpoints/3')
    return 0, 1.


_OUTPUT = 'warning: the checkpoint of step 3 in run is damaged: x is missing\nresumed from step 2\n'


@pytest.mark.parametrize('output, last_step, finding', [
    (_OUTPUT, '3', None), (_OUTPUT.replace('from step 2', 'from step 3'), '3', 'did not resume from step 2'),
    (_OUTPUT[_OUTPUT.index('resumed'):], '3', 'skipped without a warning'), (_OUTPUT, '2', 'arrays differ')])
def test_a_trainer_must_resume_from_the_previous_checkpoint_after_damage(
    workdir, tmp_path, output, last_step, finding):
  undisturbed = shutil.copytree(workdir, tmp_path / 'undisturbed')
  if last_step == '2':  # an intact checkpoint, but not the last one of the undisturbed run
    shutil.rmtree(undisturbed / 'checkpoints/2')
    with Checkpoints(tmp_path / 'other', max_to_keep=1) as checkpoints:
      checkpoints.save(2, {'params': jnp.arange(600.), 'ema_params': None})
    shutil.copytree(tmp_path / 'other/checkpoints/2', undisturbed / 'checkpoints/2')
  report, findings = damage.train_on_damage(_StandIn(tmp_path, output, (last_step,)), undisturbed, seed=0)
  assert len(report) == len(damage.DAMAGES) == 4
  assert len(findings) == (4 if finding else 0) and all(finding in f for f in findings)
