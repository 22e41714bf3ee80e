"""A dataset of array records in a bucket."""

import pathlib
import types

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from uni_moe_jax.data.shards.mirror import Mirror
from uni_moe_jax.data.shards.record_files import Shards
from uni_moe_jax.io import storage

PER_SHARD, _BYTES = 5, 10_000


def upload_shards(bucket: str, folder: pathlib.Path, count: int, seed: int = 0) -> list[bytes]:
  """Write a dataset 'x' of array records of 10 kB; five to a file. Return them."""
  sender = Mirror(bucket, folder)
  records = write_shards(sender.root, count, seed)
  sender.upload(sender.root / 'x', sender.root / 'x', ())
  return records


def write_shards(root: pathlib.Path, count: int, seed: int = 0) -> list[bytes]:
  rng = np.random.default_rng(seed)
  (root / 'x').mkdir(parents=True)
  records = [rng.bytes(_BYTES) for _ in range(PER_SHARD * count)]
  for shard in range(count):
    writer = ArrayRecordWriter(str(root / shard_name(shard)), 'group_size:1')
    for record in records[PER_SHARD * shard:PER_SHARD * (shard + 1)]:
      writer.write(record)
    writer.close()
  return records


def shard_name(shard: int) -> str:
  return f'x/x.array_record-{shard:05}'


def open_shards(data: Mirror, count: int) -> Shards:
  data.sync('x')
  return Shards(data, instructions(data.root, count))


def instructions(root: pathlib.Path, count: int, skip: int = 0) -> list[types.SimpleNamespace]:
  return [types.SimpleNamespace(filename=str(root / shard_name(i)), skip=skip, take=PER_SHARD - skip)
          for i in range(count)]


def object_in(bucket: str, name: str) -> storage.Path:
  return storage.path(bucket) / name
