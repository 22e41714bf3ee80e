"""A proxy in front of the test server of an object store: passes requests on, one handler decides about each.

Run as a program it adds what fake-gcs-server ignores of the protocol, preconditions on the generation of an object:

  python -m tests.helpers.store_proxy PORT http://127.0.0.1:UPSTREAM_PORT
"""

import asyncio
import collections
import json
import re
import sys
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qs, quote, unquote, urlsplit

import aiohttp
from aiohttp import web
from yarl import URL

_HOP_BY_HOP = ('connection', 'content-length', 'keep-alive', 'transfer-encoding')
_OBJECT = re.compile(r'(?:/upload|/download)?/storage/v1/b/(?P<bucket>[^/]+)/o(?:/(?P<name>[^/]+))?')

Forward = Callable[[], Awaitable[web.Response]]
Handler = Callable[[web.Request, bytes, Forward], Awaitable[web.StreamResponse]]  # (request, its body, pass it on)


def application(upstream: str, handler: Handler) -> web.Application:
  """A proxy for `upstream`, 'http://HOST:PORT'."""

  async def sessions(app: web.Application):
    # A store's client sets the time limits; bodies stay compressed as they are.
    async with aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout()) as app['session']:
      yield

  async def handle(request: web.Request) -> web.StreamResponse:
    body = await request.read()

    async def forward() -> web.Response:
      headers = [(k, v) for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP]
      async with request.app['session'].request(
          request.method, URL(upstream + request.raw_path, encoded=True), headers=headers,
          data=body, allow_redirects=False, skip_auto_headers=('User-Agent', 'Content-Type')) as answer:
        content = await answer.read()
        kept = [(k, v.replace(upstream, f'http://{request.host}')) for k, v in answer.headers.items()
                if k.lower() not in _HOP_BY_HOP]
        if request.method == 'HEAD':
          kept.append(('Content-Length', answer.headers.get('Content-Length', '0')))
        return web.Response(status=answer.status, headers=kept, body=content)

    return await handler(request, body, forward)

  app = web.Application(client_max_size=2**32)
  app.cleanup_ctx.append(sessions)
  app.router.add_route('*', '/{path:.*}', handle)
  return app


class Preconditions:
  """The handler that answers 412, or 304 to a read, unless `ifGenerationMatch` or `ifGenerationNotMatch` holds.

  An object has one writer at a time, so that of several writers who require that it does not exist one succeeds. A
  resumable upload that is complete answers so again, as GCS does, to a client that did not get the first answer.
  """

  def __init__(self, upstream: str):
    self._upstream = upstream
    self._locks: dict[tuple[str, str], asyncio.Lock] = collections.defaultdict(asyncio.Lock)
    self._uploads: dict[str, tuple[str, dict[str, str]]] = {}  # id of a resumable upload → object, its preconditions
    self._completed: dict[str, bytes] = {}  # id of a resumable upload → what was answered

  async def __call__(self, request: web.Request, body: bytes, forward: Forward) -> web.StreamResponse:
    path = _OBJECT.fullmatch(request.rel_url.raw_path)
    if path is None:
      return await forward()
    name = unquote(path['name'] or request.query.get('name', '')) or _name_in(body)
    wanted = {k: v for k, v in request.query.items() if k in ('ifGenerationMatch', 'ifGenerationNotMatch')}
    name, wanted = self._uploads.get(request.query.get('upload_id'), (name, wanted))
    if request.method == 'GET' and not wanted:
      return await forward()
    async with self._locks[path['bucket'], name]:
      if (upload_id := request.query.get('upload_id')) in self._completed:
        return web.Response(body=self._completed[upload_id], content_type='application/json')
      if wanted:
        generation = await self._generation(request, path['bucket'], name)
        if wanted.get('ifGenerationMatch', generation) != generation:
          return web.json_response({'error': {'code': 412, 'message': 'conditionNotMet'}}, status=412)
        if wanted.get('ifGenerationNotMatch') == generation:
          return web.Response(status=304 if request.method == 'GET' else 412)
      answer = await forward()
      if upload_id and answer.status in (200, 201):
        self._completed[upload_id] = answer.body
      elif request.query.get('uploadType') == 'resumable' and 'Location' in answer.headers:
        [upload_id] = parse_qs(urlsplit(answer.headers['Location']).query)['upload_id']
        self._uploads[upload_id] = name, wanted
      return answer

  async def _generation(self, request: web.Request, bucket: str, name: str) -> str:
    """The generation of an object, '0' if it does not exist."""
    url = f'{self._upstream}/storage/v1/b/{bucket}/o/{quote(name, safe="")}'
    async with request.app['session'].get(URL(url, encoded=True)) as answer:
      return (await answer.json())['generation'] if answer.status == 200 else '0'


def _name_in(body: bytes) -> str:
  """The name in the metadata of an upload: the first JSON object of a body."""
  start = body.find(b'{')
  try:
    content, _ = json.JSONDecoder().raw_decode(body[start:start + 2**16].decode(errors='replace'))
    return content.get('name', '')
  except ValueError:
    return ''


def serve(port: int, upstream: str, handler: Handler) -> None:
  """Serve on loopback until the process ends."""
  web.run_app(application(upstream, handler), host='127.0.0.1', port=port, print=None, access_log=None)


if __name__ == '__main__':
  serve(int(sys.argv[1]), sys.argv[2], Preconditions(sys.argv[2]))
