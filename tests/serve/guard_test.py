"""Around every request: host, token, bounded bodies, admission and headers. A tiny ASGI application is guarded."""

import asyncio
import contextlib
import json
import socket

import pytest
import uvicorn

from uni_moe_jax.serve import server
from uni_moe_jax.serve.guard import Guard, Metrics
from uni_moe_jax.serve.limits import Limits
from uni_moe_jax.utils.errors import UsageError


async def _echo(scope, receive, send):
  """Answers with the length of the body."""
  body = (await receive())['body']
  await send({'type': 'http.response.start', 'status': 200, 'headers': [(b'content-type', b'text/plain')]})
  await send({'type': 'http.response.body', 'body': str(len(body)).encode()})


async def _failing(scope, receive, send):
  raise KeyError('a secret of the log')


def _guard(app=_echo, token='', any_host=False, **limits):
  return Guard(app, Limits(**limits), Metrics(), token, any_host)


def _get(guard, path='/model', chunks=(b'',), method='GET', pause=0.0, **headers):
  """Return (status, body, headers) of one request; pause: seconds before every chunk."""
  async def main():
    sent, queue = [], list(chunks)

    async def receive():
      await asyncio.sleep(pause)
      return {'type': 'http.request', 'body': queue.pop(0), 'more_body': bool(queue)}

    async def send(message):
      sent.append(message)

    names = {'host': '127.0.0.1:8000', 'content-type': 'application/json'} | {
        k.replace('_', '-'): v for k, v in headers.items()}
    scope = {'type': 'http', 'method': method, 'path': path,
             'headers': [(k.encode(), v.encode()) for k, v in names.items()]}
    await guard(scope, receive, send)
    return sent[0]['status'], b''.join(m['body'] for m in sent[1:]), dict(sent[0]['headers'])
  return asyncio.run(main())


def _error(response, status):
  assert response[0] == status
  return json.loads(response[1])['error']


@pytest.mark.parametrize('host, any_host, status', [
    ('127.0.0.1:8000', False, 200), ('localhost', False, 200), ('[::1]:8000', False, 200), ('LOCALHOST:1', False, 200),
    ('evil.example', False, 421), ('127.0.0.1.evil.example:8000', False, 421), ('', False, 421),
    ('[::1].evil.example', False, 421), ('evil.example', True, 200)])
def test_a_name_of_another_site_that_points_here_is_refused(host, any_host, status):
  assert _get(_guard(any_host=any_host), host=host)[0] == status


def test_the_token_is_needed_for_everything_that_knows_the_model():
  guard = _guard(token='secret')
  for wrong in ('', 'secret', 'Bearer secre', 'Bearer secrets', 'Bearer \xfc'):
    response = _get(guard, authorization=wrong)
    assert 'Authorization: Bearer TOKEN' in _error(response, 401) and response[2][b'www-authenticate'] == b'Bearer'
  assert _get(guard, authorization='Bearer secret')[0] == 200
  paths = ('/', '/healthz', '/docs', '/metrics', '/examples/0')
  assert [_get(guard, path)[0] for path in paths] == [200] * 3 + [401] * 2


@pytest.mark.parametrize('text, token', [('secret', 'secret'), ('secret\n', 'secret'), (' s 1\r\n', 's 1')])
def test_a_token_is_read_without_the_line_end_that_editors_and_secrets_have(tmp_path, text, token):
  (tmp_path / 'token').write_text(text)
  assert server.read_token(None, text) == server.read_token(str(tmp_path / 'token'), 'another') == token
  assert server.read_token(None, '') == ''


def test_a_token_file_of_windows_is_read_without_its_mark_or_refused(tmp_path):
  file = tmp_path / 'token'
  for encoding in ('utf-8', 'utf-8-sig'):
    file.write_text('sécret\n', encoding=encoding)
    assert server.read_token(str(file), '') == 'sécret'
  file.write_text('secret\n', encoding='utf-16')
  with pytest.raises(UsageError, match='^--token_file=.*token is not UTF-8 \\(perhaps UTF-16\\); save it as UTF-8.$'):
    server.read_token(str(file), '')


def test_a_blank_token_is_no_open_service(tmp_path):
  with pytest.raises(UsageError, match='^UNI_MOE_TOKEN is empty; put the token in it'):
    server.read_token(None, '\n')
  (tmp_path / 'token').touch()
  with pytest.raises(UsageError, match='^--token_file=.*token is empty; put the token in it'):
    server.read_token(str(tmp_path / 'token'), '')


def test_a_body_is_bounded_by_its_length_and_by_its_content():
  guard = _guard(max_body_bytes=10)
  assert _get(guard, method='POST', chunks=[b'12345', b'67890'])[:2] == (200, b'10')
  for chunks, length in (([b'12345', b'678901'], '0'), ([b''], '11'), ([b''], '9' * 100)):
    response = _get(guard, method='POST', chunks=chunks, content_length=length)
    assert 'at most 10 are accepted' in _error(response, 413) and response[2][b'connection'] == b'close'
  assert not guard._held and not guard.active


def test_the_bodies_of_all_requests_together_are_bounded():
  guard = _guard()
  guard._held = 2**28
  assert 'at most 256 MiB are accepted' in _error(_get(guard, method='POST', chunks=[b'1']), 429)
  assert guard._held == 2**28


def test_a_body_of_too_many_parts_is_not_parsed():
  body = b'{"names": [' + b'[],' * 30_000 + b'[]]}'
  assert 'at most 20,000 are accepted' in _error(_get(_guard(), method='POST', chunks=[body]), 422)
  assert _get(_guard(), method='POST', chunks=[b'{"names": [' + b'"a",' * 30_000 + b'"a"]}'])[0] == 200


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-16-le', 'utf-16-be', 'utf-32'])
@pytest.mark.parametrize('space', ['', ' ', '\t', '\r\n', ' \t\r\n' * 30], ids=['none', 'space', 'tab', 'line', 'much'])
def test_fields_are_counted_however_a_body_is_spaced_and_encoded(space, encoding):
  def response(fields):
    body = '{' + f',{space}'.join(f'"{i}"{space}:{space}1' for i in range(fields)) + '}'
    assert len(json.loads(body.encode(encoding))) == fields  # what is counted is what would be parsed
    return _get(_guard(max_body_bytes=2**25), method='POST', chunks=[body.encode(encoding)])
  assert response(19_999)[0] == 200  # with the object itself as many as are accepted
  assert 'has 20,001 lists, objects and fields' in _error(response(20_000), 422)


def test_a_body_that_does_not_arrive_in_time_is_refused():
  guard = _guard(timeout=0.05)
  response = _get(guard, method='POST', chunks=[b'1'] * 9, pause=0.02)
  assert 'within 0.05 s' in _error(response, 408) and response[2][b'connection'] == b'close'
  assert not guard._held


def test_only_json_is_accepted_so_that_no_form_of_another_site_reaches_the_model():
  for content_type in ('text/plain', 'multipart/form-data; boundary=x', ''):
    assert 'must be JSON' in _error(_get(_guard(), method='POST', content_type=content_type), 415)
  assert _get(_guard(), method='POST', content_type='application/json; charset=utf-8')[0] == 200


def test_more_requests_than_the_queue_takes_get_429():
  guard = _guard(max_queue=2)
  guard.active = 2
  response = _get(guard)
  assert 'at most 2 are accepted' in _error(response, 429) and response[2][b'retry-after'] == b'1'
  assert _get(guard, '/healthz')[0] == 200
  guard.active = 1
  assert _get(guard)[0] == 200


def test_a_service_that_ends_refuses_new_requests():
  guard = _guard()
  guard.draining = True
  assert 'shutting down' in _error(_get(guard), 503)


def test_a_failure_is_reported_without_its_reason(capsys):
  status, body, _ = _get(_guard(_failing))
  assert status == 500 and b'secret' not in body and 'a secret of the log' in capsys.readouterr().err


def test_answers_have_headers_that_bind_the_browser():
  _, _, headers = _get(_guard())
  assert headers[b'X-Content-Type-Options'] == b'nosniff' and headers[b'X-Frame-Options'] == b'DENY'
  assert b"default-src 'none'" in headers[b'Content-Security-Policy']
  assert not [name for name in headers if name.lower().startswith(b'access-control')]


@contextlib.asynccontextmanager
async def _served(guard, protocol, keep_alive=1):
  """A service of uvicorn, and a connection to it."""
  service = uvicorn.Server(uvicorn.Config(
      guard, port=0, http=protocol, lifespan='off', log_level='error', timeout_keep_alive=keep_alive,
      timeout_graceful_shutdown=1))
  running = asyncio.create_task(service._serve())
  while not service.started:
    await asyncio.sleep(0.01)
  reader, writer = await asyncio.open_connection(*service.servers[0].sockets[0].getsockname())
  try:
    yield service, reader, writer
  finally:
    writer.transport.abort()
    service.should_exit = True
    await running


@pytest.mark.parametrize('first', ['', 'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n'])
def test_a_head_that_never_ends_closes_the_connection(first):
  async def main():
    async with _served(_guard(), server.protocol(1.0)) as (_, reader, writer):
      writer.write(first.encode())
      answered = (await reader.readuntil(b'0\r\n\r\n')).startswith(b'HTTP/1.1 200') if first else True
      async with asyncio.timeout(60):
        while not reader.at_eof() and reader.exception() is None:  # the latter if a byte arrives as the service closes
          writer.write(b'G')  # now and then
          await asyncio.sleep(0.02)
    return answered, reader.exception()
  answered, error = asyncio.run(main())
  assert answered and isinstance(error, ConnectionError | None)


async def _big(scope, receive, send):
  await send({'type': 'http.response.start', 'status': 200, 'headers': [(b'content-length', b'%d' % 2**23)]})
  await send({'type': 'http.response.body', 'body': bytes(2**23)})


_HEAD = 'GET /model HTTP/1.1\r\nHost: localhost\r\n'


@pytest.mark.parametrize('high, sent', [
    (None, [f'{_HEAD}\r\n{_HEAD}\r\n']),  # the second answer waits until the client has read the first
    *((2**30, sent) for sent in (  # nothing waits but a connection that closes
        [f'{_HEAD}\r\n'], [f'{_HEAD}Connection: close\r\n\r\n'], [f'{_HEAD}\r\n', 'no head\r\n\r\n'],
        [f'{_HEAD}\r\n', 'GET']))])
def test_a_client_that_does_not_read_its_answers_is_disconnected(high, sent):
  class Protocol(server.protocol(0.3)):
    def connection_made(self, transport):
      transport.set_write_buffer_limits(high)
      super().connection_made(transport)

  async def main():
    guard = _guard(_big)
    async with _served(guard, Protocol) as (service, _, writer):
      connections = service.server_state.connections
      async with asyncio.timeout(5):
        for part in sent:
          writer.write(part.encode())
          await asyncio.sleep(0.1)
        assert connections and guard.active == (high is None)
        while connections or guard.active:
          await asyncio.sleep(0.01)
  asyncio.run(main())


def test_a_client_that_reads_its_answers_stays_connected():
  async def main():
    async with _served(_guard(_big), server.protocol(1.0), keep_alive=5) as (_, reader, writer):
      for pause in (1.1, 0):
        writer.write(f'{_HEAD}\r\n'.encode())
        await reader.readuntil(b'\r\n\r\n')
        assert len(await reader.readexactly(2**23)) == 2**23
        await asyncio.sleep(pause)
  asyncio.run(main())


def test_small_answers_are_sent_at_once():
  with server.bind('127.0.0.1', 0) as bound:
    assert bound.proto == socket.IPPROTO_TCP  # otherwise asyncio does not set TCP_NODELAY


def test_an_address_belongs_to_the_first_service_also_before_it_answers():
  with server.bind('127.0.0.1', 0) as bound:
    port = bound.getsockname()[1]
    with pytest.raises(UsageError, match=f'--host=127.0.0.1 --port={port} cannot be used: Address already in use'):
      server.bind('127.0.0.1', port)
  server.bind('127.0.0.1', port).close()


def test_requests_are_counted_by_path_and_status():
  metrics = Metrics()
  guard = Guard(_echo, Limits(), metrics, '', False)
  _get(guard)
  _get(guard, host='evil.example')
  text = metrics.text().decode()
  assert 'unimoe_requests_total{path="other",status="200"} 1.0' in text
  assert 'unimoe_requests_total{path="other",status="421"} 1.0' in text
