"""A TFDS data set by launch/prepare_data.py: it becomes a source that is read at random, without a word to the network."""

import pathlib
import shlex

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.helpers import in_process
from uni_moe_jax.data.files import file_dataset

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SIZES = {'train': 7, 'test': 3}
_CLASSES = ('bad', 'good')


class TinyReviews(tfds.core.GeneratorBasedBuilder):
  """Text i of a split is of class i modulo 2. TFDS knows it by its name in small letters."""
  VERSION = tfds.core.Version('1.2.0')

  def _info(self):
    features = tfds.features
    return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(
        {'text': features.Text(), 'label': features.ClassLabel(names=list(_CLASSES))}))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split, size) for split, size in _SIZES.items()}

  def _generate_examples(self, split, size):
    for i in range(size):
      yield i, {'text': f'{split} {i}', 'label': i % 2}


def test_the_command_that_a_source_asks_for_prepares_it(tmp_path, capsys):
  with pytest.raises(FileNotFoundError) as missing:
    file_dataset.load('tfds:tiny_reviews', tmp_path, 'train')
  _, command = str(missing.value).split('prepare it: python ')
  script, *arguments = shlex.split(command)
  assert (script, arguments) == ('launch/prepare_data.py', ['--tfds=tiny_reviews', f'--data_dir={tmp_path}'])

  assert in_process.run(_ROOT / script, *arguments) == 0
  [said] = [line for line in capsys.readouterr().out.splitlines() if line.startswith('tiny_reviews/1.2.0: ')]
  assert set(said.removeprefix('tiny_reviews/1.2.0: ').split(', ')) == {f'{split} {size}' for split, size in _SIZES.items()}

  for split, size in _SIZES.items():
    records = file_dataset.load('tfds:tiny_reviews', tmp_path, split)
    assert (records.size, records.classes) == (size, {'label': _CLASSES})
    rows = records.read(np.arange(size))
    assert {row['text'] for row in rows} == {f'{split} {i}' for i in range(size)}
    assert all(row['label'] == _CLASSES[int(row['text'].split()[1]) % 2] for row in rows)
    assert records.read(np.array([2, 0])) == [rows[2], rows[0]]

  assert in_process.run(_ROOT / script, *arguments) == 0  # once more does no harm
