"""The embedded data as TFDS datasets: the same examples in the same order, by random access or as a stream."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from uni_moe_jax.data.embedded import docstring_texts, glyph_classes, glyph_videos, glyphs, tfds_builders
from uni_moe_jax.data.examples.records import Records

_COUNT = 9


def _pixels(split: str, *shape: int) -> np.ndarray:
  return np.random.default_rng(len(split)).integers(0, 256, (_COUNT, *shape), np.uint8)


def _texts(word: str) -> np.ndarray:
  return np.array([f'{word} {i} ü' for i in range(_COUNT)])


@pytest.fixture(autouse=True)
def small_records(monkeypatch):
  """Replaces the real records by nine per split."""
  faces = np.full(_COUNT, 'regular sans')
  labels = np.resize(np.array([glyph_classes.CLASSES[3], '', glyph_classes.CLASSES[0]]), _COUNT)
  loads = {
      (glyphs, 'load'): lambda split: Records(
          {'pixels': _pixels(split, 32, 32), 'name': _texts(split), 'face': faces, 'class': labels},
          {'class': glyph_classes.CLASSES}),
      (glyph_videos, 'load'): lambda split: Records(
          {'pixels': _pixels(split, 8, 32, 32), 'name': _texts(split), 'face': faces,
           'motion': np.array(glyph_videos.MOTIONS[:_COUNT])},
          {'motion': glyph_videos.MOTIONS}),
      (docstring_texts, 'load_paragraphs'): lambda split: Records(
          {'text': _texts(split), 'package': np.resize(np.array(['', docstring_texts.PACKAGES[1]]), _COUNT)},
          {'package': docstring_texts.PACKAGES}),
      (docstring_texts, 'load_pairs'): lambda split: Records(
          {'text_a': _texts('a'), 'text_b': _texts('b'), 'label': np.resize(docstring_texts.ANSWERS, _COUNT)},
          {'label': docstring_texts.ANSWERS}),
  }
  for (module, name), load in loads.items():
    monkeypatch.setattr(module, name, lambda directory, split, load=load: load(split))
  for module in (glyphs, glyph_videos, docstring_texts):
    monkeypatch.setattr(module, 'build', lambda directory: None)


def _prepared(data_dir, name: str, file_format: str = 'array_record', **options):
  builder = tfds.builder(name, data_dir=data_dir, file_format=file_format, **options)
  builder.download_and_prepare(download_dir=data_dir / 'records')
  return builder


@pytest.mark.parametrize('split', ['train', 'test_fonts'])
def test_image_i_of_the_source_is_record_i(tmp_path, split):
  source = _prepared(tmp_path, 'embedded_glyphs').as_data_source(split)
  columns = glyphs.load(tmp_path, split).columns
  assert len(source) == _COUNT
  for i in (4, 0, 8):  # random access
    np.testing.assert_array_equal(source[i]['pixels'][..., 0], columns['pixels'][i])
    assert [source[i][name].decode() for name in ('name', 'face')] == [columns['name'][i], columns['face'][i]]
  # Classes are numbered in order, and no class is -1.
  assert [int(source[i]['class']) for i in range(4)] == [3, -1, 0, 3]


def test_video_i_of_the_source_is_record_i(tmp_path):
  source = _prepared(tmp_path, 'embedded_videos').as_data_source('validation')
  columns = glyph_videos.load(tmp_path, 'validation').columns
  np.testing.assert_array_equal(np.stack(source[5]['pixels'])[..., 0], columns['pixels'][5])
  assert glyph_videos.MOTIONS[source[5]['motion']] == columns['motion'][5]


@pytest.mark.parametrize('part, texts, label, values', [
    ('paragraphs', {'text': 'test 2 ü'}, 'package', [-1, 1]),
    ('pairs', {'text_a': 'a 2 ü', 'text_b': 'b 2 ü'}, 'label', [0, 1])])
def test_texts_and_their_labels_are_read_back(tmp_path, part, texts, label, values):
  source = _prepared(tmp_path, f'embedded_text/{part}').as_data_source('test')
  assert {name: source[2][name].decode() for name in texts} == texts
  assert [int(source[i][label]) for i in range(2)] == values


def test_tfrecords_are_streamed_in_the_order_of_the_records(tmp_path):
  data = _prepared(tmp_path, 'embedded_videos', 'tfrecord').as_dataset('train', shuffle_files=False)
  columns = glyph_videos.load(tmp_path, 'train').columns
  examples = list(data.as_numpy_iterator())
  assert [example['name'].decode() for example in examples] == columns['name'].tolist()
  assert examples[0]['pixels'].shape == (8, 32, 32, 1)


def test_a_limit_takes_evenly_spaced_records(tmp_path):
  config = tfds_builders.SubsetConfig(name='few', limit=3)
  source = _prepared(tmp_path, 'embedded_glyphs', config=config).as_data_source('train')
  # Three of 0…8.
  assert [source[i]['name'].decode() for i in range(3)] == ['train 0 ü', 'train 4 ü', 'train 8 ü']


def test_a_prepared_dataset_has_the_fingerprints_of_its_records(tmp_path):
  _prepared(tmp_path, 'embedded_glyphs')
  metadata = tfds.builder('embedded_glyphs', data_dir=tmp_path).info.metadata
  assert metadata['fingerprint_train'] == glyphs.load(tmp_path, 'train').fingerprint


def test_the_path_contains_dataset_config_and_version(tmp_path):
  path = tfds.builder('embedded_text/pairs', data_dir=tmp_path).data_path
  assert str(path.relative_to(tmp_path)) == 'embedded_text/pairs/1.0.0'
