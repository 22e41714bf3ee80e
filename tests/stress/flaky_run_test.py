"""A run whose data and work directory are in a bucket of an unreliable store ends as one on a disk, bit for bit.

With -s, pytest prints how often the store failed.
"""

import json
import re

import jax
import numpy as np
import pytest

from tests.data import own_files
from tests.helpers import processes, saved_run, tiny

pytest.importorskip('aiohttp')
from tests.stress.flaky_store import flaky  # noqa: E402
from uni_moe_jax.data.prepare import prepare  # noqa: E402
from uni_moe_jax.data.shards.mirror import Mirror  # noqa: E402
from uni_moe_jax.io import storage  # noqa: E402
from uni_moe_jax.train.checkpoint import Checkpoints  # noqa: E402

_CONFIG = '''
from tests.helpers import tiny
from uni_moe_jax import config as config_lib

def get_config():
  c = tiny.config('shape')
  c.model.update(dict(num_layers=1, channels=3, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3))
  c.target_sets.colors = config_lib.target_set('own:colors/color', family='names')
  c.tasks.color = config_lib.task('image_classification', 'own:colors', batch_size=8, target_set='colors',
                                  label_column='color', crop='random_resized_crop')
  c.train.update(dict(steps=12, checkpoint_every=3, max_to_keep=4))
  return c
'''
_FAULTS = dict(delay=0.2, errors=0.05, resets=0.02, truncated=0.01, flipped='array_record')


@pytest.mark.parametrize('scheme', ['gcs', 's3'])
def test_a_run_on_an_unreliable_store_is_the_one_on_a_disk(scheme, request, tmp_path):
  store = request.getfixturevalue(scheme)
  bucket = f'{store.address}/flaky'
  sender = Mirror(f'{bucket}/data', tmp_path / 'sender')
  prepare.prepare(own_files.write_captioned_images(tmp_path / 'images'), sender, 'colors')
  tiny.write(sender, 'glyphs', ['train'])
  (tmp_path / 'tiny_config.py').write_text(_CONFIG)

  def train(workdir, data, **variables: str) -> str:
    done = processes.python(
        'launch/train.py', f'--config={tmp_path}/tiny_config.py', f'--workdir={workdir}', f'--config.data.dir={data}',
        f'--config.data.cache_dir={tmp_path}/cache', JAX_PLATFORMS='cpu', XLA_FLAGS='', **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr

  def assert_equal() -> None:
    with Checkpoints(tmp_path / 'run', None) as ones, Checkpoints(storage.path(f'{bucket}/run'), None) as others:
      assert ones.latest() == others.latest() == 12
      jax.tree.map(np.testing.assert_array_equal, saved_run.on_host(ones), saved_run.on_host(others))

  def train_in_bucket(seed):
    with flaky(store, seed=seed, **_FAULTS) as (through, counts):
      output = train(f'{bucket}/run', f'{bucket}/data', **through.environment)
      print(scheme, json.dumps(counts()))
      return output, counts()

  train(tmp_path / 'run', sender.root)
  output, counts = train_in_bucket(seed=2)
  assert all(counts[fault] for fault in ('errors', 'resets', 'truncated', 'flips')), counts
  # s3fs compares checksums of S3 itself, and fetches again.
  assert scheme == 's3' or 'differs from what was prepared' in output
  assert_equal()

  checkpoints = storage.path(f'{bucket}/run/checkpoints')
  saved_run.alter(checkpoints / '9')  # its listing is right: found when it is read
  largest = saved_run.largest_file(checkpoints / '12')
  saved_run.flip_bit(checkpoints / '12' / largest)
  output, _ = train_in_bucket(seed=3)
  for step, reason in ((12, f'{largest} differs from what was saved'), (9, '2 reads differ from what was saved')):
    assert re.search(f'of step {step} in .* is damaged: .*{reason}', output) and f'damaged/{step};' in output, output
  assert 'resumed from step 6' in output
  assert_equal()
