"""Wrong requests to the service: bodies, files, JSON and headers. None may give 500, hang or open a file."""

import base64
import collections
import functools
import io
import json
import os
import pathlib
import socket
import sys
from typing import Any

import hypothesis
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests.helpers import served
from tests.helpers.same_examples import same_examples

_TIMEOUT = 60.0  # seconds until a request counts as one that hangs
_REFUSED = {200, 400, 404, 405, 408, 413, 415, 421, 422, 429}  # 503: the worker ended
_PATHS = ('/classify', '/caption', '/search', '/fill', '/embed')
# Python starts with this module and logs every file that it opens, once the file `armed` exists.
_AUDIT = '''
import os, sys
folder = os.environ.get('UNI_MOE_AUDIT')
if folder:
  log = os.open(folder + '/opened', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  def hook(event, arguments):
    # A number is a descriptor: what it refers to was opened before, by its name.
    if event in ('open', 'os.remove', 'os.rename', 'os.mkdir', 'subprocess.Popen', 'socket.connect') and not isinstance(
        arguments[0], int) and armed():
      os.write(log, (event + ' ' + repr(arguments[0]) + '\\n').encode())
  def armed():
    try:
      os.stat(folder + '/armed')
      return True
    except OSError:
      return False
  sys.addaudithook(hook)
'''


def audit(folder: pathlib.Path) -> dict[str, str]:
  """Variables with which a service logs what it opens in `folder`, after `arm`."""
  (folder / 'sitecustomize.py').write_text(_AUDIT)
  return {'UNI_MOE_AUDIT': str(folder), 'PYTHONPATH': f'{pathlib.Path(__file__).parents[2]}{os.pathsep}{folder}'}


def arm(folder: pathlib.Path) -> None:
  """Starts the log."""
  (folder / 'armed').touch()


def opened(folder: pathlib.Path, allowed: tuple[str, ...]) -> list[str]:
  """What the service has opened since `arm`, except below some folders, and modules that it imports late."""
  lines = (folder / 'opened').read_text().splitlines()
  return [line for line in lines if not any(path in line for path in (*allowed, sys.prefix, sys.base_prefix))]


@functools.cache
def _files() -> dict[str, bytes]:
  """Small valid files by format."""
  frames = [Image.fromarray(f) for f in np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), dtype=np.uint8)]
  files = {}
  for file_format in ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PDF'):
    frames[0].save(out := io.BytesIO(), file_format)
    files[file_format] = out.getvalue()
  frames[0].save(out := io.BytesIO(), 'GIF', save_all=True, append_images=frames[1:])
  files['video'] = out.getvalue()
  np.save(out := io.BytesIO(), np.zeros((2, 8, 8, 3), np.uint8))
  files['npy'] = out.getvalue()
  files['svg'] = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
  files['m3u8'] = b'#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n'  # FFmpeg would open what a playlist names
  files['concat'] = b'ffconcat version 1.0\nfile /etc/passwd\n'
  return files


@st.composite
def _damaged(draw) -> bytes:
  """A file with some bytes changed, cut or added."""
  data = bytearray(_files()[draw(st.sampled_from(sorted(_files())))])
  for _ in range(draw(st.integers(0, 6))):
    data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
  end = draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))
  return bytes(data[:end]) + draw(st.binary(max_size=8))


_base64 = lambda data: base64.b64encode(data).decode()
_MEDIA = st.one_of(_damaged().map(_base64), st.binary(max_size=200).map(_base64), st.text(max_size=20))
_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30), st.sampled_from([
        '/etc/passwd', 'file:///etc/passwd', 'http://127.0.0.1:1/', '../../..', '[mask]', '\ud800', '\0', 10**400])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8)


def _bodies(tasks: list[str]) -> st.SearchStrategy[Any]:
  """Bodies that are nearly right: fields of their names, with right and wrong values."""
  text = st.one_of(st.text(max_size=80), st.just('a [mask] of'), st.text(max_size=5).map(lambda t: t * 2000))
  fields = {
      'task': st.one_of(st.sampled_from(tasks), _VALUES), 'image': st.one_of(_MEDIA, _VALUES),
      'video': st.one_of(_MEDIA, _VALUES), 'example': st.one_of(st.integers(-2, 12), _VALUES),
      'texts': st.one_of(st.dictionaries(st.sampled_from(['text', 'question', 'name']), text, max_size=2), _VALUES),
      'names': st.one_of(st.lists(text, max_size=5), st.just(['a'] * 1500), _VALUES), 'text': st.one_of(text, _VALUES),
      'top': st.one_of(st.integers(-1, 200), _VALUES), 'stream': st.one_of(st.booleans(), _VALUES),
      'candidates': st.one_of(st.sampled_from(['gallery', 'none']), _VALUES), 'path': _VALUES}
  names = st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True)
  return st.one_of(names.flatmap(lambda chosen: st.fixed_dictionaries(
      {name: fields[name] for name in {'task', *chosen}})), _VALUES)


def _json(value: Any) -> bytes:
  return json.dumps(value).encode()


def requests(tasks: list[str]) -> st.SearchStrategy[tuple[str, str, bytes, dict[str, str]]]:
  """(method, path, body, headers)."""
  path = st.one_of(st.sampled_from(_PATHS), st.sampled_from([
      '/', '/model', '/examples/0', '/examples/-1', '/examples/../../etc/passwd', '/examples/%2e%2e%2fetc%2fpasswd',
      '/gallery/99999999999999999999', '/gallery/..%2f..%2fetc%2fpasswd', '/docs', '/openapi.json', '//etc/passwd']))
  headers = st.dictionaries(
      st.sampled_from(['Content-Type', 'Host', 'Authorization', 'Transfer-Encoding', 'Content-Length', 'Expect',
                       'Upgrade', 'Range', 'Origin', 'Accept']),
      st.one_of(st.sampled_from(['application/json', 'chunked', '0', '5', '-1', 'x', 'bytes=0-1', 'localhost']),
                st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)), max_size=2)
  body = st.one_of(_bodies(tasks).map(_json), st.binary(max_size=300), st.just(b'[' * 3000))
  method = st.sampled_from(['POST'] * 8 + ['GET', 'PUT', 'DELETE', 'HEAD', 'OPTIONS', 'XYZ'])
  few = st.one_of(*[st.just({})] * 3, headers)
  nearly_right = st.tuples(st.just('POST'), st.sampled_from(_PATHS), _bodies(tasks).map(_json), st.just({}))
  return st.one_of(nearly_right, nearly_right, st.tuples(method, path, body, few))


def send(service: served.Running, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
  """Returns (status, body); 0: the connection was closed without an answer. Headers may be wrong, so it is a socket."""
  names = {'Host': f'127.0.0.1:{service.port}', 'Content-Type': 'application/json', 'Content-Length': str(len(body)),
           **headers, 'Connection': 'close'}
  head = f'{method} {path} HTTP/1.1\r\n' + ''.join(f'{name}: {value}\r\n' for name, value in names.items()) + '\r\n'
  with socket.create_connection(('127.0.0.1', service.port), timeout=_TIMEOUT) as connection:
    content = b''
    try:
      connection.sendall(head.encode() + body)
      connection.shutdown(socket.SHUT_WR)
      while piece := connection.recv(2**16):
        content += piece
    except (ConnectionResetError, BrokenPipeError):  # the service does not read what it refuses
      pass
  status = content.partition(b' ')[2][:3]
  return int(status) if status.isdigit() else 0, content.partition(b'\r\n\r\n')[2]


def check(service: served.Running, num_requests: int, seed: int = 0) -> collections.Counter:
  """Sends wrong requests; returns how many got each status. Raises AssertionError with the smallest wrong one."""
  counts: collections.Counter = collections.Counter()
  tasks = list(json.loads(service.request('GET', '/model')[1])['tasks'])

  @hypothesis.seed(seed)
  @hypothesis.settings(max_examples=num_requests, deadline=None, database=None,
                       suppress_health_check=list(hypothesis.HealthCheck))
  @hypothesis.given(requests(tasks))
  def one(request):
    status, body = send(service, *request)
    counts[status] += 1
    assert status in _REFUSED | {0}, (status, body[:300])
    if status >= 400 and body and status != 400:
      assert list(json.loads(body)) == ['error'], body[:300]

  with same_examples():
    one()
  return counts
