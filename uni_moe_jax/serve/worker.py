"""The worker: the process that owns the model, decodes media and runs programs, one batch at a time.

It speaks through a pipe with the front (`supervisor.py`), which may kill it at any moment.

  front → worker   (job id, task, program, [item, …])
  worker → front   ('loaded', Facts), ('warm', task, program, batch size) when a program may be used, ('ready',) when
                   all may be, ('part', job id, {index of an item that is answered: text}) while captions stream,
                   ('done', job id, [output, Refused or None, …]), ('failed', message) instead of 'loaded' or 'ready'

None: decoding the items before took long, send this one again.
"""

import dataclasses
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from uni_moe_jax.cli import output
from uni_moe_jax.data.formats.rows import shorten
from uni_moe_jax.serve.limits import Limits, Refused

STREAM = 'stream'  # the program `caption`, with words of `prefill` and `step` while it runs
_FIRST = ('classify', 'caption', STREAM, 'encode', 'encode_text')
MAX_MASKS = 8
_DECODING = 0.25  # of the time of a request, for the media of a batch
_WORD_START = '▁'  # SentencePiece's
_UNKNOWN = ' ⁇ '  # how SentencePiece decodes an unknown character
_MAX_SCALE = 100.0  # of similarities, as in the model


@dataclasses.dataclass
class Item:
  """Input of one request. image, video: bytes of a file; example: index in `Facts.examples`.

  texts: columns of the task's template. text: of masked prediction, or the text to encode.
  """
  image: bytes = b''
  video: bytes = b''
  example: int = -1
  texts: dict[str, str] = dataclasses.field(default_factory=dict)
  text: str = ''
  top: int = 5
  thumbnail: bool = False  # return a PNG of the pixels, too
  ended: int = 0  # workers that ended while they computed it; the front counts them

  @property
  def size(self) -> int:
    """Bytes."""
    return len(self.image) + len(self.video)


@dataclasses.dataclass
class Facts:
  """What the front knows of the model: its manifest, examples, and scales of similarities by task."""
  manifest: dict[str, Any]
  examples: list[dict[str, Any]]  # distinct images and videos: task, num_frames, answer, png
  texts: dict[str, str]  # the text of an example by task
  scales: dict[str, float]


def batch_sizes(max_batch: int) -> list[int]:
  """1, 2, 4, … up to max_batch."""
  return [2**i for i in range(max_batch.bit_length()) if 2**i <= max_batch]


def programs_of(manifest: dict[str, Any]) -> dict[tuple[str, str], tuple[str, str]]:
  """(task, program) → the first of those that compute the same, whose requests share batches.

  Missing are `score`, because similarities are computed where requests are answered, and features of masked words,
  which no request needs.
  """
  first, result = {}, {}
  for name, task in manifest['tasks'].items():
    needed = ('classify',) if task['readout'] == 'masked' else ('encode', 'classify', 'caption')
    programs = {p: entry['file'] for p, entry in task['programs'].items() if p in needed}
    if 'encode_text' in task['programs']:
      programs['encode_text'] = f'{task["programs"]["encode_text"]["file"]} {text_length(manifest, name)}'
    if 'prefill' in task['programs']:
      programs[STREAM] = ' '.join(task['programs'][p]['file'] for p in ('prefill', 'step', 'caption'))
    for program, file in programs.items():
      inputs = (task['crop'], task['max_len'], task['template'], task['readout'], _frame_stride(task))
      targets = task['target_set'] if program in ('classify', 'caption', STREAM) else ''
      result[name, program] = first.setdefault((program, file, targets, *inputs * (program != 'encode_text')),
                                               (name, program))
  return result


def _frame_stride(task: dict[str, Any]) -> float:
  """See `media.video_pixels`. Folders that were exported before it was recorded lack it."""
  return task.get('frame_stride', 0.0)


def media_of(task: dict[str, Any]) -> str:
  """'image', 'video' or 'text': what a task reads. Folders that were exported before it was recorded lack it."""
  return task.get('media') or ('text', 'image', 'video')[min(task['num_frames'], 2)]


def text_length(manifest: dict[str, Any], task: str) -> int:
  """Tokens of a text that can be an answer of a task, with the end."""
  entry = manifest['tasks'][task]
  return manifest['target_sets'][entry['target_set']]['max_len'] if entry['target_set'] else entry['max_len']


def main(connection: Connection, folder: str, limits: Limits, cache: str) -> None:
  """Serves jobs until the front closes the pipe."""
  output.outlive_readers()
  for number in (signal.SIGINT, signal.SIGTERM):  # the front decides when to end
    signal.signal(number, signal.SIG_IGN)
  try:
    worker = _Worker(connection, folder, limits, cache)
  except Exception as e:
    connection.send(('failed', f'{type(e).__name__}: {e}' if not isinstance(e, (ValueError, OSError)) else str(e)))
    return
  try:
    worker.run()
  except (EOFError, ConnectionResetError):
    os._exit(0)  # as in `_send`


class _Worker:
  """The model and its pipe."""

  def __init__(self, connection: Connection, folder: str, limits: Limits, cache: str):
    import jax
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
    from uni_moe_jax.export import loader, texts
    from uni_moe_jax.serve import media
    self._connection, self._limits, self._media, self._lock = connection, limits, media, threading.Lock()
    self._model = loader.Model(folder)
    self._manifest = self._model.manifest
    self._texts, self._mask = texts.Texts(self._model), texts.MASK
    self._pixels: list[np.ndarray] = []  # of examples
    examples = self._examples(loader.tensors(pathlib.Path(folder) / 'examples.safetensors'))
    self._programs = sorted(dict.fromkeys(programs_of(self._manifest).values()), key=self._order)
    self._send('loaded', Facts(self._manifest, *examples, self._scales()))
    threading.Thread(target=self._warm_all, daemon=True).start()

  def run(self) -> None:
    """Answers jobs."""
    while True:
      job, task, program, items = self._connection.recv()
      self._send('done', job, self._answers(job, task, program, items))

  def _send(self, *message: Any) -> None:
    try:
      with self._lock:
        self._connection.send(message)
    except (BrokenPipeError, ConnectionResetError):
      os._exit(0)  # the front has ended; a thread may still compile

  def _answers(self, job: int, task: str, program: str, items: list[Item]) -> list[Any]:
    answers, fields = [None] * len(items), {}
    started = time.monotonic()
    for i, item in enumerate(items):
      if i and time.monotonic() - started > _DECODING * self._limits.timeout:
        break
      try:
        fields[i] = self._fields(task, program, item)
      except Refused as e:
        answers[i] = e
    if fields:
      rows = list(fields.values())
      size = min(s for s in batch_sizes(self._limits.max_batch) if s >= len(rows))
      padded = rows + rows[-1:] * (size - len(rows))
      inputs = {name: np.concatenate([row[name] for row in padded]) for name in rows[0]}
      parts = lambda texts: self._send('part', job, dict(zip(fields, texts)))
      outputs = self._outputs(task, program, inputs, [items[i] for i in fields], parts)
      for (i, row), output in zip(fields.items(), outputs):
        answers[i] = output | ({'png': self._media.thumbnail(row['pixels'][0])} if items[i].thumbnail else {})
    return answers

  def _outputs(self, task: str, program: str, inputs: dict, items: list[Item], parts) -> Iterator[dict[str, Any]]:
    """Yields the output of every item."""
    if program == STREAM:
      for words in self._words(task, inputs['pixels']):
        parts([self._texts.text(row) for row in words[:len(items)]])
      program = 'caption'
    out = {name: np.asarray(x) for name, x in self._model.run(task, program, **inputs).items()}
    for i, item in enumerate(items):
      if program == 'caption':
        tokens = out['tokens'][i].tolist()
        yield {'text': self._texts.text(tokens), 'tokens': tokens, 'score': float(out['score'][i])}
      elif program == 'classify':
        best = [self._best(task, log_p, item.top) for log_p in np.atleast_2d(out['log_p'][i])]
        yield {'best': best[:item.text.count(self._mask)] if item.text else best}
      else:
        yield {'features': out['features'][i]}

  def _best(self, task: str, log_p: np.ndarray, top: int) -> list[tuple[str, float]]:
    """The most likely entries with their probabilities, most likely first."""
    order = np.argsort(-log_p, kind='stable')[:top]
    names = self._manifest['target_sets'][self._manifest['tasks'][task]['target_set']]['texts']
    return [(names[i] if names else self._piece(i), float(np.exp(log_p[i]))) for i in order.tolist()]

  def _piece(self, i: int) -> str:
    """An entry of the vocabulary: the start of a word as it is, a continuation as '##ing'."""
    entry = self._manifest['tokenizer']
    if entry['type'] == 'clip':
      return self._texts.text([i])
    piece = self._texts.tokenizer.id_to_piece(i)
    if piece.startswith(_WORD_START):
      return piece[1:] or piece
    return f'##{piece}' if piece.isalnum() and i not in entry['special'] else piece

  def _words(self, task: str, pixels: np.ndarray) -> Iterator[list[list[int]]]:
    """Yields the tokens of greedy captions so far, one more at a time."""
    eot, rows = self._manifest['tokenizer']['eot'], [[] for _ in pixels]
    cache, word = self._model.run(task, 'prefill', pixels=pixels)['cache'], np.zeros(len(pixels), np.int32)
    ended = np.zeros(len(pixels), bool)
    for t in range(self._manifest['tasks'][task]['max_len']):
      out = self._model.run(task, 'step', cache=cache, word=word, t=np.int32(t))
      cache, word = out['cache'], np.where(ended, eot, np.asarray(out['log_p']).argmax(-1)).astype(np.int32)
      ended |= word == eot
      for row, token in zip(rows, word.tolist()):
        row.append(token)
      if ended.all():
        return
      yield rows

  def _fields(self, task: str, program: str, item: Item) -> dict[str, np.ndarray]:
    """Input arrays of one request, with a batch of one. Raises Refused."""
    if program == 'encode_text':
      return self._tokens(item.text, text_length(self._manifest, task))
    entry, fields = self._manifest['tasks'][task], {}
    inputs = entry['programs']['caption' if program == STREAM else program]['inputs']
    if 'pixels' in inputs:
      fields['pixels'] = self._read_pixels(entry, item)[None]
    if 'text' in inputs:
      self._check_tokenizer()
      length = entry['max_len']
      filled = (self._texts.masked(item.text, sys.maxsize)  # uncut: a text too long is refused, and loses no mask
                if entry['readout'] == 'masked' else self._texts.fill(task, **item.texts))
      if (n := filled['text'].shape[1]) > length:
        raise Refused(422, f'The text has {n} tokens, but the model reads at most {length}; shorten it.')
      padding = [(0, 0), (0, length - n)]
      fields |= {'text': np.pad(filled['text'], padding, constant_values=self._manifest['tokenizer']['pad']),
                 'text_valid': np.pad(filled['text_valid'], padding)}
      m = MAX_MASKS if entry['readout'] == 'masked' else 1
      fields['position'] = np.pad(filled['position'], [(0, 0), (0, m - filled['position'].shape[1])])
    return fields

  def _check_tokenizer(self) -> None:
    try:
      _ = self._texts.tokenizer
    except ValueError as e:  # CLIP's vocabulary
      raise Refused(422, f'This service cannot read texts: {e}') from None

  def _tokens(self, text: str, length: int) -> dict[str, np.ndarray]:
    self._check_tokenizer()
    if (n := len(self._texts.tokenizer.encode(text)) + 1) > length:
      raise Refused(422, f'{shorten(text)} has {n} tokens with the end token, but the model reads at most {length}; '
                         'shorten it.')
    return self._texts.tokens([text], length)

  def _read_pixels(self, entry: dict[str, Any], item: Item) -> np.ndarray:
    """uint8 [T, S, S, C]. Raises Refused."""
    if item.example >= 0:
      return self._pixels[item.example]
    spec = self._manifest['model']
    if item.video:
      return self._media.video_pixels(
          item.video, entry['num_frames'], spec['image_size'], spec['channels'], self._limits, _frame_stride(entry))
    return self._media.image_pixels(item.image, spec['image_size'], spec['channels'], entry['crop'], self._limits)

  def _examples(self, arrays: dict[str, np.ndarray]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """See `Facts`; fills `_pixels`."""
    examples, texts, seen = [], {}, set()
    for task, answers in self._manifest['examples'].items():
      if (text := arrays.get(f'{task}/text')) is not None:
        texts[task] = self._example_text(text[0].tolist())
      for pixels, answer in zip(arrays.get(f'{task}/pixels', ()), answers):
        if (key := pixels.tobytes()) not in seen:
          seen.add(key)
          self._pixels.append(pixels)
          examples.append({'task': task, 'num_frames': len(pixels), 'answer': answer,
                           'png': self._media.thumbnail(pixels)})
    return examples, texts

  def _example_text(self, ids: list[int]) -> str:
    """The text before the first end. Unknown characters are '?': without them, the text would have other tokens."""
    entry = self._manifest['tokenizer']
    if entry['type'] == 'clip':
      return self._texts.text(ids)
    pieces, special = self._texts.tokenizer, {*entry['special']} - {self._texts.tokenizer.unk_id()}
    return pieces.decode([i for i in ids[:ids.index(entry['eot'])] if i not in special]).replace(_UNKNOWN, '?')

  def _scales(self) -> dict[str, float]:
    """Scale of the similarities of every task; 1 where ranking needs none."""
    scale = lambda t: min(float(np.exp(self._model.params.get(f'log_scale_{t}', 0.0))), _MAX_SCALE)
    return {name: scale(task['temperature']) for name, task in self._manifest['tasks'].items()}

  def _warm(self, task: str, program: str, size: int) -> None:
    """Compiles a program for a batch size."""
    if program == STREAM:
      inputs = self._blank(task, 'prefill', size)
      list(zip(range(1), self._words(task, inputs['pixels'])))
      self._model.run(task, 'caption', **inputs)
    else:
      self._model.run(task, program, **self._blank(task, program, size))
    self._send('warm', task, program, size)

  def _order(self, program: tuple[str, str]) -> tuple[bool, int]:
    """Key of the order in which programs are compiled: those that read an image alone first, as the page does."""
    entry = self._manifest['tasks'][program[0]]
    return media_of(entry) != 'image' or bool(entry['template']), _FIRST.index(program[1])

  def _warm_all(self) -> None:
    """Compiles every program, then larger batches, while the service runs."""
    try:
      with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as threads:  # XLA itself uses two and more
        list(threads.map(lambda p: self._warm(*p, 1), self._programs))
      self._send('ready')
    except Exception as e:
      return self._send('failed', f'{type(e).__name__}: {e}')
    for size in batch_sizes(self._limits.max_batch)[1:]:
      for task, program in self._programs:
        try:
          self._warm(task, program, size)
        except Exception as e:  # such as too little memory
          print(f'note: batches stay below {size}: {e}', file=sys.stderr, flush=True)
          return

  def _blank(self, task: str, program: str, size: int) -> dict[str, np.ndarray]:
    """Arrays of the shapes of `_fields`."""
    entry, fields = self._manifest['tasks'][task], {}
    length = text_length(self._manifest, task) if program == 'encode_text' else entry['max_len']
    sizes = {'b': size, 's': length, 'm': MAX_MASKS}
    for name, described in entry['programs'][program]['inputs'].items():
      if name != 'targets':
        dtype, shape = re.fullmatch(r'(\w+)\[(.*)\]', described).groups()
        fields[name] = np.ones([sizes.get(n) or int(n) for n in shape.split(', ')], dtype)
    return fields
