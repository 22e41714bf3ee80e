"""The gallery: files of every medium that a task searches, and a sentence about each of the others."""

import asyncio
import json
import os
import types

import numpy as np
import pytest

from uni_moe_jax.serve import server
from uni_moe_jax.serve.batching import Batcher
from uni_moe_jax.serve.gallery import Gallery
from uni_moe_jax.serve.limits import Limits, Refused
from uni_moe_jax.serve.worker import Facts

_FRAMES = {'image': 1, 'video': 4}


class _Batcher:
  """Answers for every file; records the tasks of requests."""

  def __init__(self):
    self.tasks = []

  async def submit(self, task, program, item):
    assert program == 'encode' and item.thumbnail
    self.tasks.append(task)
    return {'features': np.ones(2, np.float32), 'png': b'png'}


def _encoded(tmp_path, searched, names=(), **fields):
  """Returns a gallery of files, or of an example of each medium, whose model searches some media; and its notes."""
  tasks = {f'{medium} search': {'num_frames': _FRAMES[medium], 'target': 'pair', 'programs': {
      'encode': {'inputs': {'pixels': ''}}, 'encode_text': {}}, **fields} for medium in searched}
  examples = [{'task': '', 'num_frames': frames, 'answer': medium, 'png': b''} for medium, frames in _FRAMES.items()]
  files, notes, batcher = [tmp_path / name for name in names], [], _Batcher()
  for file in files:
    file.write_bytes(os.fsencode(file.name))
  gallery = Gallery(Facts({'tasks': tasks}, examples, {}, {}), files)
  asyncio.run(gallery.encode(batcher, Limits(), notes.append))
  return gallery, notes, batcher.tasks


_NAMES = 'a.png', 'b.mp4', 'c.gif'


@pytest.mark.parametrize('searched, accepted, refused', [
    (['image', 'video'], ['a.png', 'b.mp4', 'c.gif'], {}),
    (['image'], ['a.png'], {'b.mp4': 'videos', 'c.gif': 'videos'}),
    (['video'], ['b.mp4', 'c.gif'], {'a.png': 'images'}),
    ([], [], {'a.png': 'images', 'b.mp4': 'videos', 'c.gif': 'videos'})])
def test_a_file_that_no_task_searches_is_reported_and_is_no_item(tmp_path, searched, accepted, refused):
  gallery, notes, sent = _encoded(tmp_path, searched, _NAMES)
  assert [item.name for item in gallery.items] == accepted and len(sent) == len(accepted)
  assert all(item.features and item.png == b'png' for item in gallery.items)
  assert sorted(notes) == [f'{tmp_path / name}: No task of this model searches {media}; remove the file.'
                           for name, media in refused.items()]
  assert [gallery.item(i) is not None for i in range(3)] == [name in accepted for name in _NAMES]
  assert gallery.size == len(accepted)


def test_a_task_on_videos_searches_videos_also_if_it_reads_one_frame_of_each(tmp_path):
  gallery, notes, _ = _encoded(tmp_path, ['image'], _NAMES, media='video')
  assert [item.name for item in gallery.items] == ['b.mp4', 'c.gif']
  assert notes == [f'{tmp_path / "a.png"}: No task of this model searches images; remove the file.']


@pytest.mark.parametrize('searched', [['image', 'video'], ['image'], ['video'], []])
def test_examples_are_those_that_a_task_searches(tmp_path, searched):
  gallery, notes, sent = _encoded(tmp_path, searched)
  assert [item.text for item in gallery.items] == searched and gallery.size == len(sent) == len(searched) and not notes


@pytest.mark.parametrize('stored, name, text', [
    (b'caf\xe9_1.png', 'caf\ufffd_1.png', 'caf\ufffd 1'), ('café_1.png'.encode(), 'café_1.png', 'café 1')],
    ids=['latin-1', 'utf-8'])
def test_a_file_name_that_is_not_utf8_becomes_text_that_json_and_tokenizers_take(tmp_path, stored, name, text):
  gallery, notes, _ = _encoded(tmp_path, ['image'], [os.fsdecode(stored)])
  [item] = gallery.items
  assert (item.name, item.text) == (name, text) and not notes
  json.dumps([item.name, item.text], ensure_ascii=False).encode()


@pytest.mark.parametrize('has_files', [True, False])
def test_files_are_sent_only_when_all_is_compiled_because_those_that_end_workers_would_end_the_service(has_files):
  supervisor, sent = types.SimpleNamespace(ready=False), []

  async def encode(batcher, limits, note):
    sent.append(supervisor.ready)

  async def start():
    encoding = asyncio.create_task(server.encode(
        types.SimpleNamespace(encode=encode), supervisor, None, Limits(), has_files))
    for _ in range(10):
      await asyncio.sleep(0)
    supervisor.ready = True
    await asyncio.wait_for(encoding, 10)

  asyncio.run(start())
  assert sent == [has_files]  # examples of the model end no worker, and the page needs them at once


class _Supervisor:
  """Workers that end when they read a file of some content, and before that `restarts` times for another reason."""
  sizes = {('image search', 'encode'): 4}

  def __init__(self, tasks, fatal: bytes, restarts: int = 0):
    entry = {'crop': '', 'max_len': 0, 'template': '', 'readout': 'cls', 'target_set': ''}
    self.facts = types.SimpleNamespace(manifest={'tasks': {'image search': {
        **entry, **tasks['image search'], 'programs': {'encode': {'file': 'e', 'inputs': {'pixels': ''}}}}}})
    self.batches, self._fatal, self._restarts = [], fatal, restarts

  async def run(self, task, program, items, on_part=None):
    self.batches.append([item.image.decode() for item in items])
    if self._fatal in [item.image for item in items] or len(self.batches) <= self._restarts:
      raise Refused(503, 'The worker stopped while computing this answer; send the request again.')
    return [{'features': np.ones(2, np.float32), 'png': b'png'} for _ in items]


@pytest.mark.parametrize('restarts', [0, 1])
def test_a_file_that_ends_workers_is_refused_and_the_others_are_encoded(tmp_path, restarts):
  tasks = {'image search': {'num_frames': 1, 'target': 'pair', 'programs': {
      'encode': {'inputs': {'pixels': ''}}, 'encode_text': {}}}}
  files, notes = [tmp_path / f'{name}.png' for name in 'abcd'], []
  for file in files:
    file.write_bytes(file.stem.encode())

  async def encode(fatal):
    gallery = Gallery(Facts({'tasks': tasks}, [], {}, {}), files)
    supervisor = _Supervisor(tasks, fatal, restarts)
    batcher = Batcher(supervisor, Limits(batch_wait_ms=50))
    await asyncio.wait_for(gallery.encode(batcher, Limits(), notes.append), 10)
    await batcher.close()
    return [item.name for item in gallery.items], supervisor.batches

  assert asyncio.run(encode(b'none'))[0] == ['a.png', 'b.png', 'c.png', 'd.png'] and not notes
  items, batches = asyncio.run(encode(b'c'))
  assert items == ['a.png', 'b.png', 'd.png'] and sorted(batches[0]) == ['a', 'b', 'c', 'd']
  assert sorted(batches[1:]) == [['a'], ['b'], ['c'], ['c'], ['d']]  # alone: no other answer is lost
  assert notes == [f'{files[2]}: 3 workers ended while reading it; remove it, give a smaller file, or raise '
                   '--timeout.']
