"""Preparation as a pipeline of Apache Beam writes the files that processes write."""

import functools
import operator

import numpy as np
import pytest

from tests.data import own_files
from tests.helpers import own_environment
from tests.stress import preparation
from uni_moe_jax.cli import environments
from uni_moe_jax.data.batches import sources
from uni_moe_jax.data.formats import input_shards
from uni_moe_jax.data.prepare import on_beam, prepare
from uni_moe_jax.data.shards.mirror import Mirror
from uni_moe_jax.io import storage
from uni_moe_jax.utils.errors import RunError

_OPTIONS = ('--runner=DirectRunner', '--direct_running_mode=multi_processing', '--direct_num_workers=2')


def test_the_pipeline_finds_each_task(tmp_path, monkeypatch):
  commands = []
  monkeypatch.setattr(on_beam, '_python', lambda: 'python')
  monkeypatch.setattr(environments, 'run', lambda *command: commands.append(command) or len(commands) - 1)
  tasks = [functools.partial(operator.mul, 7, i) for i in range(3)]
  on_beam.run(iter(tasks), 3, 'read', tmp_path / 'tasks', ['--runner=X', '--y'])
  assert commands == [
      ('python', 'uni_moe_jax.data.prepare.on_beam', f'{tmp_path}/tasks/read', '3', '--runner=X', '--y')]
  assert [on_beam._run_task(i, f'{tmp_path}/tasks/read') for i in range(3)] == [0, 7, 14]
  on_beam.run(iter(()), 0, 'written', tmp_path / 'tasks', [])
  assert len(commands) == 1
  with pytest.raises(RunError, match='ended with code 1, see above; what is done is kept'):
    on_beam.run(iter(tasks), 3, 'read', tmp_path / 'tasks', [])


@pytest.mark.nightly
def test_a_pipeline_of_two_processes_gives_the_files_of_one(tmp_path, monkeypatch):
  own_environment.made_or_skipped(on_beam._python)
  monkeypatch.setattr(input_shards, '_NUM_ROWS', 5)
  root = own_files.write_captioned_images(tmp_path / 'in')
  own_files.append_odd_rows(root)
  options = dict(max_corrupt_fraction=0.5)
  prepare.prepare(root, tmp_path / 'one', 'x', **options)
  prepare.prepare(root, tmp_path / 'beam', 'x', beam_options=_OPTIONS, **options)
  assert preparation.content(tmp_path / 'beam/own/x') == preparation.content(tmp_path / 'one/own/x')


@pytest.mark.nightly
def test_a_pipeline_writes_into_a_bucket(gcs, tmp_path, monkeypatch):
  own_environment.made_or_skipped(on_beam._python)
  monkeypatch.setattr(input_shards, '_NUM_ROWS', 5)
  root, bucket = own_files.write_captioned_images(tmp_path / 'in'), f'{gcs.address}/beam'
  local = prepare.prepare(root, tmp_path / 'one', 'x')
  summary = prepare.prepare(root, Mirror(bucket, tmp_path / 'sender'), 'x', beam_options=_OPTIONS)
  assert summary == local
  records = [sources.load('own:x', directory, 'train').read(np.arange(24))
             for directory in (str(tmp_path / 'one'), Mirror(bucket, tmp_path / 'receiver'))]
  assert records[0] == records[1]
  assert not any('unfinished' in name for name in storage.files_in(storage.path(bucket)))
