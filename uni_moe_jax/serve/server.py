"""Starts the service: worker, gallery, HTTP; ends it after the requests that run."""

import asyncio
import contextlib
import hashlib
import os
import pathlib
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from uni_moe_jax.io import storage
from uni_moe_jax.serve import app as app_lib
from uni_moe_jax.serve.batching import Batcher
from uni_moe_jax.serve.gallery import Gallery
from uni_moe_jax.serve.guard import Guard, Metrics
from uni_moe_jax.serve.limits import Limits
from uni_moe_jax.serve.service import Service
from uni_moe_jax.serve.supervisor import Supervisor
from uni_moe_jax.utils.errors import UsageError

_LOOPBACK = ('127.0.0.1', 'localhost', '::1')
_PAUSE = 0.1  # seconds between two looks at the worker
_MIN_CONNECTIONS = 256  # before uvicorn closes some; the guard refuses requests long before


class _Server(uvicorn.Server):
  """A server whose signals are handled by `serve`."""

  @contextlib.contextmanager
  def capture_signals(self):
    yield


def protocol(timeout: float) -> type[H11Protocol]:
  """HTTP connections that end when a head does not arrive, or an answer is not read, within `timeout` to twice as long.

  uvicorn would wait forever for a client that sends a byte now and then, and for one that reads nothing.
  """
  class Protocol(H11Protocol):
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
      super().connection_made(transport)
      self._watch(None)

    def connection_lost(self, exc: Exception | None) -> None:
      super().connection_lost(exc)
      self._timer.cancel()

    def _watch(self, before: tuple[Any, int] | None) -> None:
      """Ends the connection if nothing has changed while the service waited for the client alone."""
      unread = self.transport.get_write_buffer_size()
      in_head = self.conn.their_state is h11.IDLE and bool(self.cycle is None or self.conn.trailing_data[0])
      now = (self.cycle, unread) if unread or in_head else None
      if now is not None and now == before:
        self.transport.abort()
      else:
        self._timer = self.loop.call_later(timeout, self._watch, now)

  return Protocol


def cache_folder() -> pathlib.Path:
  """Of compiled programs, which are valid only for the processor that compiled them."""
  with contextlib.suppress(OSError):
    lines = [line for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines()
             if line.startswith(('flags', 'Features'))]
    return _caches() / hashlib.sha256(''.join(lines[:1]).encode()).hexdigest()[:12]
  return _caches() / 'any'


def _caches() -> pathlib.Path:
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'uni_moe_jax/serve'


def read_token(file: str | None, variable: str) -> str:
  """The bearer token of a file or, without one, of the variable UNI_MOE_TOKEN; '' if there is neither.

  Without spaces and line ends around it, and a mark of UTF-8 before it, which no header has. Raises UsageError: nothing
  is left, or the file is not UTF-8.
  """
  source, text = 'UNI_MOE_TOKEN', variable
  if file is not None:
    source = f'--token_file={file}'
    try:
      text = storage.path(file).read_text(encoding='utf-8-sig')
    except UnicodeDecodeError:
      raise UsageError(f'{source} is not UTF-8 (perhaps UTF-16); save it as UTF-8.') from None
  if (file is not None or text) and not text.strip():
    raise UsageError(f'{source} is empty; put the token in it.')
  return text.strip()


def bind(host: str, port: int) -> socket.socket:
  """Returns a socket of an address. Raises UsageError: it cannot be used."""
  try:
    family, socket_type, proto, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    bound = socket.socket(family, socket_type, proto)  # without `proto` asyncio leaves a delay of 40 ms
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    bound.listen()  # at once: two that only bind share an address, and the later one fails when its model is loaded
    return bound
  except OSError as e:
    raise UsageError(f'--host={host} --port={port} cannot be used: {e.strerror}; give others.') from None


async def encode(
    gallery: Gallery, supervisor: Supervisor, batcher: Batcher, limits: Limits, has_files: bool) -> None:
  """Encodes a gallery, with notes on stderr about files that are not accepted."""
  while has_files and not supervisor.ready:  # a file may end workers, of which only some may end before one is ready
    await asyncio.sleep(_PAUSE)
  await gallery.encode(batcher, limits, lambda text: print(f'note: {text}', file=sys.stderr))


async def serve(
    folder: pathlib.Path, limits: Limits, bound: socket.socket, host: str, token: str,
    gallery_files: Sequence[pathlib.Path]) -> None:
  """Serves an exported folder until SIGINT or SIGTERM. bound: see `bind`. Raises RunError: it cannot be loaded."""
  stop, loop = asyncio.Event(), asyncio.get_running_loop()
  for number in (signal.SIGINT, signal.SIGTERM):
    loop.add_signal_handler(number, stop.set)
  cache = os.environ.get('JAX_COMPILATION_CACHE_DIR') or str(cache_folder() / 'jax')
  supervisor = Supervisor(str(folder), limits, cache)
  async with contextlib.AsyncExitStack() as stack:
    stack.callback(bound.close)
    stack.push_async_callback(supervisor.close)
    stopping, starting = loop.create_task(stop.wait()), loop.create_task(supervisor.start())
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
      starting.cancel()
      return
    await starting
    metrics = Metrics()
    batcher = Batcher(supervisor, limits, lambda program, size: metrics.batch.labels(program).observe(size))
    stack.push_async_callback(batcher.close)
    gallery = Gallery(supervisor.facts, gallery_files)
    service = Service(supervisor, batcher, gallery, limits)
    app = app_lib.create(supervisor, service, gallery, limits, metrics)
    guard = Guard(app, limits, metrics, token, any_host=host not in _LOOPBACK)
    metrics.active.set_function(lambda: guard.active)
    metrics.waiting.set_function(lambda: batcher.waiting)
    encoding = loop.create_task(encode(gallery, supervisor, batcher, limits, has_files=bool(gallery_files)))
    stack.callback(encoding.cancel)
    server = _Server(uvicorn.Config(
        guard, loop='asyncio', http=protocol(limits.timeout), ws='none', lifespan='off', log_level='error',
        access_log=False, server_header=False, timeout_keep_alive=5, timeout_graceful_shutdown=int(limits.timeout) + 1,
        limit_concurrency=max(_MIN_CONNECTIONS, 4 * limits.max_queue)))
    serving = loop.create_task(server.serve([bound]))
    while not (server.started or serving.done()):
      await asyncio.sleep(0.01)
    if serving.done():
      return await serving
    print(f'Open http://{f"[{host}]" if ":" in host else host}:{bound.getsockname()[1]} (Ctrl-C stops the service)',
          flush=True)
    if host not in _LOOPBACK and not token:
      print('note: anyone who can reach this port can use the model; --token_file requires a token.',
            file=sys.stderr, flush=True)
    await asyncio.wait([stopping, supervisor.failure], return_when=asyncio.FIRST_COMPLETED)
    guard.draining = True
    for _ in range(int(10 * limits.timeout)):
      if not guard.active:
        break
      await asyncio.sleep(0.1)
    server.should_exit = True
    await serving
    if supervisor.failure.done():
      supervisor.failure.result()
