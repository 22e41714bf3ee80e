"""launch/prepare_data.py turns a TFDS dataset into a source, without network access here."""

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
  """Text i of a split has class i modulo 2. TFDS registers the builder as tiny_reviews."""
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


def test_the_command_in_the_error_for_a_missing_source_prepares_it(tmp_path, capsys):
  with pytest.raises(FileNotFoundError) as missing:
    file_dataset.load('tfds:tiny_reviews', tmp_path, 'train')
  _, command = str(missing.value).split('prepare it: python ')
  script, *arguments = shlex.split(command)
  assert (script, arguments) == ('launch/prepare_data.py', ['--tfds=tiny_reviews', f'--data_dir={tmp_path}'])

  assert in_process.run(_ROOT / script, *arguments) == 0
  [output] = [line for line in capsys.readouterr().out.splitlines() if line.startswith('tiny_reviews/1.2.0: ')]
  sizes = set(output.removeprefix('tiny_reviews/1.2.0: ').split(', '))
  assert sizes == {f'{split} {size}' for split, size in _SIZES.items()}

  for split, size in _SIZES.items():
    dataset = file_dataset.load('tfds:tiny_reviews', tmp_path, split)
    assert (dataset.size, dataset.classes) == (size, {'label': _CLASSES})
    records = dataset.read(np.arange(size))
    assert {r['text'] for r in records} == {f'{split} {i}' for i in range(size)}
    assert all(r['label'] == _CLASSES[int(r['text'].split()[1]) % 2] for r in records)
    assert dataset.read(np.array([2, 0])) == [records[2], records[0]]

  assert in_process.run(_ROOT / script, *arguments) == 0  # again
