"""A proxy that makes a test server of an object store slow and unreliable, by a seeded plan; it counts what it did.

  with object_stores.gcs_server() as store, flaky_store.flaky(store, errors=0.05) as (flaky, counts):
    …  # the environment of `flaky` leads through the proxy
    assert counts()['errors'] > 0
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import re
import sys
import urllib.request
from collections.abc import Callable, Iterator
from urllib.parse import unquote

from aiohttp import web

from tests.helpers import object_stores, processes, store_proxy
from tests.helpers.object_stores import Store

_COUNTS = '/flaky-store-counts'
_ERRORS = (429, 503)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What goes wrong, as fractions of the requests; the n-th request has the same fate for the same seed."""
  seed: int = 0
  delay: float = 0.0  # seconds before every answer
  resets: float = 0.0  # half of them after the store has acted
  errors: float = 0.0  # 429 and 503 in turn; the store gets no request
  truncated: float = 0.0  # answers that end in the middle of their body
  flipped: str = ''  # pattern of names: one bit of the first answers with the content of such an object is flipped
  flips: int = 1  # of answers


class Flaky:
  """The handler of the proxy."""

  def __init__(self, plan: Plan):
    self._plan, self._counts, self._cuts = plan, collections.Counter(), 0  # cuts: of the next answers with a body

  async def __call__(self, request: web.Request, body: bytes, forward: store_proxy.Forward) -> web.StreamResponse:
    if request.path == _COUNTS:
      return web.json_response(self._counts)
    p, counts = self._plan, self._counts
    fate = random.Random(f'{p.seed} {counts["requests"]}').random()
    counts['requests'] += 1
    await asyncio.sleep(p.delay)
    if fate < p.errors:
      counts['errors'] += 1
      return web.json_response({'error': {'message': 'flaky'}}, status=_ERRORS[counts['errors'] % 2])
    if (fate := fate - p.errors) < p.resets:
      counts['resets'] += 1
      if fate < p.resets / 2:
        await forward()
      request.transport.abort()
      return web.Response()
    answer = await forward()
    self._cuts += p.resets <= fate < p.resets + p.truncated
    if self._cuts and len(answer.body) > 1:
      self._cuts -= 1
      counts['truncated'] += 1
      cut = web.StreamResponse(status=answer.status, headers=answer.headers)
      cut.content_length = len(answer.body)
      await cut.prepare(request)
      await cut.write(answer.body[:len(answer.body) // 2])
      request.transport.close()
      return cut
    if self._is_content(request, answer) and counts['flips'] < p.flips:
      counts['flips'] += 1
      content = bytearray(answer.body)
      content[len(content) // 2] ^= 1
      answer.body = bytes(content)
    return answer

  def _is_content(self, request: web.Request, answer: web.Response) -> bool:
    """Whether an answer is of an object whose bytes the plan changes."""
    is_read = request.method == 'GET' and answer.status in (200, 206) and answer.body
    is_metadata = '/storage/v1/' in request.path and request.query.get('alt') != 'media' or 'list-type' in request.query
    return bool(self._plan.flipped and is_read and not is_metadata
                and re.search(self._plan.flipped, unquote(request.path)))


@contextlib.contextmanager
def flaky(store: Store, **plan) -> Iterator[tuple[Store, Callable[[], collections.Counter]]]:
  """Yield (the store through a proxy, its counts). plan: fields of `Plan`."""
  endpoint = f'http://{processes.free_address()}'
  command = [sys.executable, '-m', 'tests.stress.flaky_store', endpoint.rpartition(':')[2], store.endpoint,
             json.dumps(dataclasses.asdict(Plan(**plan)))]

  def counts() -> collections.Counter:
    with urllib.request.urlopen(endpoint + _COUNTS) as answer:
      return collections.Counter(json.load(answer))

  with object_stores.server(command, endpoint + _COUNTS):
    yield store.behind(endpoint), counts


if __name__ == '__main__':
  store_proxy.serve(int(sys.argv[1]), sys.argv[2], Flaky(Plan(**json.loads(sys.argv[3]))))
