"""Every record that a mixture reads is counted once, although a batch with a corrupt example is made twice."""

import contextlib
import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.data import own_files
from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches.mixtures import BatchLayout, Mixture
from uni_moe_jax.data.examples.corrupt_examples import CorruptExampleCounter
from uni_moe_jax.data.examples.examples import ExampleBuilder, Examples
from uni_moe_jax.data.formats.rows import LOCATION
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer
from uni_moe_jax.utils.errors import RunError

_BATCH = 8


def _images(corrupt: set[int]) -> FileDataset:
  """As many images as a batch has."""
  image = own_files.encode_image(Image.new('RGB', (20, 20)), 'PNG')
  read = lambda ids: [{'image': b'bytes' if i in corrupt else image, 'label': 'a', LOCATION: f'file {i}'}
                      for i in ids.tolist()]
  columns = {'image': 'image', 'label': 'class', LOCATION: 'text'}
  return FileDataset('own:images', _BATCH, read, columns, {'label': ('a', 'b')}, {}, '')


def _lines(unreadable: set[int]) -> FileDataset:
  """Lines of text shorter than a row."""
  def read(ids):
    if unreadable & set(ids.tolist()):
      raise RuntimeError('chunk data hash mismatch')
    return [{'text': f'number {i}', LOCATION: f'line {i}'} for i in ids.tolist()]
  return FileDataset('own:lines', 30, read, {'text': 'text', LOCATION: 'text'}, {}, {}, '')


@pytest.fixture(scope='module')
def counted():
  """Returns a function: (sets of damaged images and lines) → (num_corrupt, num_read) of both tasks after a batch."""
  c, tokenizer = tiny.config(data_dir=''), SentencePieceTokenizer(tiny.tokenizer_file())
  c.target_sets.ab = config_lib.target_set(('a', 'b'), family='names')
  c.target_sets.words = config_lib.target_set('vocabulary', family='words')
  c.tasks.image = config_lib.task('image_classification', 'own:images', batch_size=_BATCH, target_set='ab',
                                  label_column='label')
  c.tasks.text = config_lib.task('text_mlm', 'own:lines', batch_size=4, target_set='words', max_len=20,
                                 max_predictions=3)
  plan = make_plan(c)
  plan = dataclasses.replace(plan, tasks=tuple(t for t in plan.tasks if t.name in ('image', 'text')))
  builder = ExampleBuilder(tokenizer, {'ab': ('a', 'b')}, 3, 16, True, False, 0, 1.0, 'fast')

  def count(images=frozenset(), lines=frozenset(), once=False):
    datasets = {'image': _images(images), 'text': _lines(lines)}
    examples = {t.name: builder.build(t, datasets[t.name]) for t in plan.tasks}
    if once:  # by the graph that counts as it reads
      examples = {name: dataclasses.replace(e, make_undamaged=None) for name, e in examples.items()}
    list(Mixture(plan, examples, 0, 'all_tasks', 4, BatchLayout()).iterate(0, 1))
    return {name: (e.corrupt_counter.num_corrupt, e.corrupt_counter.num_read) for name, e in examples.items()}
  return count


@pytest.mark.nightly
def test_a_batch_that_is_made_twice_is_counted_once(counted):
  valid = counted()
  assert valid == counted(once=True)
  assert valid['image'] == (0, _BATCH) and valid['text'][0] == 0 and valid['text'][1] > 4  # several lines in a row
  damaged = counted(images={2, 5})
  assert damaged['text'] == valid['text']
  assert damaged['image'][0] >= 2 and damaged['image'] == (damaged['image'][0], _BATCH + damaged['image'][0])


def test_lines_that_cannot_be_read_are_counted_once(counted):
  lines = set(range(0, 30, 5))
  damaged = counted(lines=lines)
  assert damaged == counted(lines=lines, once=True)
  assert damaged['text'][0] > 0 and damaged['image'] == (0, _BATCH)


@pytest.mark.parametrize('num_read, too_many', [(5000, False), (1900, True)])  # of at most 1 %
def test_corrupt_examples_of_all_processes_decide_whether_they_are_too_many(num_read, too_many):
  processes = []
  for corrupt, read in ((['file 0', *['file'] * 19], 1000), ([], num_read - 1000)):  # one above, and one below 1 %
    examples = Examples(1, None, corrupt_counter=CorruptExampleCounter('tasks.x', 0.01))
    examples.corrupt_counter.count(read, corrupt)
    examples.corrupt_counter.check()
    processes.append(Mixture(None, {'x': examples}, 0, 'all_tasks', 4, BatchLayout()))
  own = [[e.corrupt_counter.num_corrupt, e.corrupt_counter.num_read] for m in processes for e in m.examples.values()]
  for mixture, first in zip(processes, ('the first: file 0', 'other processes name them')):
    with pytest.raises(RunError, match=f'x: 20 of 1900 .*; {first}') if too_many else contextlib.nullcontext():
      assert mixture.num_corrupt_examples(lambda _: np.sum(own, 0).tolist()) == 20
