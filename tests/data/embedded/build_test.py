"""Embedded data are made by one command, with what they are made of; what is there stays."""

import re

import numpy as np
import pytest

from uni_moe_jax.config.schema import DataConfig
from uni_moe_jax.data.embedded import build, digits, glyphs
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.utils.errors import UsageError


@pytest.fixture(name='few_faces')
def _few_faces(monkeypatch):
  names = ('STIXGeneralItalic', 'STIXGeneralBolIta', 'STIXGeneralBol')
  monkeypatch.setattr(glyphs, 'FACES', {name: glyphs.FACES[name] for name in names})


def _finished(output: str) -> list[str]:
  return re.findall(r'^(\w+): \d+ s$', output, re.MULTILINE)


def test_questions_are_made_after_the_images_that_they_are_about(few_faces, tmp_path, capsys):
  fingerprints = []
  for folder in ('one', 'other'):
    build.build(DataConfig(dir=str(tmp_path / folder)), 1, ['questions'])
    assert _finished(capsys.readouterr().out) == ['glyphs', 'questions']
    images, questions = (file_dataset.load(name, tmp_path / folder, 'train') for name in ('glyphs', 'questions'))
    fingerprints.append((images.fingerprint, questions.fingerprint))
  assert fingerprints[0] == fingerprints[1] and len(set(fingerprints[0])) == 2
  shown = {(record['name'], record['pixels'].tobytes()) for record in images.map(dict, np.arange(images.size))}
  first = questions.read(np.array([0]))[0]
  assert first['pixels'].shape == (1, 32, 32, 1)
  assert (first['name'], first['pixels'].tobytes()) in shown


def test_what_is_there_is_not_made_again(tmp_path, capsys):
  build.build(DataConfig(dir=str(tmp_path)), 2, ['digits'])
  assert _finished(capsys.readouterr().out) == ['digits']
  build.build(DataConfig(dir=str(tmp_path)), 2, ['digits'])
  assert capsys.readouterr().out == ''


def test_records_have_the_columns_and_classes_in_their_order(tmp_path):
  build.build(DataConfig(dir=str(tmp_path)), 1, ['digits'])
  records = file_dataset.load('digits', tmp_path, 'validation')
  expected = next(columns for split, columns, _ in digits.splits(lambda line: None) if split == 'validation')
  assert records.classes == {'name': digits.NAMES} and records.media_type == 'image'
  np.testing.assert_array_equal(records.labels['name'], [digits.NAMES.index(name) for name in expected['name']])
  read = records.map(lambda record: record['pixels'][0, ..., 0], np.arange(records.size))
  np.testing.assert_array_equal(read, expected['pixels'])


def test_an_unknown_split_lists_the_existing_ones(tmp_path):
  build.build(DataConfig(dir=str(tmp_path)), 1, ['digits'])
  with pytest.raises(UsageError, match="'test_fonts'.*test, train, validation"):
    file_dataset.load('digits', tmp_path, 'test_fonts')


def test_a_mistyped_name_is_answered_with_the_nearest(tmp_path):
  with pytest.raises(UsageError, match="--embedded=digit is unknown; .*'digits'"):
    build.build(DataConfig(dir=str(tmp_path)), 1, ['digit'])


def test_missing_data_name_the_directory_and_the_command(tmp_path):
  with pytest.raises(FileNotFoundError, match=f'{tmp_path}.*uni-moe prepare-data --data_dir={tmp_path}'):
    file_dataset.load('glyphs', tmp_path, 'train')


def test_the_error_of_a_worker_is_raised(tmp_path):
  (tmp_path / 'file').write_text('no folder')
  with pytest.raises((FileExistsError, NotADirectoryError)):
    build.build(DataConfig(dir=str(tmp_path / 'file')), 2, ['digits', 'pairs'])
