"""Batches of a run whose data is in a bucket: those of the same data on a disk."""

import fsspec
import numpy as np
import pytest

from tests.data import own_files
from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches.assemble import Data
from uni_moe_jax.data.batches.mixtures import BatchLayout, Mixture, evaluation_batches
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.data.shards.mirror import Mirror


def _data(directory, cache) -> tuple[list[dict], str]:
  """(batches of three steps and of an evaluation, fingerprint of the inputs) of tasks over memory and files."""
  c = tiny.config('shape', data_dir=str(directory))
  c.data.cache_dir = str(cache)
  c.model.update(dict(channels=3, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3))
  c.tokenizer.vocab_size = 60
  c.target_sets.colors = config_lib.target_set('file:names/colors.tsv', family='names')
  c.target_sets.words = config_lib.target_set('vocabulary', family='words')
  c.tasks.color = config_lib.task('image_classification', 'own:colors', batch_size=8, target_set='colors',
                                  label_column='color', crop='random_resized_crop')
  c.tasks.book = config_lib.task('text_mlm', 'own:book', batch_size=4, target_set='words', max_len=20,
                                 max_predictions=3)
  plan = make_plan(c)
  data = Data(c, plan)
  examples = {t.name: data.examples(t, training=True) for t in plan.tasks}
  batches = [b for _, b in Mixture(plan, examples, 0, 'all_tasks', 4, BatchLayout()).iterate(2, 5)]
  evaluated = data.examples(next(t for t in plan.tasks if t.name == 'color'), 'test')
  batches += [{'test': features} for features, _ in evaluation_batches(evaluated, np.arange(evaluated.size), 4)]
  return batches, data.inputs_fingerprint


@pytest.mark.parametrize('scheme', ['gcs', pytest.param('s3', marks=pytest.mark.nightly)])
def test_a_bucket_gives_the_batches_of_a_folder(scheme, request, tmp_path):
  bucket = f'{request.getfixturevalue(scheme).address}/batches'
  folder = Mirror(bucket, tmp_path / 'sender')
  prepare.prepare(own_files.write_captioned_images(tmp_path / 'images'), folder, 'colors')
  (tmp_path / 'book.txt').write_text('\n'.join(f'line {i} of {w}' for i in range(9) for w in tiny.WORDS[:20]))
  prepare.prepare(tmp_path / 'book.txt', folder, 'book', test_fraction=0.0)
  tiny.write(folder, 'glyphs', ['train'])
  (folder.root / 'names').mkdir()
  names = 'green\tgrass\nred\tblood|fire\nblue\tsky\n'
  (folder.root / 'names/colors.tsv').write_text(names)
  fsspec.filesystem(bucket.partition(':')[0]).pipe_file(f'{bucket}/names/colors.tsv', names.encode())
  expected, fingerprint = _data(folder.root, tmp_path / 'none')
  assert not (tmp_path / 'none').exists()
  batches, other_fingerprint = _data(bucket, tmp_path / 'receiver')
  assert other_fingerprint == fingerprint
  assert len(batches) == len(expected) == 3 + 2
  for batch, other in zip(expected, batches, strict=True):
    assert batch.keys() == other.keys()
    for group, features in batch.items():
      features, others = (f if isinstance(f, dict) else {group: f} for f in (features, other[group]))
      for name, value in features.items():
        np.testing.assert_array_equal(value, others[name], err_msg=f'{group}/{name}')
