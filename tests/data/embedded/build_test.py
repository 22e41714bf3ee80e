"""All embedded data are made by one command: the longest first, and what shows images after the images."""

import re

import pytest

from uni_moe_jax.config.schema import DataConfig
from uni_moe_jax.data.embedded import build, docstring_texts, glyph_videos, glyphs

_SOURCES = {'docstring_texts': docstring_texts, 'glyphs': glyphs, 'glyph_videos': glyph_videos}


def test_one_worker_makes_every_source_in_this_process_and_prints_its_seconds(tmp_path, monkeypatch, capsys):
  for name, source in _SOURCES.items():
    def fake_build(directory, report, name=name):
      report(f'{name} in {directory}')
    monkeypatch.setattr(source, 'build', fake_build)
  build.build(DataConfig(dir=str(tmp_path)), 1)
  expected = [line for name in _SOURCES for line in (f'{name} in {tmp_path}', f'{name}: 0 s')]
  assert capsys.readouterr().out.splitlines() == expected


def test_two_workers_leave_what_is_there(tmp_path, capfd):
  for source in _SOURCES.values():
    (tmp_path / source._FOLDER).mkdir()
  build.build(DataConfig(dir=str(tmp_path)), 2)
  names = re.findall(r'(\w+): \d+ s', capfd.readouterr().out)
  assert sorted(names) == sorted(_SOURCES) and names.index('glyphs') < names.index('glyph_videos')
  assert {path.name for path in tmp_path.iterdir()} == {source._FOLDER for source in _SOURCES.values()}


def test_the_error_of_a_worker_is_raised(tmp_path):
  (tmp_path / 'file').write_text('no folder')
  with pytest.raises(FileExistsError):
    build.build(DataConfig(dir=str(tmp_path / 'file')), 2)
