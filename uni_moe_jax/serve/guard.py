"""What surrounds every request: host, token, body bound, time, admission, headers, metrics. Plain ASGI."""

import asyncio
import hmac
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

import prometheus_client
from starlette.responses import JSONResponse

from uni_moe_jax.serve.limits import Limits, Refused

_OPEN = ('/', '/healthz', '/docs', '/openapi.json')  # paths without data of the model
_UNQUEUED = ('/', '/healthz', '/metrics', '/docs', '/openapi.json')  # answered while the service is full or ends
_MAX_PARTS = 20_000  # lists, objects and fields of a body: an error for each would fill the memory
_BETWEEN = b' \t\r\n\0'  # bytes that may be between a field and its colon; zeros are those of UTF-16 and UTF-32
_MAX_HELD = 2**28  # bytes of all bodies that are in memory
_LOCAL = ('localhost', '127.0.0.1', '[::1]')
_JSON = b'application/json'
_HEADERS = [(name.encode(), value.encode()) for name, value in {
    'X-Content-Type-Options': 'nosniff', 'X-Frame-Options': 'DENY', 'Referrer-Policy': 'no-referrer',
    'Cross-Origin-Resource-Policy': 'same-origin', 'Cross-Origin-Opener-Policy': 'same-origin',
    'Cache-Control': 'no-store', 'Permissions-Policy': 'camera=(), microphone=(), geolocation=()'}.items()]
_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


class Metrics:
  """Prometheus metrics of one service."""

  def __init__(self):
    self.registry = prometheus_client.CollectorRegistry()
    options = {'namespace': 'unimoe', 'registry': self.registry}
    self.requests = prometheus_client.Counter('requests', 'Answered requests.', ['path', 'status'], **options)
    self.seconds = prometheus_client.Histogram(
        'request_seconds', 'Seconds until a response is complete.', ['path'], **options)
    self.batch = prometheus_client.Histogram(
        'batch_size', 'Requests per batch.', ['program'], buckets=[2**i for i in range(9)], **options)
    self.active = prometheus_client.Gauge('active_requests', 'Requests waiting or running.', **options)
    self.waiting = prometheus_client.Gauge('waiting_items', 'Inputs waiting for a batch.', **options)
    self.restarts = prometheus_client.Gauge('worker_restarts', 'Worker starts after the first.', **options)

  def text(self) -> bytes:
    """In the text format of Prometheus."""
    return prometheus_client.generate_latest(self.registry)


class Guard:
  """ASGI application around another.

  Attributes:
    draining: new requests are refused, because the service ends.
    active: requests that wait or run.
  """

  def __init__(self, app: Any, limits: Limits, metrics: Metrics, token: str, any_host: bool):
    self._app, self._limits, self._metrics, self._token, self._any_host = app, limits, metrics, token.encode(), any_host
    self._held, self.draining, self.active = 0, False, 0

  async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope['type'] != 'http':
      return
    started, status, path = time.monotonic(), [0], scope['path']
    queued = path not in _UNQUEUED

    async def send_with_headers(message: dict[str, Any]) -> None:
      if message['type'] == 'http.response.start':
        status[0] = message['status']
        names = {name for name, _ in message['headers']}
        more = [*_HEADERS, (b'Content-Security-Policy', _POLICY.encode())]
        message['headers'] = [*message['headers'], *(h for h in more if h[0].lower() not in names)]
      await send(message)

    body, self.active = b'', self.active + queued
    try:
      self._check(scope, queued)
      body = await self._body(scope, receive)
      await self._app(scope, _replay(body, receive), send_with_headers)
    except Refused as e:
      await refusal(e)(scope, receive, send_with_headers)
    except ConnectionError:  # the client has gone
      status[0] = 499
    except Exception:
      traceback.print_exc(file=sys.stderr)
      if status[0]:
        raise
      await refusal(Refused(500, 'The service failed; see its log for the reason.'))(scope, receive, send_with_headers)
    finally:
      self._held -= len(body)
      self.active -= queued
      route = getattr(scope.get('route'), 'path', 'other')
      self._metrics.requests.labels(route, status[0]).inc()
      self._metrics.seconds.labels(route).observe(time.monotonic() - started)

  def _check(self, scope: dict[str, Any], queued: bool) -> None:
    """Raises Refused for a request that is not even read."""
    headers = dict(scope['headers'])
    host = headers.get(b'host', b'').decode('latin-1').lower()
    if not self._any_host and (host.rpartition(':')[0] or host if not host.endswith(']') else host) not in _LOCAL:
      raise Refused(421, f'Host {host[:60]!r} is not this machine; open the address that the service printed, or start '
                         'it with --host.')
    given = headers.get(b'authorization', b'')
    if self._token and scope['path'] not in _OPEN and not hmac.compare_digest(given, b'Bearer ' + self._token):
      raise Refused(401, 'The token is missing or wrong; send the header "Authorization: Bearer TOKEN".')
    if queued and self.draining:
      raise Refused(503, 'The service is shutting down; send the request to another instance.')
    if queued and self.active > self._limits.max_queue:
      raise Refused(429, f'{self.active - 1} requests are waiting or running, and at most {self._limits.max_queue} are '
                         'accepted; send this one again in a second.')
    if scope['method'] == 'POST':
      if headers.get(b'content-type', b'').partition(b';')[0].strip().lower() != _JSON:
        raise Refused(415, 'The body must be JSON; send the header "Content-Type: application/json".')
      length = headers.get(b'content-length', b'0')
      if length.isdigit() and int(length[:20]) > self._limits.max_body_bytes:
        raise self._too_large(int(length[:20]))

  async def _body(self, scope: dict[str, Any], receive: Any) -> bytes:
    """Reads a bounded body in bounded time."""
    chunks, size = [], 0
    try:
      async with asyncio.timeout(self._limits.timeout):
        while True:
          message = await receive()
          if message['type'] == 'http.disconnect':
            raise ConnectionResetError
          chunk = message.get('body', b'')
          chunks.append(chunk)
          size += len(chunk)
          self._held += len(chunk)
          if size > self._limits.max_body_bytes:
            raise self._too_large(size)
          if self._held > _MAX_HELD:
            raise Refused(429, f'The requests in progress total {self._held >> 20} MiB, but at most '
                               f'{_MAX_HELD >> 20} MiB are accepted; send this one again in a second.')
          if not message.get('more_body'):
            break
      body = b''.join(chunks)
      packed = body.translate(None, _BETWEEN)
      if (n := sum(map(packed.count, (b'[', b'{', b'":')))) > _MAX_PARTS:
        raise Refused(422, f'The body has {n:,} lists, objects and fields, but at most {_MAX_PARTS:,} are accepted; '
                           'send what GET /docs describes.')
      return body
    except BaseException as e:
      self._held -= size
      if isinstance(e, TimeoutError):
        raise Refused(408, f'The body did not arrive within {self._limits.timeout:g} s; send it faster.') from None
      raise

  def _too_large(self, size: int) -> Refused:
    return Refused(413, f'The body has {size:,} bytes or more, but at most {self._limits.max_body_bytes:,} are '
                        'accepted; send a smaller file.')


def refusal(error: Refused, headers: Mapping[str, str] | None = None) -> JSONResponse:
  """The answer to a request that is refused."""
  return JSONResponse({'error': error.message}, error.status, {**error.headers, **(headers or {})})


def _replay(body: bytes, receive: Any) -> Any:
  """A `receive` that gives the body once."""
  sent = False

  async def replay() -> dict[str, Any]:
    nonlocal sent
    if sent:
      return await receive()
    sent = True
    return {'type': 'http.request', 'body': body, 'more_body': False}
  return replay
