"""Addresses: what is refused, and that a path of the disk stays one; objects in a bucket, and faults of its store."""

import concurrent.futures
import contextlib
import functools
import hashlib
import pathlib
import signal

import pytest

from tests.helpers import processes
from uni_moe_jax.io import storage
from uni_moe_jax.utils.errors import RunError, UsageError


@pytest.mark.parametrize('address, message', [
    ('gcs://bucket/run', "has the unknown scheme 'gcs'; did you mean 'gs'? choices: gs, s3, or a local path"),
    ('g://bucket/run', "did you mean 'gs'"),
    ('https://bucket/run', "has the unknown scheme 'https'; choices: gs, s3, or a local path"),
    ('gs://', 'lacks the name of a bucket; write gs://BUCKET/NAME'),
    ('gs:///run', 'lacks the name of a bucket'),
    ('gs:/bucket/run', 'is no address of a bucket; write gs://BUCKET/NAME'),
    ('s3:bucket/run', 'is no address of a bucket; write s3://BUCKET/NAME'),
    ('gs//bucket/run', 'is no address of a bucket'),
    ('GS://bucket/run', "has the unknown scheme 'GS'; choices: gs, s3"),
    (' gs://bucket/run', 'is no address of a bucket'),
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


@pytest.mark.parametrize('address', ['runs/a b', '/runs/x:/y', 'a#b', 'ünï', '.', 'x~', 'c:/x', 'a/gs://b', './gs:x'])
def test_a_path_of_the_disk_may_have_any_name(address):
  assert storage.path(address) == pathlib.Path(address) and not storage.is_remote(address)
  assert storage.path(pathlib.Path(address)) == pathlib.Path(address)


def test_a_string_may_start_with_the_home_folder():
  # Shells expand it in `cd ~/runs`, not in --workdir=~/runs: a folder called ~ would be made.
  assert storage.path('~/runs') == storage.absolute('~/runs') == pathlib.Path.home() / 'runs'
  assert storage.path(pathlib.Path('~/runs')) == pathlib.Path('~/runs')
  assert storage.path('runs/~') == pathlib.Path('runs/~')


def test_a_file_is_replaced(tmp_path):
  target = tmp_path / 'file'
  for content in (b'1', b'3'):
    storage.write_bytes(target, content)
  assert target.read_bytes() == b'3' and [p.name for p in tmp_path.iterdir()] == ['file']


def test_threads_that_write_one_file_leave_what_one_of_them_has_written(tmp_path):
  contents = [b'%d' % i * 10_000 for i in range(8)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for _ in range(20):
      list(pool.map(functools.partial(storage.write_bytes, tmp_path / 'file'), contents))
      assert (tmp_path / 'file').read_bytes() in contents
  assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path):
  (tmp_path / 'target').mkdir()  # over which no file is renamed
  (tmp_path / 'target/file').write_bytes(b'old')
  with pytest.raises(IsADirectoryError) as error:
    storage.write_bytes(tmp_path / 'target', b'new')
  assert error.value.filename == str(tmp_path / 'target')
  assert (tmp_path / 'target/file').read_bytes() == b'old' and [p.name for p in tmp_path.iterdir()] == ['target']


def test_a_process_that_is_killed_leaves_the_old_content_and_a_hidden_file_that_is_recognized(tmp_path):
  target = tmp_path / 'config.json'
  target.write_bytes(b'old')
  killed = processes.python('-c', f'''
import os, pathlib, signal
from uni_moe_jax.io import storage
pathlib.Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
storage.write_bytes(pathlib.Path({str(target)!r}), b'new')''')
  assert killed.returncode == -signal.SIGKILL and target.read_bytes() == b'old'
  [left] = set(tmp_path.iterdir()) - {target}
  assert left.name.startswith('.') and left.read_bytes() == b'new' and storage.is_leftover(left)
  storage.write_bytes(target, b'newer')
  assert target.read_bytes() == b'newer' and not any(map(storage.is_leftover, (target, tmp_path / '.lock')))


def test_files_of_a_folder_are_listed_with_sizes_and_removed(tmp_path):
  (tmp_path / 'a/b').mkdir(parents=True)
  (tmp_path / 'a/b/x').write_bytes(b'123')
  (tmp_path / 'a/y').touch()
  assert storage.files_in(tmp_path / 'a') == {'b/x': (3, None), 'y': (0, None)}
  storage.remove_folder(tmp_path / 'a')
  storage.remove_folder(tmp_path / 'a')
  assert list(tmp_path.iterdir()) == [] and storage.files_in(tmp_path / 'a') == {}


def test_what_cannot_be_listed_does_not_look_empty(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(NotADirectoryError):
    storage.files_in(tmp_path / 'file')


def test_an_object_is_created_by_one_of_several_writers_and_then_replaced(store):
  target = storage.path(f'{store.address}/objects/größer')
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    created = list(pool.map(lambda i: storage.create(target, b'%d' % i), range(8)))
  assert created.count(True) == 1 and target.read_bytes() == b'%d' % created.index(True)
  # The answer to a request was lost, and the request repeated: the object is there, and has what it writes.
  assert storage.create(target, b'%d' % created.index(True))
  storage.write_bytes(target, b'123')
  assert storage.files_in(target.parent) == {'größer': (3, hashlib.md5(b'123').hexdigest())}


def test_a_folder_of_a_bucket_is_moved_over_another_and_removed(store, monkeypatch):
  monkeypatch.setattr(storage, '_PAGE', 2)  # objects of a listing
  folder = storage.path(f'{store.address}/folders')
  for name in ('a/x', 'a/deep/y', 'b/old', 'ab/other'):
    storage.write_bytes(folder / name, name.encode())
  storage.move_folder(folder / 'a', folder / 'b')
  assert list(storage.files_in(folder)) == ['ab/other', 'b/deep/y', 'b/x']
  assert (folder / 'b/deep/y').read_bytes() == b'a/deep/y'
  assert 'folders/b/deep/y' in storage.files_in(storage.path(store.address))
  storage.remove_folder(folder / 'b')
  storage.remove_folder(folder / 'b')
  assert list(storage.files_in(folder)) == ['ab/other']


def test_files_that_grow_are_copied_when_the_period_has_passed_or_at_once_if_wanted(store):
  target = storage.path(f'{store.address}/growing')
  folder = storage.GrowingFolder(target, period=1000)
  (folder.local / 'deep').mkdir()
  for i, wait in enumerate([True, False, True]):
    with (folder.local / 'deep/log').open('a') as log:
      log.write(f'{i}')
    folder.copy(wait)
    assert (target / 'deep/log').read_text() == ('0', '0', '012')[i]
  (folder.local / 'last').touch()
  folder.close()
  assert list(storage.files_in(target)) == ['deep/log', 'last'] and not folder.local.exists()


def test_a_bucket_that_does_not_exist_is_named(store):
  scheme = store.address.partition(':')[0]
  storage.check_access(storage.path(f'{store.address}/nothing/here'), '--workdir')
  with pytest.raises(UsageError, match=f"--workdir='{scheme}://absent/run' names the bucket 'absent', which does not"):
    storage.check_access(storage.path(f'{scheme}://absent/run'), '--workdir')


@pytest.mark.parametrize('message, is_passing, attempts, error', [
    ('Service Unavailable, 503', False, 1, RunError),
    ('Anonymous caller does not have access, 401', False, 4, UsageError),
    ('Anonymous caller does not have access, 401', True, 2, None)])
def test_credentials_are_looked_for_again_and_a_store_that_does_not_answer_is_no_mistake_of_the_user(
    gcs, monkeypatch, message, is_passing, attempts, error):
  opened = []

  def call(files, *_, **__):
    opened.append(files)
    if len(opened) == 1 or not is_passing:
      raise type('HttpError', (Exception,), {})(message)

  monkeypatch.setattr(type(storage.filesystem(gcs.address)), 'call', call)
  address = f'{gcs.address}/run'
  with contextlib.nullcontext() if error is None else pytest.raises(error, match=f'^--workdir={address}: '):
    storage.check_access(storage.path(address), '--workdir', pauses=(0., 0., 0.))
  assert len(opened) == len({*map(id, opened)}) == attempts  # each anew: gcsfs keeps what it has found


@pytest.mark.parametrize('text, meaning', [
    ('HttpError: Anonymous caller does not have storage.objects.list access to the bucket., 401', 'credentials are'),
    ('RefreshError: Reauthentication is needed', 'credentials are missing or have expired'),
    ('ValueError: UNAUTHENTICATED: Error reading "gs://b/x"', 'credentials are missing or have expired'),
    ('PermissionError: The provided token has expired.', 'credentials are missing or have expired'),
    ('NoCredentialsError: Unable to locate credentials', 'credentials are missing or have expired'),
    ('OSError: Forbidden: b/bucket/o', 'permission is denied'),
    ('PermissionError: Access Denied', 'permission is denied'),
    ('ValueError: PERMISSION_DENIED: Error writing "gs://b/x"', 'permission is denied'),
    ('HttpError: Service Unavailable, 503', 'the store does not answer'),
    ('ClientConnectorError: Cannot connect to host', 'the store does not answer'),
    ('EndpointConnectionError: Could not connect', 'the store does not answer')])
def test_errors_of_stores_become_one_sentence_with_the_address(text, meaning):
  name, _, message = text.partition(': ')
  error = ValueError('a wrapper')
  error.__cause__ = type(name, (Exception,), {})(message)
  sentence = storage.explain(error, 'gs://bucket/run')
  assert sentence.startswith('gs://bucket/run: ') and meaning in sentence and sentence.endswith('.')


@pytest.mark.parametrize('error', [ValueError('shape [401, 503]x'), KeyError('x'), UsageError('403 Forbidden')])
def test_other_errors_stay_what_they_are(error):
  assert storage.explain(error, 'gs://bucket/run') is None


def test_no_second_service_is_queried_about_buckets():
  # gcsfs decides when it is imported, in whatever test comes first.
  code = """
import os
os.environ.pop('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', None)
from uni_moe_jax.io import storage
print(type(storage.filesystem('gs://bucket')).__module__)"""
  done = processes.python('-c', code, FSSPEC_GS_TOKEN='anon')
  assert done.returncode == 0 and done.stdout.strip() == 'gcsfs.core', done.stderr
