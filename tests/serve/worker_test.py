"""What the worker reports while it compiles and while it captions, with a model that returns or raises at once."""

import errno
import multiprocessing
import threading
import types

import numpy as np
import pytest

from tests.data import own_files
from tests.helpers import small_model, tiny
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches.assemble import Data
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.export import contents, description
from uni_moe_jax.serve import media
from uni_moe_jax.serve import worker as worker_lib
from uni_moe_jax.serve.limits import Limits, Refused
from uni_moe_jax.serve.service import Service
from uni_moe_jax.serve.worker import Facts, Item


class _Model:
  """Raises an error if there is one."""

  def __init__(self, error: Exception | None):
    self._error = error

  def run(self, *_, **__):
    if self._error:
      raise self._error


@pytest.fixture(name='worker')
def _worker(monkeypatch):
  """Returns a worker with one program, and the front's end of its pipe."""
  monkeypatch.setattr(worker_lib.os, '_exit', lambda code: (_ for _ in ()).throw(SystemExit(code)))

  def make(error=None):
    ours, theirs = multiprocessing.Pipe()
    worker = object.__new__(worker_lib._Worker)
    worker._connection, worker._lock, worker._limits = theirs, threading.Lock(), Limits(max_batch=1)
    worker._model, worker._programs, worker._blank = _Model(error), [('shape', 'classify')], lambda *_: {}
    return worker, ours
  return make


def test_a_worker_reports_each_program_and_then_that_all_are_compiled(worker):
  made, front = worker()
  made._warm_all()
  assert [front.recv(), front.recv()] == [('warm', 'shape', 'classify', 1), ('ready',)]


@pytest.mark.parametrize('error, reason', [
    (OSError(errno.ENOSPC, 'No space left on device'), 'No space left on device'),
    (PermissionError(errno.EACCES, 'Permission denied', 'classify.mlir'), "Permission denied: 'classify.mlir'"),
    (ValueError('no such program'), 'no such program')])
def test_an_error_of_compilation_is_reported_with_its_reason(worker, error, reason):
  made, front = worker(error)
  made._warm_all()
  [what, message] = front.recv()
  assert what == 'failed' and reason in message


def test_a_worker_whose_front_has_ended_ends_quietly(worker):
  made, front = worker()
  front.close()
  with pytest.raises(SystemExit) as ended:
    made._warm_all()
  assert ended.value.code == 0


class _Captioner:
  """A model whose captions have two words and an end."""
  _ENDS = 3

  def run(self, task, program, **inputs):
    if program == 'prefill':
      return {'cache': len(inputs['pixels'])}
    if program == 'caption':
      size = len(inputs['pixels'])
      return {'tokens': np.full((size, self._ENDS), 1), 'score': np.zeros(size)}
    return {'cache': inputs['cache'], 'log_p': np.eye(2)[np.full(inputs['cache'], int(inputs['t'] < self._ENDS - 1))]}


@pytest.mark.parametrize('late', [False, True])
def test_words_of_a_stream_are_those_of_the_images_that_are_answered(worker, monkeypatch, late):
  made, front = worker()
  made._limits = Limits(max_batch=4)
  made._model, made._texts = _Captioner(), types.SimpleNamespace(text=lambda ids: 'word ' * ids.count(1))
  made._manifest = {'tokenizer': {'eot': 0}, 'tasks': {'caption': {'max_len': 5}}}

  def fields(task, program, item):
    if item.image == b'wrong':
      raise Refused(422, 'not readable')
    return {'pixels': np.zeros((1, 1, 2, 2, 1), np.uint8)}

  made._fields = fields
  clock = iter([0.0, 0.0, 0.0, 100.0 * late])  # the start, and before each image but the first
  monkeypatch.setattr(worker_lib, 'time', types.SimpleNamespace(monotonic=lambda: next(clock)))
  answers = made._answers(7, 'caption', worker_lib.STREAM, [Item(image=x) for x in (b'a', b'wrong', b'b', b'c')])
  answered = [0, 2] if late else [0, 2, 3]
  assert [i for i, answer in enumerate(answers) if isinstance(answer, dict)] == answered
  assert str(answers[1]) == 'not readable' and (answers[3] is None) == late
  parts = []
  while front.poll():
    parts.append(front.recv())
  assert parts == [('part', 7, {i: text for i in answered}) for text in ('word ', 'word word ')]


def _manifest(*tasks: dict) -> dict:
  """Tasks that caption; a folder stores equal programs once, so that they have one file."""
  entry = {'readout': 'queries', 'crop': 'resize_crop', 'max_len': 6, 'template': '', 'target_set': 'words'}
  return {'target_sets': {'words': {'max_len': 6}}, 'tasks': {f'task {i}': {
      **entry, **{k: x for k, x in task.items() if k in ('frame_stride', 'max_len')},
      'programs': {name: {'file': task.get(name, name)} for name in ('prefill', 'step', 'caption')}}
      for i, task in enumerate(tasks)}}


@pytest.mark.parametrize('program', ['caption', worker_lib.STREAM])
@pytest.mark.parametrize('other, shared', [
    ({}, True), ({'caption': 'of four beams'}, False), ({'frame_stride': 32.0}, False), ({'max_len': 5}, False)])
def test_requests_of_two_tasks_share_batches_where_all_that_answers_them_is_equal(program, other, shared):
  made = worker_lib.programs_of(_manifest({}, other))
  assert made['task 0', program] == ('task 0', program)
  assert made['task 1', program] == (('task 0' if shared else 'task 1'), program)


def test_a_stream_uses_the_step_of_its_own_task():
  made = worker_lib.programs_of(_manifest({}, {'step': 'of another temperature'}))
  assert made['task 1', worker_lib.STREAM] == ('task 1', worker_lib.STREAM)
  assert made['task 1', 'caption'] == ('task 0', 'caption')


def test_a_video_has_the_frames_of_its_tasks_evaluation(worker):
  given = []
  made, _ = worker()
  made._media = types.SimpleNamespace(video_pixels=lambda *args: given.append(args))
  made._manifest = {'model': {'image_size': 16, 'channels': 3}}
  for stride in ({'frame_stride': 32.0}, {}):  # a folder of an older version has none
    made._read_pixels({'num_frames': 4, **stride}, Item(video=b'video'))
  assert [args[-1] for args in given] == [32.0, 0.0]


def test_a_task_on_videos_reads_videos_as_its_evaluation_also_one_frame_of_each(worker, tmp_path):
  prepare.prepare(own_files.write_videos(tmp_path / 'in', count=2), tmp_path, 'moves', test_fraction=0.0)
  c = tiny.config('shape', data_dir=str(tmp_path))
  c.target_sets.shapes.entries, c.tokenizer.allow_smaller_vocab = 'own:moves/label', True
  c.tasks.shape.update(source='own:moves', label_column='label', num_frames=1, batch_size=2)
  plan = make_plan(c)
  data, [task] = Data(c, plan), plan.tasks
  exported = contents._exported_task(task, plan, data, {'shapes': (plan.sets[0], data.target_sets['shapes'])}, True)
  entry = description._task(exported, {'encode': {}}, small_model.spec())
  made, _ = worker()
  made._media, made._manifest = media, {
      'model': {'image_size': c.model.image_size, 'channels': c.model.channels}, 'tasks': {'shape': entry}}
  service = Service(types.SimpleNamespace(facts=Facts(made._manifest, [], {}, {})), None, None, Limits())
  item = Item(video=data.records('own:moves', 'train').read(np.array([0]))[0]['video'])
  service._check_inputs('shape', entry, item)
  with pytest.raises(Refused, match='reads a video; give the file as video'):
    service._check_inputs('shape', entry, Item(image=b'image'))
  evaluated = data.examples(task).make(np.array([0]), np.zeros(1, np.uint64))['pixels'][0]
  np.testing.assert_array_equal(made._read_pixels(entry, item), evaluated)
