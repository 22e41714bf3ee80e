"""The metadata of image folders of Hugging Face, whose fields have other names than ours."""

import json
import tarfile

import pytest

from uni_moe_jax.data.formats import input_shards


@pytest.mark.parametrize('fields, media_type, texts, labels', [
    ({'file_name': 'a/1.PNG', 'text': 'a cat'}, 'image', {'captions': ('a cat',)}, {}),
    ({'file_name': '2.mp4', 'text': 'a cat', 'captions': ['b']}, 'video', {'text': 'a cat', 'captions': ('b',)}, {}),
    ({'file_name': '3.png', 'label': 'cat'}, 'image', {}, {'label': 'cat'}),
    ({'image': '4.png', 'file_name': '5.png'}, 'image', {}, {'file_name': '5.png'}),
    ({'file_name': 'notes.txt', 'text': 'a cat'}, '', {'text': 'a cat'}, {'file_name': 'notes.txt'})])
@pytest.mark.parametrize('table', [True, False])
def test_rows_of_metadata_may_have_the_names_that_hugging_face_gives_fields(
    tmp_path, fields, media_type, texts, labels, table):
  if table and 'captions' in fields:
    return  # a table has no lists
  (tmp_path / f'metadata.{"csv" if table else "jsonl"}').write_text(
      '\n'.join(map(','.join, (fields, fields.values()))) if table else json.dumps(fields))
  ((row,),) = (input_shards.read(shard) for shard in input_shards.plan(tmp_path))
  assert (row.media_type, row.texts, row.labels, row.skipped) == (media_type, texts, labels, '')
  assert row.path == (tmp_path / fields.get('image', fields['file_name']) if media_type else None)


@pytest.mark.parametrize('name', ['pages.jsonl', 'a.tar'])
def test_elsewhere_the_name_of_a_file_is_a_label(tmp_path, name):
  row = {'file_name': 'page_3.png', 'text': 'scanned'}
  if name == 'a.tar':
    with tarfile.open(tmp_path / name, 'w') as tar:
      (tmp_path / 'metadata.json').write_text(json.dumps(row))
      tar.add(tmp_path / 'metadata.json', 'metadata.json')
    (tmp_path / 'metadata.json').unlink()
  else:
    (tmp_path / name).write_text(json.dumps(row))
  ((row,),) = (input_shards.read(shard) for shard in input_shards.plan(tmp_path))
  assert (row.media_type, row.texts, row.labels) == ('', {'text': 'scanned'}, {'file_name': 'page_3.png'})


@pytest.mark.parametrize('name, is_data', [('metadata.csv', True), ('list.csv', False)])
def test_a_table_of_file_names_is_data_only_as_metadata_and_else_a_note_beside_folders_of_classes(
    tmp_path, name, is_data):
  (tmp_path / 'cat').mkdir()
  (tmp_path / 'cat/1.png').touch()
  (tmp_path / name).write_text('file_name,species\ncat/1.png,felis\n')
  rows = [row for shard in input_shards.plan(tmp_path) for row in input_shards.read(shard) if not row.skipped]
  assert [(row.path, row.labels) for row in rows] == [
      (tmp_path / 'cat/1.png', {'species': 'felis'} if is_data else {'label': 'cat'})]
