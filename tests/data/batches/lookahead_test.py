"""The next batch is made while the caller works on the last one."""

import contextlib
import threading

import pytest

from uni_moe_jax.data.batches.lookahead import Lookahead


def test_items_are_made_in_order_and_none_follows_the_last_one():
  with contextlib.closing(Lookahead(iter('abc'), str.upper)) as items:
    assert [items.take() for _ in range(5)] == ['A', 'B', 'C', None, None]


def test_one_item_is_made_before_it_is_requested_and_no_more():
  made, second = [], threading.Event()

  def make(item):
    made.append(item)
    if item == 1:
      second.set()
    return item

  with contextlib.closing(Lookahead(iter(range(9)), make)) as items:
    assert items.take() == 0
    assert second.wait(60)
  assert made == [0, 1]


def test_an_item_that_is_not_made_yet_is_not_ready():
  go = threading.Event()
  with contextlib.closing(Lookahead(iter([0]), lambda _: go.wait(60))) as items:
    assert not items.is_ready
    go.set()
    assert items.take()


def test_an_error_is_raised_where_its_item_would_be_taken():
  def items():
    yield 1
    raise OSError('disk')

  with contextlib.closing(Lookahead(items(), lambda item: item)) as ahead:
    assert ahead.take() == 1
    with pytest.raises(OSError, match='disk'):
      ahead.take()
