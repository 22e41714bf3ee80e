"""The copy of an input in a bucket: one per address, also after commands that were killed."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import own_files
from tests.data.bucket_shards import object_in
from tests.helpers import processes
from uni_moe_jax.data.formats import input_shards
from uni_moe_jax.data.prepare import input_copy, prepare
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.io import storage


def test_what_a_killed_command_has_copied_is_used_again_and_its_parts_have_their_names(bucket, tmp_path, monkeypatch):
  for path in own_files.write_text_pairs(tmp_path / 'in').iterdir():
    storage.write_bytes(object_in(bucket, f'in/{path.name}'), path.read_bytes())
  arguments = f'{bucket}/in', '--input', str(tmp_path / 'cache')
  done = processes.python('-c', f'''
import os, signal
from uni_moe_jax.data.prepare import input_copy
from uni_moe_jax.data.formats import input_shards
with input_copy.local_input(*{arguments}) as source:
  print(*(shard.name() for shard in input_shards.plan(source)), flush=True)
  os.kill(os.getpid(), signal.SIGKILL)''')
  assert done.returncode == -9, done.stderr
  [left] = (tmp_path / 'cache').iterdir()
  (left / 'in/test.jsonl').write_text('{')  # half of it
  (left / 'in/removed.jsonl').write_text('{}')
  files, fetched = storage.filesystem(bucket), []
  fetch = files.get_file
  monkeypatch.setattr(files, 'get_file', lambda remote, local: (fetched.append(remote), fetch(remote, local)))
  with input_copy.local_input(*arguments) as source:
    assert fetched == [f'{bucket}/in/test.jsonl']
    assert [shard.name() for shard in input_shards.plan(source)] == done.stdout.split()
    assert list((tmp_path / 'cache').iterdir()) == [left] == [source.parent]
    with input_copy.local_input(*arguments) as other:  # as of another command meanwhile
      assert other.parent != left and len(list(other.iterdir())) == 2
  assert not list((tmp_path / 'cache').iterdir())


@pytest.mark.parametrize('name, delimiter', [('data.csv', ','), ('data.tsv', '\t')])
def test_files_in_a_bucket_that_a_table_names_are_copied(gcs, tmp_path, name, delimiter):
  rows = [{'image': f'images/{i}.png', 'caption': f'number {i}'} for i in range(4)]
  for i in range(4):
    own_files.write_image(tmp_path / f'in/images/{i}.png', 'red', i)
  lines = ['image', 'caption'], *(row.values() for row in rows)
  (tmp_path / f'in/{name}').write_text('\n'.join(map(delimiter.join, lines)))
  folder = f'{gcs.address}/table-{name}'
  for path in (p for p in tmp_path.glob('in/**/*') if p.is_file()):
    storage.write_bytes(storage.path(f'{folder}/{path.relative_to(tmp_path / "in")}'), path.read_bytes())
  with input_copy.opened(f'{folder}/{name}', str(tmp_path / 'cache')) as source:
    prepare.prepare(source, tmp_path / 'data', 'x', test_fraction=0.0)
  dataset = file_dataset.load('own:x', tmp_path / 'data', 'train')
  assert [r['captions'] for r in dataset.read(np.arange(dataset.size))] == [(f'number {i}',) for i in range(4)]
  assert not list((tmp_path / 'cache').iterdir())


def test_paths_in_parquet_files_of_a_bucket_are_refused_by_what_to_do(gcs, tmp_path):
  own_files.write_image(tmp_path / '0.png', 'red', 0)
  pq.write_table(pa.Table.from_pylist([{'image': '0.png', 'caption': 'red'}]), tmp_path / 'x.parquet')
  for name in ('0.png', 'x.parquet'):
    storage.write_bytes(storage.path(f'{gcs.address}/paths/{name}'), (tmp_path / name).read_bytes())
  with input_copy.opened(f'{gcs.address}/paths', str(tmp_path / 'cache')) as source:
    with pytest.raises(ValueError, match='a path in a Parquet file of a bucket.*copy the folder to a disk'):
      prepare.prepare(source, tmp_path / 'data', 'x', test_fraction=0.0)
  prepare.prepare(tmp_path / 'x.parquet', tmp_path / 'data', 'x', test_fraction=0.0)  # the control: there it works
