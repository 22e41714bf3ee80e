"""Load of the service on this machine: throughput and latency, memory over many requests, overload and recovery.

  python -m tests.stress.serve_load --model=exported --task=glyph_class
  python -m tests.stress.serve_load --model=exported --task=glyph_caption --num_requests=500 --num_memory_requests=0

Clients share the processors with the service. Prints a table and ends with exit code 1 if an answer is missing, memory
grows or overload does not end.
"""

import asyncio
import base64
import io
import json
import os
import pathlib
import time

import numpy as np
from absl import flags
from PIL import Image

from tests.helpers import served
from uni_moe_jax.cli import boundary as cli

_MODEL = flags.DEFINE_string('model', None, 'Exported folder; default: a tiny one.')
_TASK = flags.DEFINE_string('task', 'shape', 'Task that classifies or captions images.')
_NUM_REQUESTS = flags.DEFINE_integer('num_requests', 2000, 'Requests of each measurement.', lower_bound=1)
_CONNECTIONS = flags.DEFINE_list('connections', '1,8,64', 'Numbers of connections.')
_NUM_MEMORY_REQUESTS = flags.DEFINE_integer('num_memory_requests', 20_000, 'Requests while memory is watched.')
_MAX_GROWTH = 2**24  # bytes, after the first fifth of the requests

_UNBATCHED = ('--max_batch=1', '--batch_wait_ms=0')
# As users start it: with optimized programs, which are kept between starts.
_VARIABLES = {'XLA_FLAGS': '', 'XDG_CACHE_HOME': os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache'))}


def _requests(port: int, path: str, task: str) -> list[bytes]:
  """Some requests with different images."""
  result = []
  for pixels in np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8):
    Image.fromarray(pixels).save(out := io.BytesIO(), 'PNG')
    body = json.dumps({'task': task, 'image': base64.b64encode(out.getvalue()).decode()}).encode()
    head = (f'POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n'
            f'Content-Length: {len(body)}\r\n\r\n')
    result.append(head.encode() + body)
  return result


async def _send(port: int, requests: list[bytes], count: int, connections: int) -> tuple[float, dict[int, list[float]]]:
  """Returns (seconds, {status: latencies}) of `count` requests."""
  left, latencies = iter(range(count)), {}

  async def client() -> None:
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    for i in left:
      started = time.perf_counter()
      writer.write(requests[i % len(requests)])
      head = (await reader.readuntil(b'\r\n\r\n')).lower()
      await reader.readexactly(int(head.partition(b'content-length: ')[2].partition(b'\r\n')[0]))
      latencies.setdefault(int(head.split()[1]), []).append(time.perf_counter() - started)
    writer.close()

  started = time.perf_counter()
  await asyncio.gather(*(client() for _ in range(connections)))
  return time.perf_counter() - started, latencies


def measure(service: served.Running, path: str, task: str, num_requests: int, connections: int) -> dict[str, float]:
  """Throughput, latencies in milliseconds, and the requests that got no answer."""
  seconds, latencies = asyncio.run(_send(service.port, _requests(service.port, path, task), num_requests, connections))
  answered = np.array(latencies.get(200, [np.inf])) * 1000
  p50, p95, p99 = np.percentile(answered, [50, 95, 99])
  return {'connections': connections, 'requests_per_second': len(latencies.get(200, [])) / seconds, 'p50_ms': p50,
          'p95_ms': p95, 'p99_ms': p99, 'unanswered': num_requests - len(latencies.get(200, []))}


def main() -> int:
  model, failed = pathlib.Path(_MODEL.value).absolute() if _MODEL.value is not None else served.folder(), []
  for name, options in (('batched', ()), ('unbatched', _UNBATCHED)):
    started = time.monotonic()
    with served.running(*options, model=model, **_VARIABLES) as service:
      print(f'{name}: ready after {time.monotonic() - started:.1f} s', end='', flush=True)
      service.wait_idle()
      print(f', all sizes after {time.monotonic() - started:.0f} s', flush=True)
      does = json.loads(service.request('GET', '/model')[1])['tasks'][_TASK.value]['does']
      path = '/caption' if 'caption' in does else '/classify'
      for connections in map(int, _CONNECTIONS.value):
        row = measure(service, path, _TASK.value, _NUM_REQUESTS.value, connections)
        print(f'{name}: ' + '  '.join(f'{key} {value:.4g}' for key, value in row.items()), flush=True)
        failed += [f'{name}: {row["unanswered"]:g} requests were not answered'] * bool(row['unanswered'])
      if name == 'batched' and _NUM_MEMORY_REQUESTS.value:
        failed += _watch_memory(service, path)
  with served.running('--max_queue=8', model=model, **_VARIABLES) as service:
    requests = _requests(service.port, path, _TASK.value)
    _, latencies = asyncio.run(_send(service.port, requests, 1000, 64))
    print('overload, 64 connections and --max_queue=8:', {s: len(x) for s, x in sorted(latencies.items())})
    after = measure(service, path, _TASK.value, 100, 4)
    if not latencies.get(429) or not set(latencies) <= {200, 429, 503} or after['unanswered']:
      failed.append(f'overload: {sorted(latencies)}, then {after["unanswered"]:g} requests were not answered')
  print(*failed or ['no findings'], sep='\n')
  return int(bool(failed))


def _watch_memory(service: served.Running, path: str) -> list[str]:
  """Resident memory of front and worker after each fifth of the requests."""
  requests, rows = _requests(service.port, path, _TASK.value), []
  for _ in range(5):
    asyncio.run(_send(service.port, requests, _NUM_MEMORY_REQUESTS.value // 5, 32))
    rows.append(service.memory())
  print('memory, MiB of front and worker:', [(front >> 20, worker >> 20) for front, worker in rows])
  return [f'{name} grew by {b - a} bytes' for name, a, b in zip(('front', 'worker'), rows[0], rows[-1])
          if b - a > _MAX_GROWTH]


if __name__ == '__main__':
  cli.run(main)
