"""A stand-in of the Hugging Face Hub on loopback: the endpoints that `huggingface_hub` uses for models, in memory."""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator

TOKEN = 'hf_token_with_all_rights'
_LARGE = 1000  # bytes; larger files are uploaded on their own, by digest


@dataclasses.dataclass
class Repository:
  """Commits [{path: content}] by id, and their names."""
  private: bool
  commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
  branches: dict[str, str] = dataclasses.field(default_factory=dict)

  def commit(self, files: dict[str, bytes | None]) -> str:
    """Adds files to the newest commit of main, or deletes them (None); returns the id of the new one."""
    files = {**self.commits.get(self.branches.get('main'), {}), **files}
    files = {path: content for path, content in files.items() if content is not None}
    digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
    self.commits[digest], self.branches['main'] = files, digest
    return digest


class Hub(http.server.ThreadingHTTPServer):
  """The server. Attributes: `repositories` by name, and `status`, with which it answers everything if it is set."""
  daemon_threads = True

  def __init__(self):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.repositories: dict[str, Repository] = {}
    self.uploads: dict[str, bytes] = {}
    self.status = 0
    self.endpoint = f'http://127.0.0.1:{self.server_address[1]}'


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, *_):
    pass

  def _send(self, status: int, content=b'', **headers: str) -> None:
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(status)
    for name, value in {'Content-Length': str(len(content)), **headers}.items():
      self.send_header(name.replace('_', '-'), value)
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length', 0)))
    content = b''
    while size := int(self.rfile.readline(), 16):
      content += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return content

  def _answer(self) -> None:
    body, path = self._body(), urllib.parse.unquote(self.path.partition('?')[0])
    allowed = self.headers.get('Authorization') == f'Bearer {TOKEN}'
    if self.server.status:
      return self._send(self.server.status, b'out of order')
    if self.command == 'PUT' and (match := re.fullmatch('/uploads/(.*)', path)):
      assert hashlib.sha256(body).hexdigest() == match[1]
      self.server.uploads[match[1]] = body
      return self._send(200)
    writes = self.command == 'POST'
    if writes and not allowed:
      return self._send(401, {'error': 'Invalid username or password.'})
    if path == '/api/validate-yaml':  # of the model card
      return self._send(200, {'warnings': [], 'errors': []})
    if path == '/api/repos/create':
      return self._create(json.loads(body))
    match = re.match(r'(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(?:/(.*))?$', path)
    repository = self.server.repositories.get(match[1])
    if repository is None or repository.private and not allowed:
      return self._send(404, X_Error_Code='RepoNotFound')
    return (self._write if writes else self._read)(match[1], repository, (match[2] or '').split('/'), body)

  do_GET = do_HEAD = do_POST = do_PUT = _answer

  def _create(self, request) -> None:
    name = f'{request["organization"]}/{request["name"]}'
    exists = name in self.server.repositories
    if not exists:
      self.server.repositories[name] = Repository(request.get('visibility') == 'private')
      self.server.repositories[name].commit({})
    self._send(409 if exists else 200, {'url': f'{self.server.endpoint}/{name}', 'name': name})

  def _write(self, name: str, repository: Repository, parts: list[str], body: bytes) -> None:
    if parts[0] == 'preupload':
      modes = [{'path': f['path'], 'uploadMode': 'lfs' if f['size'] > _LARGE else 'regular', 'shouldIgnore': False}
               for f in json.loads(body)['files']]
      return self._send(200, {'files': modes})
    if parts[0] == 'info':
      objects = [{**o, 'actions': {'upload': {'href': f'{self.server.endpoint}/uploads/{o["oid"]}', 'header': {}}}}
                 for o in json.loads(body)['objects']]
      return self._send(200, {'transfer': 'basic', 'objects': objects})
    assert parts[0] == 'commit', parts
    files = {}
    for line in map(json.loads, body.splitlines()):
      value = line['value']
      if line['key'] == 'file':
        files[value['path']] = base64.b64decode(value['content'])
      elif line['key'] == 'lfsFile':
        files[value['path']] = self.server.uploads[value['oid']]
      elif line['key'] == 'deletedFile':
        files[value['path']] = None
    commit = repository.commit(files)
    return self._send(200, {'commitOid': commit, 'commitUrl': f'{self.server.endpoint}/{name}/commit/{commit}'})

  def _read(self, name: str, repository: Repository, parts: list[str], _) -> None:
    revision = parts[1] if len(parts) > 1 else 'main'
    commit = repository.branches.get(revision, revision)
    if commit not in repository.commits:
      return self._send(404, X_Error_Code='RevisionNotFound')
    files = repository.commits[commit]
    if parts[0] == 'tree':
      return self._send(200, [{'type': 'file', 'path': path, 'size': len(x), 'oid': _etag(x)}
                              for path, x in files.items()])
    if parts[0] == 'resolve':
      if (content := files.get('/'.join(parts[2:]))) is None:
        return self._send(404, X_Error_Code='EntryNotFound')
      return self._send(200, content, X_Repo_Commit=commit, ETag=f'"{_etag(content)}"')
    return self._send(200, {'id': name, 'sha': commit, 'private': repository.private, 'siblings': [], 'tags': []})


def _etag(content: bytes) -> str:
  return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


@contextlib.contextmanager
def running(monkeypatch, folder) -> Iterator[Hub]:
  """A stand-in that `huggingface_hub` uses in this process until the block ends; folder: for its cache."""
  from huggingface_hub import constants
  hub = Hub()
  thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
  thread.start()
  template = hub.endpoint + '/{repo_id}/resolve/{revision}/{filename}'
  for name, value in dict(
      ENDPOINT=hub.endpoint, HUGGINGFACE_CO_URL_TEMPLATE=template, HF_HUB_CACHE=str(folder / 'cache'),
      HF_TOKEN_PATH=str(folder / 'token'), HF_HUB_DISABLE_XET=True, HF_HUB_OFFLINE=False).items():
    monkeypatch.setattr(constants, name, value)
  for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HTTP_PROXY', 'http_proxy', 'ALL_PROXY', 'all_proxy'):
    monkeypatch.delenv(name, raising=False)
  try:
    yield hub
  finally:
    hub.shutdown()
    hub.server_close()
    thread.join()
