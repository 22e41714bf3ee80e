"""Tokens of all phrases of a task over own data, in memory-mapped files.

A phrase is a caption template filled with the texts of a record; a list of texts gives one phrase per entry, two lists
one per pair. Phrases are tokenized once per (data, tokenizer, templates) into `DATA_DIR/tokens`, by processes, from the
texts that preparation leaves beside the records. So captions of a batch are NumPy gathers: no record is parsed for
them, which would hold Python's lock.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.data.text.tokenizer import Tokenizer
from uni_moe_jax.io import locks
from uni_moe_jax.io.files import atomic_folder, renames_folders
from uni_moe_jax.utils import cores, errors, splitmix, templates, workers

FOLDER = 'tokens'
_MAX_PHRASES = 2**29  # of a task: 80 templates of millions of records are filled when they are needed
_CHUNK = 2**16  # phrases that are tokenized at once
_CHUNKS_PER_WORKER = 8  # at least; a process takes seconds to start
_PERIOD = 0.5  # seconds between looks at what another process makes
_OLD = 3600  # seconds without a change after which unfinished files are those of a killed process


class Phrases:
  """Chooses phrases of records and returns their tokens."""

  def __init__(self, task: TaskSpec, records: FileDataset, tokenizer: Tokenizer, training: bool):
    """In training phrases are random, otherwise the first ones. They are tokenized when the data is first used."""
    self._tokenizer, self._length, self._training = tokenizer, task.max_len, training
    self._templates = _Templates(task.caption_templates, records)
    self._first = np.concatenate([[0], np.cumsum(self._templates.num_phrases())])  # of each record, [N + 1]
    folder = _tokenized(self._templates, self._first, records, tokenizer)
    self._tokens, self._offsets = (
        np.memmap(folder / name, dtype, 'r') for name, dtype in _dtypes(tokenizer).items())

  def __call__(self, ids: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a phrase of each record.

    Args:
      ids: int [n], of records that have all texts of the templates. hashes: uint64 [n], see `hashing.example_hash`.

    Returns:
      (tokens int32 [n, S] with `eot` as the last one, valid bool [n, S]).
    """
    chosen = self._first[ids] + (self._templates.choose(ids, hashes) if self._training else 0)
    start = self._offsets[chosen]
    number = np.minimum(self._offsets[chosen + 1] - start, self._length - 1)[:, None]
    column = np.arange(self._length)
    tokens = np.full((len(ids), self._length), self._tokenizer.pad, np.int32)
    tokens[column < number] = self._tokens[(start[:, None] + column)[column < number]]
    tokens[column == number] = self._tokenizer.eot
    return tokens, column <= number


def open_phrases(task: TaskSpec, records: FileDataset, tokenizer: Tokenizer, training: bool) -> Phrases | None:
  """Phrases of a task; None if they are not known before records are read, too many, or cannot be kept."""
  if not _can_be_tokenized(task, records, training):
    return None
  try:
    return Phrases(task, records, tokenizer, training)
  except OSError as e:
    if errors.disk_is_full(e):
      raise
    print(f'note: {records.cache / FOLDER} cannot be written ({e.strerror}), so captions are tokenized for every '
          'batch.', file=sys.stderr, flush=True)
    return None


def _can_be_tokenized(task: TaskSpec, records: FileDataset, training: bool) -> bool:
  columns = set().union(*map(templates.columns, task.caption_templates))
  return (records.text_file is not None and not (training and task.mirrored_words)
          and bool(columns) and columns <= {*records.labels, *records.num_texts}
          and int(_Templates(task.caption_templates, records).num_phrases().sum()) <= _MAX_PHRASES)


class _Templates:
  """The phrases of each record: template by template, of lists entry by entry."""

  def __init__(self, texts: Sequence[str], records: FileDataset):
    self.texts, self._size, self._num_texts = texts, records.size, records.num_texts
    self._lists = [[c for c in templates.columns(text) if records.columns[c] == 'texts'] for text in texts]

  def num_phrases(self) -> np.ndarray:
    """Of each record, int64 [N]."""
    ones = np.ones(self._size, np.int64)
    return sum(math.prod((self._num_texts[c] for c in lists), start=ones) for lists in self._lists)

  def choose(self, ids: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Numbers of the phrases that hashes draw among those of each record, int64 [n]."""
    draw = lambda purpose, number: (splitmix.mix(hashes, purpose) % np.asarray(number, np.uint64)).astype(np.int64)
    template = draw('phrase', len(self.texts))
    start = chosen = np.zeros(len(ids), np.int64)
    for i, lists in enumerate(self._lists):
      entry, number = 0, 1
      for c in lists:
        num_texts = self._num_texts[c][ids]
        entry, number = entry * num_texts + draw(c, num_texts), number * num_texts
      chosen = np.where(template == i, start + entry, chosen)
      start = start + number
    return chosen

  def fill(self, row: Mapping[str, str | Sequence[str]]) -> Iterator[str]:
    """Yields the phrases of a record."""
    for text, lists in zip(self.texts, self._lists):
      for entries in itertools.product(*(row[c] for c in lists)):
        yield templates.fill(text, {**row, **dict(zip(lists, entries))})


def _dtypes(tokenizer: Tokenizer) -> dict[str, Any]:
  """Of the files with the tokens of all phrases and the index of the first token of each."""
  return {'tokens': np.uint16 if tokenizer.size <= 2**16 else np.int32, 'offsets': np.int64}


def _tokenized(filler: _Templates, first: np.ndarray, records: FileDataset, tokenizer: Tokenizer) -> pathlib.Path:
  """The folder with the tokens; of several processes, one makes it."""
  identity = repr((records.fingerprint, tokenizer.fingerprint, filler.texts))
  folder = records.cache / FOLDER / hashlib.sha256(identity.encode()).hexdigest()[:24]
  folder.parent.mkdir(parents=True, exist_ok=True)
  if not folder.is_dir() and not renames_folders(folder.parent):  # before hours of work, in each process in turn
    raise OSError(errno.ENOTSUP, 'folders cannot be renamed there')
  while not folder.is_dir():
    with contextlib.ExitStack() as stack:
      if locks.lock(folder.parent, stack):
        time.sleep(_PERIOD)
      elif not folder.is_dir():
        _remove_old(folder.parent)
        with atomic_folder(folder) as temporary:
          _tokenize(filler, first, records, tokenizer, temporary)
  return folder


def _remove_old(folder: pathlib.Path) -> None:
  """Removes what killed processes have left."""
  for path in folder.glob('.*.*'):
    if time.time() - path.stat().st_mtime > _OLD:
      shutil.rmtree(path, ignore_errors=True)


def _tokenize(
    filler: _Templates, first: np.ndarray, records: FileDataset, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
  bounds = [0]
  while bounds[-1] < records.size:
    bounds.append(max(bounds[-1] + 1, int(np.searchsorted(first, first[bounds[-1]] + _CHUNK, 'right')) - 1))
  columns = list(dict.fromkeys(c for text in filler.texts for c in templates.columns(text)))
  parts = [folder / f'part {i}' for i in range(len(bounds) - 1)]

  def tasks() -> Iterator[_Tokenize]:
    with contextlib.ExitStack() as stack:
      files = {c: stack.enter_context(open(records.text_file(c), 'rb')) for c in columns if c in records.num_texts}
      for part, start, stop in zip(parts, bounds, bounds[1:]):
        lines = {}
        for c in columns:
          if c in files:
            number = np.asarray(records.num_texts[c][start:stop])
            text = b''.join(itertools.islice(files[c], int(number.sum()))).decode()
          else:
            names, number = (*records.classes[c], ''), np.ones(stop - start, int)
            text = '\n'.join(names[i] for i in records.labels[c][start:stop])
          lines[c] = text, number, records.columns[c] == 'texts'
        yield _Tokenize(tokenizer, filler, lines, part)

  workers.run(tasks(), len(parts), 'tokenized', min(cores.available(), len(parts) // _CHUNKS_PER_WORKER))
  with contextlib.ExitStack() as stack:
    files = {name: stack.enter_context((folder / name).open('wb')) for name in _dtypes(tokenizer)}
    num_tokens = 0  # written as bytes: on a full disk, `tofile` may lose the end of an array without an error
    for part in parts:
      with np.load(part) as arrays:
        arrays = dict(arrays)
      offsets = num_tokens + np.cumsum(arrays['lengths']) - arrays['lengths']
      num_tokens += len(arrays['tokens'])
      for name, array in (arrays | {'offsets': offsets}).items():
        if name in files:
          files[name].write(array.astype(_dtypes(tokenizer)[name]).tobytes())
      part.unlink()
    files['offsets'].write(np.array([num_tokens], np.int64).tobytes())
    files['tokens'].write(np.zeros(1, _dtypes(tokenizer)['tokens']).tobytes())  # no empty file can be mapped


@dataclasses.dataclass(frozen=True)
class _Tokenize:
  """The tokenization of the phrases of some records.

  Attributes:
    lines: column → (its texts, a line each; number of texts of each record; whether they are a list).
    part: file that gets the tokens.
  """
  tokenizer: Tokenizer
  filler: _Templates
  lines: dict[str, tuple[str, np.ndarray, bool]]
  part: pathlib.Path

  def __call__(self) -> int:
    """Returns the number of records."""
    columns = {c: _values(*lines) for c, lines in self.lines.items()}
    rows = (dict(zip(columns, values)) for values in zip(*columns.values(), strict=True))
    phrases = [phrase for row in rows for phrase in self.filler.fill(row)]
    distinct = list(dict.fromkeys(phrases))
    tokens = dict(zip(distinct, self.tokenizer.encode_batch(distinct), strict=True))
    encoded = [tokens[phrase] for phrase in phrases]
    with self.part.open('wb') as file:
      np.savez(file, tokens=np.fromiter(itertools.chain.from_iterable(encoded), np.int32),
               lengths=np.fromiter(map(len, encoded), np.int64))
    return len(next(iter(self.lines.values()))[1])


def _values(text: str, number: np.ndarray, is_list: bool) -> Iterator[str | list[str]]:
  """Yields the texts of each record of a column."""
  lines = iter(text.split('\n'))
  for n in number.tolist():
    values = list(itertools.islice(lines, n))
    yield values if is_list else ''.join(values)
