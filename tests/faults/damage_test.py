"""The damage subject: it tries every file, and on whole code it finds nothing. What it finds otherwise: kills_test.py."""

import jax.numpy as jnp
import pytest

from uni_moe_jax.faults import damage
from uni_moe_jax.train.checkpoint import Checkpoints


@pytest.fixture(name='workdir', scope='module')
def _workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  with Checkpoints(folder, keep=3) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, {'params': jnp.arange(600.) + step, 'ema': None})
  return folder


def test_every_file_is_harmed_in_every_way_and_nothing_gets_through(workdir, tmp_path):
  counts, findings = damage.every_file(workdir, tmp_path, seed=1)
  assert not findings
  files = sum(p.is_file() for p in (workdir / 'checkpoints/3').rglob('*'))
  assert sum(counts.values()) == files * 3 * 2
  for harm in damage.HARMS:  # a flipped bit of a time stamp may make another time stamp
    assert counts[f'{harm}: {damage.BEFORE}'] >= files - 1 and counts[f'{harm}: {damage.REFUSED}'] >= files - 1
