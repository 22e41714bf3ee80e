"""Running text for masked language modeling: rows of tokens that begin with a record and continue with the next."""

from collections.abc import Callable

import numpy as np

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.data.examples.corrupt_examples import CorruptExampleCounter, read_or_stop
from uni_moe_jax.data.examples.features import columns_of_type
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.data.shards.record_format import CorruptExample
from uni_moe_jax.data.text.tokenizer import Tokenizer
from uni_moe_jax.utils import splitmix
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

_MAX_READS_PER_TOKEN = 2  # of a row of running text; some records cannot be read
_WINDOW_CHARS_PER_TOKEN = 12  # more than S tokens of any language
_MAX_WORD = 50  # characters between spaces; some languages have none


def running_text(task: TaskSpec, records: FileDataset, keep: np.ndarray, tokenizer: Tokenizer, training: bool,
                 counter: CorruptExampleCounter) -> Callable[..., np.ndarray]:
  """Running text for masked language modeling: (ids int [n], hashes uint64 [n]) → int32 [n, S].

  Row i starts with record keep[i] and continues with the next ones of `keep` until it is full. A row is thus found
  without packing the whole text. In evaluation the row has the beginning of a long record; in training it has a window,
  which the hashes choose, another one in every epoch. A record that cannot be read is skipped and counted, by
  `CorruptExampleCounter.count` or a function like it, the third argument.
  """
  column, S, N = task.label_column or 'text', task.max_len, len(keep)
  if records.columns.get(column) != 'text':
    raise UsageError(
        f'config.tasks.{task.name}: source {task.source!r} has no text column {column!r} (set by label_column; the '
        f"default is 'text'); {nearest(column, columns_of_type(records, 'text'))}.")

  size = _WINDOW_CHARS_PER_TOKEN * S

  def first_tokens(text, h):
    """Of the record that a row starts with. Of a text much longer than a row only a part of `size` is tokenized."""
    is_long, stop = len(text) > 2 * size, len(text)
    if not training:
      return [*tokenizer.encode(text[:size] if is_long else text), tokenizer.eot]
    if is_long:
      start = _window_start(len(text), size, h, 'window')
      stop = start + size
    tokens = tokenizer.encode(text[_word_start(text, start):_word_start(text, stop)] if is_long else text)
    if stop == len(text):
      tokens = [*tokens, tokenizer.eot]
    return tokens[_window_start(len(tokens), S, h, 'token'):] if len(tokens) > S else tokens

  def read(ids, hashes, count=counter.count):
    out = np.zeros((len(ids), S), np.int32)
    lengths, next_ids = np.zeros(len(ids), int), np.asarray(ids) % N
    for turn in range(_MAX_READS_PER_TOKEN * S):  # a valid record gives at least one token, its `eot`
      unfilled = np.flatnonzero(lengths < S)
      if not len(unfilled):
        return out
      corrupt, chunk = [], read_or_stop(records, keep[next_ids[unfilled]], counter)
      for i, record in zip(unfilled, chunk, strict=True):
        if isinstance(record, CorruptExample):
          corrupt.append(f'{records.location(int(keep[next_ids[i]]))}: {record}')
          continue
        text = record[column]
        tokens = (first_tokens(text, int(hashes[i])) if turn == 0 else
                  [*tokenizer.encode(text[:2 * size]), tokenizer.eot])[:S - lengths[i]]  # it may be a book
        out[i, lengths[i]:lengths[i] + len(tokens)] = tokens
        lengths[i] += len(tokens)
      count(len(chunk), corrupt)
      next_ids[unfilled] = (next_ids[unfilled] + 1) % N
    counter.has_no_replacement = True
    return out
  return read


def _window_start(length: int, size: int, h: int, purpose: str) -> int:
  """Draws the start of a window of `size` of `length`. The ends are in a window as often as the middle."""
  return min(max(0, splitmix.mix(h, purpose) % (length + size) - size), length - size)


def _word_start(text: str, i: int) -> int:
  """The start of the word that has character i, which may also be the end of the text."""
  if i == len(text):
    return i
  start = text.rfind(' ', max(0, i - _MAX_WORD), i) + 1
  return start if start or i <= _MAX_WORD else i
