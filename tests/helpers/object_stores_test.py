"""The test servers keep the promises of the stores that the package relies on: bytes, ranges, preconditions."""

import concurrent.futures
import json
import urllib.error
import urllib.request

import fsspec
import numpy as np
import tensorstore as ts

from tests.helpers.object_stores import Store

_CONTENT = np.random.default_rng(0).bytes(300_000) + b'\r\n\0\n'  # what a parser of lines or of text would change
_NAME = 'folder/a name, ж.bin'


def _files(store: Store) -> fsspec.AbstractFileSystem:
  return fsspec.filesystem(store.address.partition(':')[0], use_listings_cache=False)


def _status(url: str, data: bytes | None = None, method: str = 'POST', **headers: str) -> int:
  request = urllib.request.Request(url, data, {'Content-Type': 'application/octet-stream', **headers}, method=method)
  try:
    with urllib.request.urlopen(request) as answer:
      return answer.status
  except urllib.error.HTTPError as e:
    return e.code


def test_objects_are_read_as_they_were_written(store):
  files, path = _files(store), f'{store.address}/{_NAME}'
  files.pipe_file(path, _CONTENT)
  assert files.cat_file(path) == _CONTENT
  assert files.cat_file(path, start=299_990, end=300_002) == _CONTENT[299_990:300_002]
  assert [name.rpartition('/')[2] for name in files.ls(f'{store.address}/folder')] == ['a name, ж.bin']
  assert files.info(path)['size'] == len(_CONTENT)
  files.rm(path)
  assert not files.exists(path)


def test_of_eight_writers_that_create_an_object_one_succeeds(store):
  files, path = _files(store), f'{store.address}/once'

  def create(i: int) -> bool:
    try:
      files.pipe_file(path, str(i).encode(), mode='create')
      return True
    except FileExistsError:
      return False

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    created = list(pool.map(create, range(8)))
  assert sum(created) == 1
  assert files.cat_file(path) == str(created.index(True)).encode()


def _kvstore(store: Store) -> ts.KvStore:
  if store.address.startswith('gs:'):
    return ts.KvStore.open({'driver': 'gcs', 'bucket': 'bucket', 'path': 'ts/'}).result()
  return ts.KvStore.open({'driver': 's3', 'bucket': 'bucket', 'path': 'ts/', 'endpoint': store.endpoint,
                          'aws_region': 'us-east-1'}).result()


def test_tensorstore_writes_only_over_the_version_that_it_has_read(store):
  kv = _kvstore(store)
  kv.write('x', b'first').result()
  first = kv.read('x').result().stamp.generation
  kv.write('x', b'second').result()
  assert kv.write('x', b'third', if_equal=first).result().generation != first
  assert kv.read('x').result().value == b'second'
  second = kv.read('x').result().stamp.generation
  kv.write('x', b'third', if_equal=second).result()
  assert kv['x'] == b'third'
  assert kv.list().result() == [b'x']


def test_gcs_deletes_only_the_generation_that_it_is_given(gcs):
  objects = f'{gcs.endpoint}/storage/v1/b/bucket/o/doomed'
  upload = f'{gcs.endpoint}/upload/storage/v1/b/bucket/o?uploadType=media&name=doomed'
  assert _status(upload, b'1') == 200
  with urllib.request.urlopen(objects) as answer:
    generation = json.load(answer)['generation']
  assert _status(f'{upload}&ifGenerationMatch={generation}', b'2') == 200
  assert _status(f'{objects}?ifGenerationMatch={generation}', method='DELETE') == 412
  assert _status(f'{objects}?alt=media&ifGenerationNotMatch={generation}', method='GET') == 200
  assert _status(f'{objects}?alt=media&ifGenerationMatch={generation}', method='GET') == 412


def test_an_upload_that_began_before_another_object_was_there_fails(gcs):
  url = f'{gcs.endpoint}/upload/storage/v1/b/bucket/o?name=slow'
  start = urllib.request.Request(f'{url}&uploadType=resumable&ifGenerationMatch=0', b'{}',
                                 {'Content-Type': 'application/json'})
  with urllib.request.urlopen(start) as answer:
    location = answer.headers['Location']
  assert _status(f'{url}&uploadType=media', b'faster') == 200
  assert _status(location, b'slower', 'PUT') == 412
