"""Batches: who shares one, when it leaves, who comes next, and what happens to those that wait too long."""

import asyncio
import types

import pytest

from uni_moe_jax.serve.batching import Batcher
from uni_moe_jax.serve.limits import Limits, Refused
from uni_moe_jax.serve.worker import Item, batch_sizes, programs_of

_TASK = dict(crop='', max_len=8, template='', readout='cls', target_set='')


def _manifest():
  program = lambda file: {'file': file, 'inputs': {'pixels': ''}}
  return {'tasks': {
      'a': _TASK | {'programs': {'encode': program('e'), 'classify': program('c')}, 'target_set': 's'},
      'b': _TASK | {'programs': {'encode': program('e'), 'classify': program('c')}, 'target_set': 't'},
      'c': _TASK | {'programs': {'encode': program('e'), 'encode_text': program('x')}},
      'd': _TASK | {'programs': {'encode': program('e'), 'encode_text': program('x')}, 'max_len': 9}},
      'target_sets': {}}


class _Supervisor:
  """Answers every item with its text, after `release`; records batches."""

  def __init__(self, size: int = 4):
    self.facts, self.batches = types.SimpleNamespace(manifest=_manifest()), []
    self.sizes = {(task, program): size for task in 'abcd' for program in ('encode', 'classify', 'encode_text')}
    self.release = asyncio.Event()

  async def run(self, task, program, items, on_part=None):
    self.batches.append((task, program, [item.text for item in items]))
    outputs = [Refused(422, 'bad') if item.text == 'bad' else None if i and item.text.startswith('late') else item.text
               for i, item in enumerate(items)]
    if on_part:
      on_part({i: f'{output}…' for i, output in enumerate(outputs) if isinstance(output, str)})
    await self.release.wait()
    return outputs


def _run(check, size: int = 4, **limits) -> None:
  async def main():
    supervisor = _Supervisor(size)
    batcher = Batcher(supervisor, Limits(**{'batch_wait_ms': 1, 'timeout': 5, **limits}))
    try:
      await asyncio.wait_for(check(supervisor, batcher), 10)
    finally:
      await batcher.close()
  asyncio.run(main())


def test_programs_that_compute_the_same_share_batches():
  programs = programs_of(_manifest())
  assert programs['b', 'encode'] == programs['a', 'encode'] == ('a', 'encode')
  assert programs['b', 'classify'] == ('b', 'classify')  # another target set
  assert programs['d', 'encode_text'] == ('d', 'encode_text') and programs['c', 'encode_text'] == ('c', 'encode_text')
  assert batch_sizes(8) == [1, 2, 4, 8] and batch_sizes(1) == [1]


def test_requests_of_one_program_form_batches_up_to_the_compiled_size():
  async def check(supervisor, batcher):
    supervisor.release.set()
    answers = await asyncio.gather(*(batcher.submit('ab'[i % 2], 'encode', Item(text=str(i))) for i in range(6)))
    assert answers == [str(i) for i in range(6)]
    assert [len(texts) for *_, texts in supervisor.batches] == [4, 2]
  _run(check)


def test_a_request_waits_for_its_program_to_be_compiled_and_keeps_no_other_from_its_turn():
  async def check(supervisor, batcher):
    supervisor.release.set()
    size = supervisor.sizes.pop(('a', 'encode'))
    early = asyncio.create_task(batcher.submit('a', 'encode', Item(text='early')))
    assert await batcher.submit('a', 'classify', Item(text='other')) == 'other' and not early.done()
    supervisor.sizes['a', 'encode'] = size
    supervisor.on_warm()
    assert await early == 'early'
  _run(check)


def test_a_batch_that_is_not_full_leaves_after_the_wait():
  async def check(supervisor, batcher):
    supervisor.release.set()
    assert await batcher.submit('a', 'encode', Item(text='x')) == 'x'
  _run(check, batch_wait_ms=30)


def test_requests_that_arrive_within_the_wait_join():
  async def check(supervisor, batcher):
    supervisor.release.set()
    first = asyncio.create_task(batcher.submit('a', 'encode', Item(text='x')))
    await asyncio.sleep(0.01)
    await asyncio.gather(first, batcher.submit('a', 'encode', Item(text='y')))
    assert supervisor.batches == [('a', 'encode', ['x', 'y'])]
  _run(check, size=2, batch_wait_ms=3000)  # a full batch leaves at once


def test_a_long_queue_does_not_keep_others_from_their_turn():
  async def check(supervisor, batcher):
    many = [asyncio.create_task(batcher.submit('c', 'encode_text', Item(text=f't{i}'))) for i in range(40)]
    await asyncio.sleep(0.02)
    one = asyncio.create_task(batcher.submit('a', 'classify', Item(text='one')))
    await asyncio.sleep(0.02)
    supervisor.release.set()
    await asyncio.gather(one, *many)
    assert supervisor.batches[1] == ('a', 'classify', ['one'])
  _run(check)


def test_a_refused_item_fails_alone():
  async def check(supervisor, batcher):
    supervisor.release.set()
    good, bad = await asyncio.gather(
        *(batcher.submit('a', 'encode', Item(text=text)) for text in ('good', 'bad')), return_exceptions=True)
    assert good == 'good' and isinstance(bad, Refused) and bad.message == 'bad'
  _run(check)


def test_items_that_the_worker_left_out_are_sent_again_before_others():
  async def check(supervisor, batcher):
    supervisor.release.set()
    texts = ['x', 'late 1', 'late 2', 'y', 'z']
    assert await asyncio.gather(*(batcher.submit('a', 'encode', Item(text=text)) for text in texts)) == texts
    assert [sent for *_, sent in supervisor.batches] == [
        ['x', 'late 1', 'late 2', 'y'], ['late 1', 'late 2', 'z'], ['late 2']]
  _run(check)


@pytest.mark.parametrize('size, batches', [(2**24, [2, 1]), (2**24 + 1, [1, 1, 1])])
def test_a_batch_is_bounded_by_its_bytes(size, batches):
  async def check(supervisor, batcher):
    supervisor.release.set()
    item = Item(text='x', image=bytes(size))
    await asyncio.gather(*(batcher.submit('a', 'encode', item) for _ in range(3)))
    assert [len(sent) for *_, sent in supervisor.batches] == batches
  _run(check)


def test_who_waits_too_long_is_refused_and_is_not_computed():
  async def check(supervisor, batcher):
    first = asyncio.create_task(batcher.submit('a', 'encode', Item(text='first')))
    await asyncio.sleep(0.02)
    with pytest.raises(Refused, match='No answer within 1 s') as error:
      await batcher.submit('a', 'encode', Item(text='late'))
    assert error.value.status == 503
    supervisor.release.set()
    with pytest.raises(Refused):
      await first
    assert await batcher.submit('a', 'encode', Item(text='next')) == 'next'
    assert [texts for *_, texts in supervisor.batches] == [['first'], ['next']]
  _run(check, timeout=1)


def test_a_request_that_gave_up_among_others_is_not_computed():
  async def check(supervisor, batcher):
    busy = asyncio.create_task(batcher.submit('b', 'classify', Item(text='busy')))
    await asyncio.sleep(0.02)
    first, given_up, last = (
        asyncio.create_task(batcher.submit('a', 'encode', Item(text=text))) for text in ('x', 'given up', 'y'))
    await asyncio.sleep(0.02)
    given_up.cancel()
    supervisor.release.set()
    await asyncio.gather(busy, first, last)
    assert supervisor.batches[1:] == [('a', 'encode', ['x', 'y'])]
  _run(check)


def test_parts_of_a_batch_reach_their_requests():
  async def check(supervisor, batcher):
    supervisor.release.set()
    parts = {'x': [], 'bad': [], 'y': []}
    outputs = await asyncio.gather(
        *(batcher.submit('a', 'encode', Item(text=t), parts[t].append) for t in parts), return_exceptions=True)
    assert parts == {'x': ['x…'], 'bad': [], 'y': ['y…']}
    assert outputs[::2] == ['x', 'y'] and isinstance(outputs[1], Refused) and len(supervisor.batches) == 1
  _run(check)
