"""Prepared data in a bucket: the same records as on a disk, verified."""

import concurrent.futures
import contextlib
import functools
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data import own_files
from tests.data.bucket_shards import instructions, object_in, open_shards, shard_name, upload_shards, write_shards
from tests.helpers import tiny
from uni_moe_jax.config.schema import DataConfig
from uni_moe_jax.data.prepare import input_copy, prepare, tfds_prepare
from uni_moe_jax.data.shards import file_dataset, mirror, writer
from uni_moe_jax.data.shards.mirror import Mirror
from uni_moe_jax.data.shards.record_files import Shards
from uni_moe_jax.data.text import class_names
from uni_moe_jax.io import storage
from uni_moe_jax.utils.errors import MissingFileError, RunError, UsageError


def _flip(path: storage.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  storage.write_bytes(path, bytes(content))


class _Images(tfds.core.GeneratorBasedBuilder):
  """A TFDS dataset with every type of column."""
  name = 'bucket_images'
  VERSION = tfds.core.Version('1.2.0')

  def _info(self):
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
        'image': tfds.features.Image(), 'captions': tfds.features.Sequence(tfds.features.Text()),
        'label': tfds.features.ClassLabel(names=['cat', 'dog'])}))

  def _split_generators(self, _):
    return {'train': self._generate_examples(7), 'test': self._generate_examples(3)}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, {'image': np.full((9, 8, 3), i, np.uint8), 'captions': [f'number {i}', 'a square'], 'label': i % 2}


def _records(source: str, directory) -> dict:
  """All content of the split train."""
  dataset = file_dataset.load(source, directory, 'train')
  part = file_dataset.load(source, directory, 'train[2:5]+test') if source.startswith('tfds') else dataset
  rows = lambda records: [{c: x.tolist() if isinstance(x, np.ndarray) else x for c, x in record.items()}
                          for record in records.read(np.arange(records.size))]
  return {'part': rows(part), 'fingerprint': dataset.fingerprint, 'records': rows(dataset),
          'labels': {c: x.tolist() for c, x in dataset.labels.items()}, 'classes': dataset.classes,
          'num_texts': {c: x.tolist() for c, x in dataset.num_texts.items()}}


@pytest.mark.parametrize('bucket', ['gcs', 's3'], indirect=True)
@pytest.mark.parametrize('source', ['own:images', 'own:texts', 'own:videos', 'tfds:bucket_images', 'glyphs', 'pairs'])
def test_a_bucket_has_the_records_of_a_folder(bucket, tmp_path, source):
  name = source.partition(':')[2]
  writers = {'images': own_files.write_captioned_images, 'texts': own_files.write_text_pairs,
             'videos': functools.partial(own_files.write_videos, suffix='gif')}
  folder, sender = tmp_path / 'folder', Mirror(bucket, tmp_path / 'sender')
  for directory in (folder, sender):
    if source.startswith('own:'):
      prepare.prepare(writers[name](tmp_path / 'in'), directory, name, gif='video', max_corrupt_fraction=0.5)
    elif source.startswith('tfds:'):
      assert tfds_prepare.prepare(name, directory) == 'bucket_images/1.2.0: train 7, test 3'
    else:
      tiny.write(directory, source, ['train', 'test'])
  local = _records(source, str(folder))
  assert local == _records(source, Mirror(bucket, tmp_path / 'receiver'))
  assert len(str(local)) > 500


def test_threads_read_the_records_of_a_folder_in_the_order_of_the_request(tmp_path):
  records, rng = write_shards(tmp_path, 3), np.random.default_rng(0)
  shards, rest = Shards(tmp_path, instructions(tmp_path, 3)), Shards(tmp_path, instructions(tmp_path, 3, skip=2))
  assert (len(shards), len(rest)) == (15, 9)
  assert rest.__getitems__([8, 0, 3]) == [records[14], records[2], records[7]]
  requests = [rng.integers(0, 15, 20) for _ in range(200)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for ids, made in zip(requests, pool.map(shards.__getitems__, requests), strict=True):
      assert made == [records[i] for i in ids]


def test_a_damaged_shard_costs_the_damaged_records_only(tmp_path):
  prepare.prepare(own_files.write_captioned_images(tmp_path / 'in', 40), tmp_path, 'some')
  [shard] = (tmp_path / 'own/some/1.0.0').glob('*train.array_record*')
  dataset = file_dataset.load('own:some', tmp_path, 'train')
  valid, content = dataset.read(np.arange(dataset.size)), bytearray(shard.read_bytes())
  content[content.index(valid[9]['image'][100:120])] ^= 1
  shard.write_bytes(content)
  records = file_dataset.load('own:some', tmp_path, 'train').read_valid(np.arange(dataset.size))
  assert [i for i, record in enumerate(records) if record != valid[i]] == [9]
  assert isinstance(records[9], file_dataset.CorruptExample)


def test_a_dataset_whose_upload_was_interrupted_does_not_exist(bucket, tmp_path, monkeypatch):
  files, puts = storage.filesystem(bucket), []
  put = files.put_file

  def interrupted(local, remote):
    puts.append(remote)
    if len(puts) == 3:
      raise KeyboardInterrupt
    put(local, remote)

  monkeypatch.setattr(files, 'put_file', interrupted)
  with pytest.raises(KeyboardInterrupt):
    upload_shards(bucket, tmp_path / 'sender', 4)
  with pytest.raises(MissingFileError, match=f'{bucket}/x has no files.json: nothing was prepared there'):
    Mirror(bucket, tmp_path / 'receiver').sync('x')


@contextlib.contextmanager
def _during_upload(bucket, monkeypatch, interrupt):
  """Calls `interrupt` once, when the first file of an upload is written to the bucket."""
  files, calls = storage.filesystem(bucket), []
  put = files.put_file

  def interrupted(local, remote):
    put(local, remote)
    if not calls:
      calls.append(remote)
      interrupt()

  with monkeypatch.context() as patch:
    patch.setattr(files, 'put_file', interrupted)
    yield
  assert calls


def test_while_one_preparation_uploads_a_second_one_is_refused_and_removes_nothing(bucket, tmp_path, monkeypatch):
  root = own_files.write_text_pairs(tmp_path / 'in')

  def start_again():
    with pytest.raises(UsageError, match='is locked by another process, which prepares the same dataset'):
      prepare.prepare(root, Mirror(bucket, tmp_path / 'host'), 'texts')

  with _during_upload(bucket, monkeypatch, start_again):
    prepare.prepare(root, Mirror(bucket, tmp_path / 'host'), 'texts')
  prepare.prepare(root, tmp_path / 'folder', 'texts')
  expected = _records('own:texts', str(tmp_path / 'folder'))
  host, receiver = (Mirror(bucket, tmp_path / name) for name in ('host', 'receiver'))
  assert _records('own:texts', host) == _records('own:texts', receiver) == expected
  assert receiver.num_fetched > host.num_fetched == 0  # what was written on a host is not fetched there


def test_who_reads_while_a_version_is_uploaded_has_the_one_before(bucket, tmp_path, monkeypatch):
  open_sender = lambda: Mirror(bucket, tmp_path / 'sender')
  sizes = []
  read = lambda: sizes.append(file_dataset.load('own:texts', open_sender(), 'train').size)
  prepare.prepare(own_files.write_text_pairs(tmp_path / '1', 9), open_sender(), 'texts', '1.0.0')
  with _during_upload(bucket, monkeypatch, read):
    prepare.prepare(own_files.write_text_pairs(tmp_path / '2', 8), open_sender(), 'texts', '2.0.0')
  read()
  assert sizes == [27, 28]


def test_a_dataset_that_was_removed_from_the_bucket_is_replaced_on_the_host_that_had_it(bucket, tmp_path):
  for num_test, size in ((9, 27), (8, 28)):
    prepare.prepare(own_files.write_text_pairs(tmp_path / f'{size}', num_test), Mirror(bucket, tmp_path / 'host'), 'x')
    for host in ('host', f'receiver of {size}'):
      assert file_dataset.load('own:x', Mirror(bucket, tmp_path / host), 'train').size == size
    storage.remove_folder(object_in(bucket, 'own/x/1.0.0'))


def test_files_without_a_manifest_are_fetched_again(bucket, tmp_path):
  old = upload_shards(bucket, tmp_path / 'sender', 2)
  assert open_shards(Mirror(bucket, tmp_path / 'receiver'), 2).__getitems__(range(10)) == old
  manifest = next((tmp_path / 'receiver').rglob('files.json'))
  new = upload_shards(bucket, tmp_path / 'other', 2, seed=1)
  manifest.unlink()  # as if the process that removes the dataset had been killed
  assert open_shards(Mirror(bucket, tmp_path / 'receiver'), 2).__getitems__(range(10)) == new != old


@pytest.mark.parametrize('source', ['tfds:bucket_images', 'glyphs'])
def test_two_processes_of_a_host_write_a_dataset_without_rows_of_a_user_once(bucket, tmp_path, monkeypatch, source):
  generated = []

  def splits():
    generated.append(source)
    yield 'train', *tiny.columns()['glyphs']

  def write():
    if source == 'glyphs':
      writer.write_dataset(Mirror(bucket, tmp_path / 'host'), file_dataset.embedded_folder('glyphs'), splits)
    else:
      tfds_prepare.prepare('bucket_images', Mirror(bucket, tmp_path / 'host'))

  generate = _Images._split_generators
  monkeypatch.setattr(_Images, '_split_generators', lambda *args: generated.append(source) or generate(*args))
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    others = []

    def start_second():
      others.append(pool.submit(write))
      with pytest.raises(TimeoutError):
        others[0].result(1)

    with _during_upload(bucket, monkeypatch, start_second):
      write()
    others[0].result(60)
  assert generated == [source]
  records = _records(source, Mirror(bucket, tmp_path / 'host'))
  assert records == _records(source, Mirror(bucket, tmp_path / 'receiver')) and len(str(records)) > 300


def test_what_a_killed_process_had_begun_to_write_is_not_uploaded(bucket, tmp_path):
  mirrored = Mirror(bucket, tmp_path)
  folder = mirrored.root / 'own/x'
  folder.mkdir(parents=True)
  for name in ('records', '.hidden', f'.{"0" * 16}.tmp'):
    (folder / name).write_bytes(b'1')
  mirrored.upload(folder, folder, ())
  assert storage.files_in(storage.path(f'{bucket}/own/x')).keys() == {'records', '.hidden', mirror.MANIFEST}


def test_what_exists_in_a_bucket_is_not_prepared_again(bucket, tmp_path):
  root = own_files.write_text_pairs(tmp_path / 'in')
  prepare.prepare(root, Mirror(bucket, tmp_path / '1'), 'texts')
  with pytest.raises(UsageError, match='already exists'):
    prepare.prepare(root, Mirror(bucket, tmp_path / '2'), 'texts')
  object_in(bucket, 'own/texts/1.0.0/files.json').unlink()  # as if the first one had been killed
  with pytest.raises(MissingFileError, match=r'own/texts has no files\.json: nothing was prepared there'):
    file_dataset.load('own:texts', Mirror(bucket, tmp_path / '3'), 'train')
  prepare.prepare(root, Mirror(bucket, tmp_path / '1'), 'texts')
  assert file_dataset.load('own:texts', Mirror(bucket, tmp_path / '3'), 'train').size == 27


def test_of_two_versions_the_newest_is_read_and_a_removed_one_is_forgotten(bucket, tmp_path):
  sender = Mirror(bucket, tmp_path / 'sender')
  for version, num_test in (('1.0.0', 9), ('1.10.0', 8), ('1.9.0', 7)):
    prepare.prepare(own_files.write_text_pairs(tmp_path / version, num_test), sender, 'texts', version)
  sizes = lambda: file_dataset.load('own:texts', Mirror(bucket, tmp_path / 'receiver'), 'train').size
  assert sizes() == 28
  storage.remove_folder(object_in(bucket, 'own/texts/1.10.0'))
  assert sizes() == 29


def test_a_bit_that_flips_in_transit_is_noticed_and_the_file_fetched_again(bucket, tmp_path, monkeypatch, capsys):
  records = upload_shards(bucket, tmp_path / 'sender', 2)
  files = storage.filesystem(bucket)
  fetch, flipped = files.get_file, []

  def flip_once(remote, local, **options):
    fetch(remote, local, **options)
    if remote.endswith(shard_name(1)) and not flipped:
      flipped.append(remote)
      _flip(pathlib.Path(local))

  monkeypatch.setattr(files, 'get_file', flip_once)
  data = Mirror(bucket, tmp_path / 'receiver')
  assert open_shards(data, 2).__getitems__(range(10)) == records
  assert flipped and data.num_fetched == 3
  assert f'{bucket}/{shard_name(1)} differs from what was prepared' in capsys.readouterr().out


def test_an_object_with_a_flipped_bit_is_named_and_no_example_is_replaced_for_it(bucket, tmp_path):
  upload_shards(bucket, tmp_path / 'sender', 2)
  _flip(object_in(bucket, shard_name(1)))
  shards = open_shards(Mirror(bucket, tmp_path / 'receiver'), 2)
  dataset = file_dataset.FileDataset('x', 10, shards.__getitems__, {}, {}, {}, '')
  assert len(dataset.read_valid(np.arange(5))) == 5
  for _ in range(2):  # it is not remembered as good, either
    with pytest.raises(RunError, match=f'{bucket}/{shard_name(1)} is damaged: two fetches differ from what was'):
      dataset.read_valid(np.arange(10))
  upload_shards(bucket, tmp_path / 'second', 2)  # the same bytes again
  assert len(dataset.read_valid(np.arange(10))) == 10


def test_an_object_that_is_gone_ends_the_run_and_costs_no_example(bucket, tmp_path):
  upload_shards(bucket, tmp_path / 'sender', 2)
  shards = open_shards(Mirror(bucket, tmp_path / 'receiver'), 2)
  dataset = file_dataset.FileDataset('x', 10, shards.__getitems__, {}, {}, {}, '')
  object_in(bucket, shard_name(1)).unlink()
  assert len(dataset.read_valid(np.arange(5))) == 5
  with pytest.raises(RunError, match=f'{bucket}/{shard_name(1)} cannot be fetched into .* MB free on the disk'):
    dataset.read_valid(np.arange(10))


def test_a_bucket_that_does_not_exist_is_reported_at_once(bucket, tmp_path):
  data = DataConfig(dir=bucket.replace('bucket', 'tekcub'), cache_dir=str(tmp_path))
  with pytest.raises(UsageError, match="data.dir='.*' names the bucket 'tekcub', which does not exist; check its name"):
    mirror.open_folder(data)


def test_a_dataset_that_was_replaced_is_fetched_again_and_only_what_has_changed(bucket, tmp_path):
  upload_shards(bucket, tmp_path / 'sender', 2)
  open_shards(Mirror(bucket, tmp_path / 'receiver'), 2).__getitems__(range(10))
  records = upload_shards(bucket, tmp_path / 'other', 3, seed=1)
  data = Mirror(bucket, tmp_path / 'receiver')
  assert open_shards(data, 3).__getitems__(range(15)) == records
  again = Mirror(bucket, tmp_path / 'receiver')
  assert open_shards(again, 3).__getitems__(range(15)) == records
  assert (data.num_fetched, again.num_fetched) == (3, 0)


def test_input_in_a_bucket_is_prepared_as_a_folder_is(bucket, tmp_path):
  root = own_files.write_captioned_images(tmp_path / 'in')
  for path in root.rglob('*.*'):
    storage.write_bytes(object_in(bucket, f'in/{path.relative_to(root)}'), path.read_bytes())
  local = prepare.prepare(root, tmp_path / 'data', 'images')
  for name in ('in', 'in/data.jsonl'):
    with input_copy.local_input(f'{bucket}/{name}', '--input', str(tmp_path / 'cache')) as source:
      assert prepare.prepare(source, tmp_path / 'data', f'i{len(name)}')['fingerprints'] == local['fingerprints']
    assert not list((tmp_path / 'cache').iterdir())
  with pytest.raises(MissingFileError, match='does not exist'):
    with input_copy.local_input(f'{bucket}/gone', '--input', str(tmp_path / 'cache')) as source:
      prepare.prepare(source, tmp_path / 'data', 'gone')


def test_class_names_elsewhere_are_read_where_they_are(bucket, tmp_path):
  data, own = Mirror(f'{bucket}/data', tmp_path / 'cache'), tmp_path / 'own'
  own.mkdir()
  contents = {'names.txt': b'a\tcat\n', 'names.tmp': b'a draft'}
  for name, content in contents.items():
    (own / name).write_bytes(content)
  before = (own / 'names.txt').stat()
  assert class_names.read_entries(f'file:{own}/names.txt', data, 'target_sets.x') == (('a', ('cat',)),)
  assert {path.name: path.read_bytes() for path in own.iterdir()} == contents  # and no lock
  assert ((own / 'names.txt').stat().st_ino, (own / 'names.txt').stat().st_mtime_ns) == (
      before.st_ino, before.st_mtime_ns)
  storage.write_bytes(object_in(bucket, 'names.txt'), b'b\tdog\n')
  assert class_names.read_entries(f'file:{bucket}/names.txt', data, 'target_sets.x') == (('b', ('dog',)),)
  assert not [path for path in data.root.rglob('*') if path.is_file()]
  # A relative path is copied from the bucket of the data.
  storage.write_bytes(object_in(bucket, 'data/names.txt'), b'c\tbird\n')
  assert class_names.read_entries('file:names.txt', data, 'target_sets.x') == (('c', ('bird',)),)
  assert (data.root / 'names.txt').read_bytes() == b'c\tbird\n'
  with pytest.raises(MissingFileError, match='gone'):
    class_names.read_entries('file:gone.tsv', data, 'target_sets.x')
