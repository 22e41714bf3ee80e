"""The commands of a run with all of its folders in a bucket give what they give on a disk, to the last digit."""

import json
import pathlib

import jax
import numpy as np
import pytest

from tests.helpers import in_process, processes, saved_run
from tests.helpers.stop_request import StopAfterThreeSteps
from uni_moe_jax.io import storage
from uni_moe_jax.train import loop, manifest
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.utils.exit_codes import FINISHED, PREEMPTED

_LAUNCH = processes.ROOT / 'launch'
_CONFIG = '''
from tests.helpers import tiny
from uni_moe_jax import config as config_lib

def get_config():
  c = tiny.config('shape', 'caption', data_dir=tiny.data_dir())
  c.evaluators.shapes = config_lib.evaluator('classification', 'shape', split='train')
  c.evaluators.captions = config_lib.evaluator('caption', 'caption', split='train', num_examples=6)
  c.model.num_layers = 1
  c.train.update(dict(steps=6, ema_decay=0.9, checkpoint_every=4))
  return c
'''


def _run(script: str, *flags: str) -> int:
  one = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda: one)
    return in_process.run(_LAUNCH / f'{script}.py', *flags)


def _commands(config: pathlib.Path, root: str, stop: bool) -> None:
  """Train, evaluate, measure, report and export; `stop`: training stops in between, and continues."""
  workdir, train = f'--workdir={root}/run', (f'--config={config}', f'--workdir={root}/run')
  if stop:
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(loop, 'Stop', StopAfterThreeSteps)
      assert _run('train', *train) == PREEMPTED
  assert _run('train', *train) == FINISHED
  assert _run('evaluate', workdir) == FINISHED
  assert _run('interference', workdir, '--num_batches=2') == FINISHED
  assert _run('report', workdir) == FINISHED
  assert _run('export', workdir, f'--output={root}/exported', '--num_examples=2') == FINISHED


def _json(path: storage.Path):
  return json.loads(path.read_text())


@pytest.fixture(name='disk', scope='module')
def _disk(tmp_path_factory):
  folder = tmp_path_factory.mktemp('disk')
  (folder / 'tiny_config.py').write_text(_CONFIG)
  _commands(folder / 'tiny_config.py', str(folder), stop=False)
  return folder


@pytest.mark.nightly
@pytest.mark.parametrize('store', ['gs', 's3'], indirect=True)
def test_a_run_in_a_bucket_that_is_stopped_and_continued_is_the_one_on_a_disk(disk, store, tmp_path, monkeypatch):
  bucket = storage.path(f'{store.address}/runs/{tmp_path.name}')
  _commands(disk / 'tiny_config.py', str(bucket), stop=True)
  local, remote = disk / 'run', bucket / 'run'
  with Checkpoints(local, None) as ones, Checkpoints(remote, None) as others:
    assert ones.steps() == [4, 6] and others.steps() == [4, 6]
    jax.tree.map(np.testing.assert_array_equal, saved_run.on_host(ones), saved_run.on_host(others))
  lines = saved_run.lines(local)
  assert lines == saved_run.lines(remote) and len(lines) == 6
  for file in ('evaluation.json', 'samples.json', 'interference.json', 'experts.json'):
    assert _json(local / file) == _json(remote / file), file
  made = {name.split('/')[0] for name in storage.files_in(remote)}
  assert made >= {p.name for p in local.iterdir()} - {'.lock'} and 'tensorboard' in made
  assert '<html' in (remote / 'report.html').read_text()
  # The example of the other store may have been run in the folder on the disk.
  assert {p.name for p in (disk / 'exported').iterdir()} - {'__pycache__'} == {
      name.split('/')[0] for name in storage.files_in(bucket / 'exported')}

  saved_run.copy(bucket / 'exported', tmp_path / 'exported')
  outputs = [processes.python(str(folder / 'exported/example.py')) for folder in (disk, tmp_path)]
  assert outputs[0].returncode == 0 and outputs[0].stdout == outputs[1].stdout, outputs
  assert all(line.endswith('; as at export') for line in outputs[0].stdout.splitlines())

  sums = manifest.array_sums
  monkeypatch.setattr(manifest, 'array_sums', lambda folder: {
      path: n + (folder.name == '6') for path, n in sums(folder).items()})
  assert _run('evaluate', f'--workdir={remote}', '--force') == FINISHED
  assert {row['step'] for row in _json(remote / 'evaluation.json')} == {4}


@pytest.mark.nightly
@pytest.mark.parametrize('store', ['gs', 's3'], indirect=True)
def test_a_run_starts_from_one_in_a_bucket(disk, store, tmp_path):
  bucket = f'{store.address}/init/{tmp_path.name}'
  saved_run.copy(disk / 'run', storage.path(f'{bucket}/run'))
  flags = f'--config={disk}/tiny_config.py', f'--config.train.init={bucket}/run', '--config.train.steps=1'
  assert _run('train', *flags, f'--workdir={bucket}/tuned') == FINISHED
  assert _run('experts', '--step=1', f'--workdir={bucket}/tuned') == FINISHED
  assert 'experts_step_1.json' in storage.files_in(storage.path(f'{bucket}/tuned'))
