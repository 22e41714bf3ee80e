"""The proxy that damages requests does what its plan says, and nothing else."""

import http.client
import urllib.error
import urllib.request

import fsspec
import numpy as np
import pytest

from tests.helpers import object_stores

pytest.importorskip('aiohttp')
from tests.stress.flaky_store import flaky  # noqa: E402

_CONTENT = np.random.default_rng(0).bytes(100_000)


@pytest.fixture
def content(gcs):
  """(store, URL of the bytes of the object 'thing')."""
  fsspec.filesystem('gs').pipe_file(f'{gcs.address}/thing', _CONTENT)
  return gcs, '/storage/v1/b/bucket/o/thing?alt=media'


def _outcome(url: str) -> str:
  try:
    with urllib.request.urlopen(url) as answer:
      return 'ok' if answer.read() == _CONTENT else 'other'
  except urllib.error.HTTPError as e:
    return str(e.code)
  except http.client.IncompleteRead as e:
    return f'cut {len(e.partial) < len(_CONTENT)}'
  except (urllib.error.URLError, ConnectionError, http.client.HTTPException):
    return 'reset'


def test_without_a_plan_it_passes_everything_on(store, monkeypatch):
  with flaky(store) as (through, counts):
    object_stores.use(through, monkeypatch)
    files, path = fsspec.filesystem(store.address.partition(':')[0]), f'{store.address}/through/a name'
    files.pipe_file(path, _CONTENT)
    assert files.cat_file(path) == _CONTENT
    assert files.cat_file(path, start=5, end=9) == _CONTENT[5:9]
    assert [name.rpartition('/')[2] for name in files.ls(f'{store.address}/through')] == ['a name']
    assert counts()['requests'] >= 3 and set(counts()) == {'requests'}
  object_stores.use(store, monkeypatch)
  assert fsspec.filesystem(store.address.partition(':')[0]).cat_file(path) == _CONTENT


def test_requests_fail_as_often_as_planned_and_in_the_same_order_again(content):
  (store, path), runs = content, []
  for _ in range(2):
    with flaky(store, seed=3, errors=0.2, resets=0.2, truncated=0.2) as (through, counts):
      runs.append([_outcome(through.endpoint + path) for _ in range(100)])
      counted = counts()
  assert runs[0] == runs[1]
  tally = {outcome: runs[0].count(outcome) for outcome in runs[0]}
  assert set(tally) == {'ok', '429', '503', 'reset', 'cut True'}
  assert abs(tally['429'] - tally['503']) <= 1
  assert (counted['errors'], counted['resets'], counted['truncated']) == (
      tally['429'] + tally['503'], tally['reset'], tally['cut True'])
  assert all(10 <= counted[fault] <= 30 for fault in ('errors', 'resets', 'truncated'))


def test_half_of_the_resets_come_after_the_store_has_written(content):
  store, _ = content
  with flaky(store, resets=1.0) as (through, counts):
    url = f'{through.endpoint}/upload/storage/v1/b/bucket/o?uploadType=media&name=lost'
    for i in range(20):
      with pytest.raises((urllib.error.URLError, ConnectionError, http.client.HTTPException)):
        urllib.request.urlopen(urllib.request.Request(f'{url}{i}', b'content'))
    assert counts() == {'requests': 20, 'resets': 20}
  written = [name for name in fsspec.filesystem('gs', use_listings_cache=False).ls(store.address) if 'lost' in name]
  assert 4 <= len(written) <= 16


def test_one_bit_of_the_named_object_is_flipped_once(content):
  store, path = content
  with flaky(store, flipped='th.ng$') as (through, counts):
    with urllib.request.urlopen(through.endpoint + path) as answer:
      damaged = answer.read()
    changed = np.unpackbits(np.frombuffer(damaged, np.uint8) ^ np.frombuffer(_CONTENT, np.uint8))
    assert changed.sum() == 1
    assert [_outcome(through.endpoint + path) for _ in range(3)] == ['ok'] * 3
    assert counts() == {'requests': 4, 'flips': 1}
  with flaky(store, flipped='another') as (through, counts):
    assert _outcome(through.endpoint + path) == 'ok' and counts() == {'requests': 1}
