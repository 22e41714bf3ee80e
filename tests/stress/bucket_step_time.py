"""What data in a bucket costs a step once it was fetched: steps in turn on the same images in a folder and a bucket.

  python -m tests.stress.bucket_step_time [--rounds=12] [--latency=0.02]

The bucket is a test server behind a proxy that answers after `latency` seconds. Prints the start-up of each, bytes
fetched, the ratio of the step times, and that of reading records alone, from 64 files.
"""

import argparse
import dataclasses
import itertools
import os
import pathlib
import tempfile
import time
import types

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from tests.data import own_files
from tests.helpers import object_stores
from tests.stress.flaky_store import flaky
from uni_moe_jax import config as config_lib
from uni_moe_jax.config import presets
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.assemble import Data
from uni_moe_jax.data.files import prepare
from uni_moe_jax.data.mirror import Mirror
from uni_moe_jax.data.shards import Shards
from uni_moe_jax.tools.bench.cases import RepeatedStep
from uni_moe_jax.tools.bench.timing import Rounds, interleaved
from uni_moe_jax.train import run as run_lib

_IMAGES, _STEPS = 2000, 8  # of the dataset; per round
_FILES, _RECORDS, _BATCH = 64, 50, 256  # of reading alone: files, records in each, records read at once


def _prepare(folder: pathlib.Path, data: Mirror) -> None:
  rows = [{'image': f'images/{i}.jpg', 'color': color, 'split': 'train'}
          for i, color in zip(range(_IMAGES), itertools.cycle(own_files.COLORS))]
  for i, row in enumerate(rows):
    own_files.write_image(folder / 'in' / row['image'], row['color'], i, (96, 72))
  own_files.write_jsonl(folder / 'in/train.jsonl', rows)
  prepare.prepare(folder / 'in', data, 'images')


def _config(data_dir: str, cache: pathlib.Path):
  c = config_lib.base()
  presets.small(c)
  c.data.dir, c.data.cache_dir, c.train.mixture = data_dir, str(cache), 'all_tasks'
  c.tokenizer.allow_smaller_vocab = True
  c.target_sets.colors = config_lib.target_set('own:images/color', family='names')
  c.tasks.color = config_lib.task('image_classification', 'own:images', batch_size=32, target_set='colors',
                                  label_column='color', crop='random_resized_crop')
  return c


def _step_times(folder: pathlib.Path, address: str, rounds: int) -> Rounds:
  calls, run, steps = {}, None, None
  for name, data_dir in (('folder', str(folder / 'sender' / address.replace('://', '/'))), ('bucket', address)):
    start, c = time.perf_counter(), _config(data_dir, folder / 'receiver')
    data = Data(c, make_plan(c))
    opened = time.perf_counter() - start
    run = run or run_lib.build(c, data=data)
    batches = dataclasses.replace(run, data=data).mixture().iterate(0, 10**6)
    next(batches)
    print(f'{name}: opened in {opened:.2f} s, first batch after {time.perf_counter() - start:.2f} s', flush=True)
    steps = steps or RepeatedStep(run)
    calls[name] = lambda batches=batches: [
        steps(run.put_batch(batch)) for _, batch in itertools.islice(batches, _STEPS)][-1]
  return interleaved(calls, rounds)


def _reading_times(folder: pathlib.Path, address: str, rounds: int) -> Rounds:
  sender, rng = Mirror(address, folder / 'sender'), np.random.default_rng(0)
  (sender.root / 'x').mkdir()
  names = [f'x/x.array_record-{i:05}' for i in range(_FILES)]
  for name in names:
    writer = ArrayRecordWriter(str(sender.root / name), 'group_size:1')
    for _ in range(_RECORDS):
      writer.write(rng.bytes(8000))
    writer.close()
  sender.upload(sender.root / 'x')
  receiver = Mirror(address, folder / 'receiver')
  receiver.sync('x')
  instructions = lambda root: [types.SimpleNamespace(
      filename=str(root / n), skip=0, take=_RECORDS) for n in names]
  sources = {'folder': Shards(sender.root, instructions(sender.root)),
             'bucket': Shards(receiver, instructions(receiver.root))}
  read = lambda source: lambda: [source.__getitems__(rng.integers(0, _FILES * _RECORDS, _BATCH).tolist())
                                 for _ in range(20)] and ()
  return interleaved({name: read(source) for name, source in sources.items()}, rounds)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=12)
  parser.add_argument('--latency', type=float, default=0.02, help='Seconds until the store answers.')
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as name, object_stores.gcs_server() as store, flaky(
      store, delay=flags.latency) as (slow, _):
    folder, address = pathlib.Path(name), f'{store.address}/data'
    os.environ.update(slow.environment)
    _prepare(folder, Mirror(address, folder / 'sender'))
    for what, seconds in (('steps', _step_times(folder, address, flags.rounds)),
                          ('reading', _reading_times(folder, address, flags.rounds))):
      ratio = seconds.figure(seconds['bucket'] / seconds['folder'])
      print(f'{what}: bucket / folder {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}), '
            f'{np.median(seconds["folder"]):.3f} s a round; {seconds.discarded} rounds discarded, '
            f'judged: {seconds.judged}', flush=True)


if __name__ == '__main__':
  main()
