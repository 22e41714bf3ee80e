"""Formats of input, and their division into shards."""

import codecs
import io
import json
import pathlib
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import own_files
from uni_moe_jax.data.formats import archives, input_shards
from uni_moe_jax.data.formats import rows as formats
from uni_moe_jax.data.prepare import input_copy, prepare
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.io import storage
from uni_moe_jax.utils.errors import MissingFileError, UsageError

_OPTIONS = dict(test_fraction=0.0, max_corrupt_fraction=0.9)


def _image(i: int, color: str = 'red', file_format: str = 'JPEG') -> bytes:
  return own_files.encode_image(own_files.color_image(color, i, (8, 8)), file_format)


def _read_all(data, name='x', split='train'):
  dataset = file_dataset.load(f'own:{name}', data, split)
  return dataset.read(np.arange(dataset.size))


def _prepare(source, tmp_path, **options):
  """(summary, records of the split train)"""
  summary = prepare.prepare(source, tmp_path / 'data', 'x', **_OPTIONS | options)
  return summary, _read_all(tmp_path / 'data')


def _skipped(summary):
  return {reason: rows['first'] for reason, rows in summary['skipped'].items()}


def _write_tar(path: pathlib.Path, members: dict[str, bytes]) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as tar:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return path


def test_samples_of_tar_files_have_captions_fields_and_classes(tmp_path):
  _write_tar(tmp_path / 'in/00000.tar', {
      'a/1.jpg': _image(1), 'a/1.txt': b'eins\n', 'a/1.json': json.dumps(
          {'caption': 'eins', 'key': '1', 'color': 'red', 'image': 'elsewhere.jpg', 'size': [3]}).encode(),
      'a/2.png': _image(2, file_format='PNG'), 'a/2.json': b'{"captions": ["zwei", "two"], "color": "red"}',
      '._x.jpg': b'as macOS leaves them'})
  _write_tar(tmp_path / 'in/00001.tar', {'1.cls': b'7', '1.webp': _image(3, file_format='WEBP'), '1.npy': b'?'})
  (tmp_path / 'in/00000_stats.json').write_text('{}')
  summary, records = _prepare(tmp_path / 'in', tmp_path)
  assert [(r['image'], r['captions'], r['color'], r['label'], r['source_location']) for r in records] == [
      (_image(1), ('eins',), 'red', '', '00000.tar/a/1'),
      (_image(2, file_format='PNG'), ('zwei', 'two'), 'red', '', '00000.tar/a/2'),
      (_image(3, file_format='WEBP'), (), '', '7', '00001.tar/1')]
  assert summary['columns'] == {'captions': 'texts', 'color': 'class', 'image': 'image', 'label': 'class'}
  assert summary['dropped_fields'] == {"'size'": 1, "'npy'": 1} and not summary['skipped']


def test_what_img2dataset_records_of_a_download_is_no_column():
  downloaded = {
      'url': 'x.example/1', 'caption': 'a cat', 'key': '1', 'status': 'success', 'error_message': None, 'width': 3,
      'height': 3, 'original_width': 9, 'original_height': 9, 'exif': '{}', 'sha256': 'f0', 'license': 'CC0'}
  parse = lambda fields: formats.parse(fields, '', pathlib.Path(), '', False, data=('image', b''))
  row = parse(downloaded)
  assert (row.texts, row.labels, row.key) == ({'captions': ('a cat',)}, {'license': 'CC0'}, '')
  assert parse({'key': '1', 'url': 'x.example/1', 'status': 'new'}).labels.keys() == {'url', 'status'}  # of another


def test_broken_samples_of_a_tar_file_are_counted_and_named(tmp_path):
  _write_tar(tmp_path / 'in/0.tar', {
      'good.jpg': _image(1), 'bad.jpg': b'no image', 'cut.jpg': _image(2)[:300], 'json.jpg': _image(3),
      'json.json': b'{', 'text.jpg': _image(4), 'text.txt': b'\xff', 'two.jpg': _image(5), 'two.png': _image(6),
      'none.txt': b'no image'})
  summary, records = _prepare(tmp_path / 'in', tmp_path)
  assert [r['source_location'] for r in records] == ['0.tar/good']
  assert _skipped(summary) == {
      'not an image': ['0.tar/bad'], 'corrupt image': ['0.tar/cut'], 'not JSON': ['0.tar/json'],
      'not UTF-8': ['0.tar/text'], 'several images or videos': ['0.tar/two'], 'no image': ['0.tar/none']}


@pytest.mark.parametrize('damage, num_kept', [
    (lambda data: data[:1536 + 700], 1), (lambda data: data[:1536 + 300], 1), (lambda data: data[:3072], 2),
    (lambda data: data[:1536] + bytes([7]) * 512 + data[2048:], 1), (lambda data: b'', 0), (lambda data: b'x' * 999, 0),
], ids=['in an image', 'in a header', 'no end', 'no header', 'empty', 'no tar'])
def test_a_damaged_tar_file_keeps_the_samples_before_the_damage(tmp_path, damage, num_kept):
  images = [_image(i)[:500].ljust(600, b'\0') for i in range(2)]  # of two blocks each
  path = _write_tar(tmp_path / 'in/0.tar', {f'{i}.jpg': data for i, data in enumerate(images)})
  path.write_bytes(damage(path.read_bytes()))
  rows = list(archives.read_tar(str(path), ''))
  assert [row.location for row in rows if not row.skipped] == [f'0.tar/{i}' for i in range(num_kept)]
  assert rows[-1].skipped == 'corrupt or truncated tar file' and len(rows) == num_kept + 1


def test_a_range_names_files_which_must_exist(tmp_path):
  for i in range(8, 12):
    _write_tar(tmp_path / f'in/train-{i:03}.tar', {f'{i}.jpg': _image(i), f'{i}.txt': f'number {i}'.encode()})
  summary, records = _prepare(tmp_path / 'in/train-{009..011}.tar', tmp_path)
  assert [r['captions'] for r in records] == [(f'number {i}',) for i in (9, 10, 11)]
  with pytest.raises(MissingFileError, match=r'\{010\.\.013\}\.tar: train-012.tar, train-013.tar of 4 files do not'):
    list(input_shards.plan(tmp_path / 'in/train-{010..013}.tar'))


def test_equal_images_of_archives_are_compared_by_content_and_declared_keys(tmp_path):
  caption = dict.fromkeys(('1.txt', '2.txt', '3.txt'), b'the same')
  _write_tar(tmp_path / 'in/0.tar', dict(sorted({'1.jpg': _image(1), '2.jpg': _image(2), '3.jpg': _image(1), **caption}
                                                .items())))
  _write_tar(tmp_path / 'in/1.tar', {'1.jpg': _image(4), '1.json': b'{"key": "k"}'})
  _write_tar(tmp_path / 'in/2.tar', {'1.jpg': _image(5), '1.json': b'{"key": "k"}'})
  summary, records = _prepare(tmp_path / 'in', tmp_path)
  assert [r['image'] for r in records] == [_image(i) for i in (1, 2, 4)]
  assert _skipped(summary) == {'duplicate': ['0.tar/3'], 'duplicate key': ['2.tar/1']}


def test_images_of_parquet_are_bytes_or_paths(tmp_path):
  (tmp_path / 'in').mkdir()
  own_files.write_image(tmp_path / 'in/here.png', 'blue', 1)
  pq.write_table(pa.table({'jpg': [_image(0), None, b'no image'], 'caption': ['one', 'two', 'three'],
                           'similarity': [0.5, 0.25, float('nan')]}), tmp_path / 'in/train-0.parquet')
  pq.write_table(pa.table({
      'image': [{'bytes': _image(1), 'path': 'x.jpg'}, {'bytes': None, 'path': 'here.png'},
                {'bytes': None, 'path': None}], 'caption': ['four', 'seven', 'eight'], 'split': [None, 'test', None]}),
                 tmp_path / 'in/train-1.parquet')
  pq.write_table(pa.table({
      'image': ['here.png', 'gone.png', 'https://x.example/y.jpg'], 'caption': ['five', 'six', None],
      'split': ['test', None, None]}), tmp_path / 'in/train-2.parquet')
  summary, records = _prepare(tmp_path / 'in', tmp_path)
  assert [(r['image'], r['captions']) for r in records] == [(_image(0), ('one',)), (_image(1), ('four',))]
  assert [r['captions'] for r in _read_all(tmp_path / 'data', split='test')] == [('seven',), ('five',)]
  assert _skipped(summary) == {
      'no image': ['train-0.parquet:2', 'train-1.parquet:3'], 'not an image': ['train-0.parquet:3'],
      'missing file': ['train-2.parquet:2'],
      'a URL, which is not fetched (img2dataset downloads images)': ['train-2.parquet:3']}


def test_damage_of_a_parquet_file_costs_its_own_rows(tmp_path):
  rows = {'jpg': [_image(i) for i in range(6)], 'caption': [f'number {i}' for i in range(6)]}
  for name in ('0', '1', '2', '3'):
    (tmp_path / 'in').mkdir(exist_ok=True)
    pq.write_table(pa.table(rows | {'key': [f'{name}{i}' for i in range(6)]}), tmp_path / f'in/{name}.parquet',
                   row_group_size=3, compression='none')
  content = bytearray((tmp_path / 'in/1.parquet').read_bytes())
  content[4:40] = bytes(36)  # the header of the first page
  (tmp_path / 'in/1.parquet').write_bytes(content)
  (tmp_path / 'in/2.parquet').write_bytes(b'PAR1')
  content = bytearray((tmp_path / 'in/3.parquet').read_bytes())
  length = 8 + int.from_bytes(content[-8:-4], 'little')  # of the metadata at the end, with this number and PAR1
  content[-length:4 - length] = b'\xff' * 4
  (tmp_path / 'in/3.parquet').write_bytes(content)
  summary, records = _prepare(tmp_path / 'in', tmp_path)
  assert [r['source_location'] for r in records] == [*(f'0.parquet:{i}' for i in range(1, 7)),
                                                     *(f'1.parquet:{i}' for i in (4, 5, 6))]
  assert _skipped(summary) == {'corrupt Parquet file': ['1.parquet:1', '1.parquet:2', '1.parquet:3', '2.parquet:1',
                                                      '3.parquet:1']}


def test_a_value_of_parquet_that_cannot_be_read_costs_one_row(tmp_path):
  texts = pa.array([b'caf\xe9' if i == 70 else f'number {i}'.encode() for i in range(200)])
  pq.write_table(pa.table({
      'text': pa.Array.from_buffers(pa.string(), 200, texts.buffers()), 'label': ['a', 'b'] * 100,
      # Values that nobody can use: nanoseconds, which Python's times do not have, and vectors.
      'when': pa.array([1] * 200, pa.timestamp('ns')), 'vector': [[0.5]] * 200,
      # And some that are used.
      'tags': [['x', 'y']] * 200, 'code': pa.array(['c'] * 200).dictionary_encode(), 'none': [None] * 200,
      'width': [1.5] * 200, 'extra': pa.array(['{}'] * 200, pa.json_()),
  }), tmp_path / 'x.parquet')
  summary, records = _prepare(tmp_path / 'x.parquet', tmp_path)
  assert [r['source_location'] for r in records] == [f'x.parquet:{i + 1}' for i in range(200) if i != 70]
  assert _skipped(summary) == {'not UTF-8': ['x.parquet:71']} and summary['skipped']['not UTF-8']['count'] == 1
  assert summary['columns'] == {
      'text': 'text', 'tags': 'texts', **dict.fromkeys(('label', 'code', 'width', 'extra'), 'class')}
  assert summary['dropped_fields'] == {"'when'": 199, "'vector'": 199}


@pytest.mark.parametrize('unit, impossible', [
    ('ns', 1),  # a fraction of a microsecond
    ('us', 2**62)])  # in the year 148,108
def test_a_time_in_place_of_a_text_costs_its_own_row(tmp_path, unit, impossible):
  when = pa.array([None, 10**9, impossible], pa.timestamp(unit))
  pq.write_table(pa.table({'text': ['one', 'two', 'three'], 'caption': when}), tmp_path / 'x.parquet')
  [shard] = input_shards.plan(tmp_path)
  assert [(row.texts.get('text'), row.skipped) for row in input_shards.read(shard)] == [
      ('one', ''), (None, "wrong type of 'caption'"), (None, 'a value that Python cannot represent')]


@pytest.mark.parametrize('suffix, delimiter', [('csv', ','), ('tsv', '\t')])
def test_a_table_names_files_and_may_have_lines_in_quotes(tmp_path, suffix, delimiter):
  for i in range(3):
    own_files.write_image(tmp_path / f'in/images/{i}.png', 'red', i)
  lines = [['image', ' caption', 'color'], ['images/0.png', f'"a ""red""{delimiter} one,\n\nin lines"', 'red'], [],
           ['images/1.png', 'café', 'red'], ['images/2.png', ''], ['images/9.png', 'gone', ''], ['', 'text', '']]
  content = '\ufeff' + '\r\n'.join(map(delimiter.join, lines)) + '\r\n'
  (tmp_path / f'in/data.{suffix}').write_bytes(content.encode() + b'images/2.png' + delimiter.encode() * 2 + b'\xff\n')
  summary, records = _prepare(tmp_path / 'in', tmp_path)
  assert [(r['captions'], r['color'], r['source_location']) for r in records] == [
      ((' '.join(f'a "red"{delimiter} one, in lines'.split()),), 'red', f'data.{suffix}:2'),
      (('café',), 'red', f'data.{suffix}:6')]
  assert _skipped(summary) == {
      'another number of fields than in the first line': [f'data.{suffix}:7'], 'missing file': [f'data.{suffix}:8'],
      'no image': [f'data.{suffix}:9'], 'not UTF-8': [f'data.{suffix}:10']}


def test_a_table_without_known_columns_is_a_note_beside_folders_of_classes(tmp_path):
  own_files.write_image(tmp_path / 'in/red/0.png', 'red', 0)
  own_files.write_image(tmp_path / 'in/blue/1.png', 'blue', 1)
  (tmp_path / 'in/sizes.csv').write_text('name,width\n0.png,24\n')
  summary, records = _prepare(tmp_path / 'in', tmp_path)
  assert [r['label'] for r in records] == ['blue', 'red']
  assert _skipped(summary) == {'not an image or video': ['sizes.csv']}


def test_links_to_folders_of_classes_are_followed_but_not_around_a_cycle(tmp_path):
  for split, color in (('train', 'red'), ('train', 'blue'), ('test', 'red')):
    own_files.write_image(tmp_path / f'elsewhere/{split}/{color}/{split}.png', color, len(split))
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in/train').symlink_to(tmp_path / 'elsewhere/train')
  (tmp_path / 'in/test').symlink_to('../elsewhere/test')
  expected = ['test/red/test.png', 'train/blue/train.png', 'train/red/train.png']
  rows = lambda: [row for shard in input_shards.plan(tmp_path / 'in') for row in input_shards.read(shard)]
  assert [row.location for row in rows()] == expected
  assert [(row.split, row.labels['label'], row.skipped) for row in rows()] == [
      ('test', 'red', ''), ('train', 'blue', ''), ('train', 'red', '')]
  # Links to the input, to a folder that contains it, to a folder that a link leads to, and to themselves.
  (tmp_path / 'in/train/red/input').symlink_to(tmp_path / 'in')
  (tmp_path / 'in/train/red/here').symlink_to('.')
  (tmp_path / 'in/test/red/train').symlink_to(tmp_path / 'elsewhere/train')
  (tmp_path / 'in/test/red/self').symlink_to('self')
  locations = [row.location for row in rows()]
  # Once by each link, and never through one folder twice.
  assert sorted(set(locations) - set(expected)) == [
      'test/red/self', 'test/red/train/blue/train.png', 'test/red/train/red/train.png']
  assert len(locations) == len(set(locations)) == 6


def test_links_to_nothing_are_missing_files(tmp_path):
  own_files.write_image(tmp_path / 'in/red/0.png', 'red', 0)
  (tmp_path / 'in/red/1.png').symlink_to(tmp_path / 'gone.png')
  (tmp_path / 'in/red/2.png').symlink_to('0.png')
  (tmp_path / 'in/blue').symlink_to(tmp_path / 'gone')
  summary, records = _prepare(tmp_path / 'in', tmp_path)
  assert [r['source_location'] for r in records] == ['red/0.png']
  assert _skipped(summary) == {'missing file': ['blue', 'red/1.png'], 'duplicate': ['red/2.png']}


def test_nan_is_no_value(tmp_path):
  nan = float('nan')
  own_files.write_jsonl(tmp_path / 'train.jsonl', [
      {'text': 'one', 'label': 'a', 'key': nan, 'group': nan}, {'text': 'two', 'label': nan, 'key': nan, 'size': nan},
      {'text': 'three', 'label': 'b', 'key': '3', 'group': 'g', 'size': 0.5}, {'text': nan, 'label': 'a'}])
  assert 'NaN' in (tmp_path / 'train.jsonl').read_text()
  rows = [row for shard in input_shards.plan(tmp_path) for row in input_shards.read(shard)]
  assert [(row.labels, row.key, row.group, row.skipped) for row in rows] == [
      ({'label': 'a'}, '', '', ''), ({}, '', '', ''), ({'label': 'b', 'size': '0.5'}, '3', 'g', ''),
      ({}, '', '', 'no image, video or text')]


def _inputs(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """An input of every kind, with odd rows."""
  own_files.write_captioned_images(root / 'jsonl', 12)
  own_files.append_odd_rows(root / 'jsonl')
  (root / 'lines.txt').write_bytes(
      b'\xef\xbb\xbfone\n\ntwo\rthree\r\n\r\n\n four\n\xe3\x80\x80\nfive\r\rsix \xff\r\rseven')
  for i in range(7):
    own_files.write_image(root / f'folder/{("red", "blue")[i % 2]}/{i}.png', 'red', i, (8, 8))
  rows = [f'folder/red/{i}.png,"number\n{i}",{i}\n' for i in (0, 2, 4)]
  (root / 'table').mkdir()
  (root / 'folder').rename(root / 'table/folder')
  (root / 'table/data.csv').write_text('image,caption,key\n' + ''.join(rows) + '\n"unclosed')
  for i in range(7):
    own_files.write_image(root / f'folder/{("red", "blue")[i % 2]}/{i}.png', 'red', i, (8, 8))
  pq.write_table(pa.table({'text': [f'text {i}' for i in range(9)], 'label': list('aabbccabc')}), root / 'x.parquet')
  return {'jsonl': root / 'jsonl', 'txt': root / 'lines.txt', 'folder': root / 'folder', 'csv': root / 'table',
          'parquet': root / 'x.parquet'}


@pytest.mark.parametrize('name', ['jsonl', 'txt', 'folder', 'csv', 'parquet'])
def test_the_rows_do_not_depend_on_the_size_of_shards(tmp_path, monkeypatch, name):
  source = _inputs(tmp_path / 'in')[name]
  undivided = list(input_shards.plan(source))
  rows = [row for shard in undivided for row in input_shards.read(shard)]
  assert len(undivided) == 1 and len(rows) > 3
  for size in (1, 2, 3):
    monkeypatch.setattr(input_shards, '_NUM_ROWS', size)
    shards = list(input_shards.plan(source))
    assert (len(shards) > 1) == (name != 'parquet')
    assert [row for shard in shards for row in input_shards.read(shard)] == rows
    assert len({shard.name() for shard in shards}) == len(shards)


def test_a_shard_has_fewer_videos_than_rows(tmp_path):
  names = [f'{i}.MP4' for i in range(130)]
  own_files.write_jsonl(tmp_path / 'videos/x.jsonl', [{'video': name} for name in names])
  own_files.write_jsonl(tmp_path / 'named/metadata.jsonl', [{'file_name': name} for name in names])
  own_files.write_jsonl(tmp_path / 'images/x.jsonl', [{'image': f'{i}.png'} for i in range(130)])
  (tmp_path / 'x.csv').write_text('\n'.join(['video', *names]))
  for i, name in enumerate(names):
    (path := tmp_path / f'folder/{i % 2}/{name}').parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  counts = {name: [sum(1 for _ in input_shards.read(shard)) for shard in input_shards.plan(tmp_path / name)]
            for name in ('videos', 'named', 'x.csv', 'folder', 'images')}
  assert counts == dict.fromkeys(('videos', 'named', 'x.csv', 'folder'), [63, 63, 4]) | {'images': [130]}


def test_documents_and_line_numbers_go_on_over_shards(tmp_path, monkeypatch):
  monkeypatch.setattr(input_shards, '_NUM_ROWS', 2)
  rows = [row for shard in input_shards.plan(_inputs(tmp_path)['txt']) for row in input_shards.read(shard)]
  assert [(row.texts['text'], row.location, row.group) for row in rows if not row.skipped] == [
      ('one', 'lines.txt:1', 'lines/0'), ('two', 'lines.txt:3', 'lines/1'), ('three', 'lines.txt:4', 'lines/1'),
      ('four', 'lines.txt:7', 'lines/3'), ('five', 'lines.txt:9', 'lines/4'), ('seven', 'lines.txt:13', 'lines/6')]
  # As in every other format, a line in another encoding, such as Latin-1, is no text with holes.
  assert [(row.skipped, row.location, row.texts) for row in rows if row.skipped] == [('not UTF-8', 'lines.txt:11', {})]


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-be'])
def test_text_in_utf_16_is_refused_with_the_command_that_converts_it(tmp_path, encoding):
  bom = b'' if encoding == 'utf-16' else codecs.BOM_UTF16_BE  # the first one writes its own
  (tmp_path / 'my notes.txt').write_bytes(bom + 'eins\nzwei\n'.encode(encoding))
  (tmp_path / 'other.txt').write_text('one')
  with pytest.raises(UsageError, match=r"my notes\.txt is in UTF-16.* iconv .* 'my notes\.txt' > utf8\.txt"):
    list(input_shards.plan(tmp_path))
  (tmp_path / 'my notes.txt').write_text('ein Sch\xfcler', encoding='utf-8-sig')
  assert len(list(input_shards.plan(tmp_path))) == 2


def test_an_array_of_videos_is_refused_rather_than_left_out(tmp_path):
  (tmp_path / 'moves.jsonl').write_text('{"caption": "a ball"}\n')
  assert len([*input_shards.plan(tmp_path)]) == 1
  (tmp_path / 'moves.npz').touch()
  with pytest.raises(UsageError, match="videos in an array, moves.npz, are not read.* the field 'video'"):
    [*input_shards.plan(tmp_path)]


def test_a_changed_file_is_another_shard(tmp_path):
  own_files.write_jsonl(tmp_path / 'x.jsonl', [{'text': 'one'}])
  [before] = input_shards.plan(tmp_path)
  own_files.write_jsonl(tmp_path / 'x.jsonl', [{'text': 'two'}])
  [after] = input_shards.plan(tmp_path)
  assert before.name() != after.name() != after.name('video')


def test_an_input_of_no_known_format_is_refused(tmp_path):
  with pytest.raises(MissingFileError, match='does not exist'):
    list(input_shards.plan(tmp_path / 'gone'))
  (tmp_path / 'x.zip').touch()
  (tmp_path / 'x').mkdir()
  for name, message in (('x.zip', r'a file must end in \.jsonl, \.tar'), ('x', 'no file of rows')):
    with pytest.raises(UsageError, match=message):
      list(input_shards.plan(tmp_path / name))


def test_archives_in_a_bucket_are_read_there(gcs, tmp_path):
  for i in range(2):
    _write_tar(tmp_path / f'in/{i}.tar', {f'{i}{j}.jpg': _image(3 * i + j) for j in range(3)})
  pq.write_table(pa.table({'jpg': [_image(9)], 'caption': ['one']}), tmp_path / 'table.parquet')
  for path in (*(tmp_path / 'in').iterdir(), tmp_path / 'table.parquet'):
    storage.write_bytes(storage.path(f'{gcs.address}/archives/{path.relative_to(tmp_path)}'), path.read_bytes())
  for i, (local, name) in enumerate((('in', 'in'), ('in', 'in/{0..1}.tar'), ('table.parquet', 'table.parquet'))):
    with input_copy.opened(f'{gcs.address}/archives/{name}', str(tmp_path / 'cache')) as source:
      summary = prepare.prepare(source, tmp_path / 'data', f'x{i}')
    expected = prepare.prepare(tmp_path / local, tmp_path / 'data', f'y{i}')
    assert summary['fingerprints'] == expected['fingerprints']
  assert not (tmp_path / 'cache').exists()
  with pytest.raises(MissingFileError, match=r'2.tar of 3 files do not exist'):
    list(input_shards.plan(storage.path(f'{gcs.address}/archives/in/{{0..2}}.tar')))
