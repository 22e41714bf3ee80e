"""Addresses: what is refused, and that a path of the disk stays one."""

import pathlib

import pytest

from uni_moe_jax.utils import storage
from uni_moe_jax.utils.errors import UsageError


@pytest.mark.parametrize('address, message', [
    ('gcs://bucket/run', "has the unknown scheme 'gcs'; did you mean 'gs'? choices: gs, s3, or a local path"),
    ('g://bucket/run', "did you mean 'gs'"),
    ('https://bucket/run', "has the unknown scheme 'https'; choices: gs, s3, or a local path"),
    ('gs://', 'lacks the name of a bucket; write gs://BUCKET/NAME'),
    ('gs:///run', 'lacks the name of a bucket'),
    ('gs:/bucket/run', 'lacks the name of a bucket'),
    ('s3:////run', 'lacks the name of a bucket; write s3://BUCKET/NAME'),
    ('gs://Bucket/run', "has the bucket 'Bucket', but a bucket is named with 3 to 222 of a-z, 0-9, dot, hyphen"),
    ('gs://bücket/run', "has the bucket 'bücket'"),
    ('s3://my bucket/run', "has the bucket 'my bucket'"),
    ('gs://bucket/../run', 'has an empty name, . or .. between slashes'),
    ('gs://bucket/./run', 'has an empty name, . or .. between slashes'),
    ('gs://bucket//run', 'has an empty name, . or .. between slashes'),
    ('gs://bucket/my run', "has the character ' '; give a name without spaces"),
    ('gs://bucket/run\n', r"has the character '\n'"),
    ('gs://bucket/run*', "has the character '*'"),
    ('gs://bucket/run#1', "has the character '#'"),
])
def test_an_address_that_cannot_be_one_is_refused_with_one_sentence(address, message):
  with pytest.raises(UsageError) as raised:
    storage.path(address, '--workdir')
  sentence = str(raised.value)
  assert sentence.startswith(f'--workdir={address!r} ') and message in sentence
  assert sentence.endswith('.') and '\n' not in sentence


def test_a_missing_package_is_named_with_the_extra_that_installs_it(monkeypatch):
  monkeypatch.setattr(storage.importlib.util, 'find_spec', lambda name: None)
  for address, package, extra in (('gs://bucket/x', 'gcsfs', 'gcs'), ('s3://bucket/x', 's3fs', 's3')):
    with pytest.raises(UsageError, match=rf"needs the package {package}: pip install 'uni-moe-jax\[{extra}\]'\.$"):
      storage.path(address)


@pytest.mark.parametrize('scheme', ['gs', 's3'])
def test_names_in_a_bucket_are_joined_as_those_of_folders(scheme):
  pytest.importorskip({'gs': 'gcsfs', 's3': 's3fs'}[scheme])
  address = f'{scheme}://my.bucket-1/runs/größer'
  path = storage.path(f'{address}/')  # a slash at the end names the same folder, as on a disk
  assert str(path) == address and str(path / 'checkpoints') == f'{address}/checkpoints'
  assert storage.path(path) == path and storage.is_remote(path) and storage.is_remote(str(path))
  assert storage.split(path) == ('my.bucket-1', 'runs/größer')
  assert str(storage.path(f'{scheme}://bucket')).rstrip('/') == f'{scheme}://bucket'


@pytest.mark.parametrize('address', ['runs/a b', '/runs/x:/y', 'a#b', 'ünï', '.', '~/x', 'c:/x', 'a/gs://b'])
def test_a_path_of_the_disk_may_have_any_name(address):
  assert storage.path(address) == pathlib.Path(address) and not storage.is_remote(address)
  assert storage.path(pathlib.Path(address)) == pathlib.Path(address)


def test_a_file_is_created_once_and_then_replaced(tmp_path):
  target = tmp_path / 'file'
  assert storage.create(target, b'1') and not storage.create(target, b'2') and not storage.create(target, b'1')
  assert target.read_bytes() == b'1'
  storage.write_bytes(target, b'3')
  assert target.read_bytes() == b'3' and [p.name for p in tmp_path.iterdir()] == ['file']


def test_files_of_a_folder_are_listed_with_sizes_and_removed(tmp_path):
  (tmp_path / 'a/b').mkdir(parents=True)
  (tmp_path / 'a/b/x').write_bytes(b'123')
  (tmp_path / 'a/y').touch()
  assert list(storage.files_in(tmp_path / 'a')) == [('b/x', 3), ('y', 0)]
  storage.remove_folder(tmp_path / 'a')
  storage.remove_folder(tmp_path / 'a')
  assert list(tmp_path.iterdir()) == []
