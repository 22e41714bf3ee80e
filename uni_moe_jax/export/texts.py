"""Tokenizes and detokenizes texts of this exported model.

It needs numpy and sentencepiece. A model with CLIP's vocabulary needs numpy only: captions are decoded, but texts must
be tokenized by the caller.

  words = texts.Texts(load.Model())
  words.captions(TASK, pixels)                                  # pixels: uint8 [B, T, H, W, C]
  model.run(TASK, 'encode_text', **words.tokens(NAMES, 16))     # 16 tokens each, including the end
  model.run(TASK, 'classify', **words.fill(TASK, text=TEXT))    # a task with a template
  model.run(TASK, 'classify', **words.masked('it [mask] .', 16))  # masked prediction
"""

import functools
import json
import re

import numpy as np

MASK = '[mask]'
_FINAL_STOP = re.compile(r'(?<=[^\W_]|\s)\.\s*$')  # of a sentence; filter no_stop of a field


class Texts:
  """Tokenizer of a `load.Model`."""

  def __init__(self, model):
    self._model, self._entry = model, model.manifest['tokenizer']

  def captions(self, task, pixels):
    """Returns the captions of images or videos, uint8 [B, T, H, W, C]."""
    return [self.text(row) for row in np.asarray(self._model.run(task, 'caption', pixels=pixels)['tokens']).tolist()]

  @functools.cached_property
  def tokenizer(self):
    """The SentencePiece processor."""
    if self._entry['type'] != 'sentencepiece':
      raise ValueError("this model uses CLIP's vocabulary, which this file cannot tokenize with: tokenize your "
                       f'texts with the merges of {self._entry["file"]} and end each with id {self._entry["eot"]}.')
    import sentencepiece
    return sentencepiece.SentencePieceProcessor(model_file=str(self._model.folder / self._entry['file']))

  @functools.cached_property
  def _pieces(self):
    """Bytes of every ordinary id of CLIP's vocabulary."""
    return [bytes.fromhex(piece) for piece in json.loads((self._model.folder / self._entry['pieces']).read_text())]

  def text(self, ids):
    """Decodes token ids up to the first end of text, with words as people write them."""
    ids = ids[:ids.index(self._entry['eot'])] if self._entry['eot'] in ids else ids
    ids = [i for i in ids if i not in self._entry['special']]
    if self._entry['type'] == 'clip':
      text = b''.join(self._pieces[i] for i in ids).decode(errors='replace').strip()
      surplus = self._entry.get('surplus_spaces', ())
      return functools.reduce(lambda text, spaces: re.sub(spaces, '', text), surplus, text)
    return self.tokenizer.decode(ids)

  def tokens(self, texts, length):
    """Returns {'text', 'text_valid'} [n, length]: each text ended by `eot`, truncated and padded."""
    rows = [row[:length - 1] + [self._entry['eot']] for row in self.tokenizer.encode(list(texts))]
    ids = np.array([row + [self._entry['pad']] * (length - len(row)) for row in rows], np.int32).reshape(-1, length)
    return {'text': ids, 'text_valid': np.arange(length)[None] < np.array([len(row) for row in rows], int)[:, None]}

  def masked(self, text, length):
    """Returns {'text', 'text_valid', 'position'} of one text; each [mask] in it is one masked token."""
    first, *rest = map(self.tokenizer.encode, text.split(MASK))
    row, position = list(first), []
    for part in rest:
      position.append(len(row))
      row += [self._entry['spe'], *part]
    row = row[:length - 1] + [self._entry['eot']]
    return {'text': np.array([row], np.int32), 'text_valid': np.ones((1, len(row)), bool),
            'position': np.array([[i for i in position if i < len(row) - 1]], np.int32)}

  def fill(self, task, /, **texts):
    """Returns {'text', 'text_valid', 'position'} of one example of a task with a template, filled with texts.

    Texts are truncated to the task's length as in training: the last of n to at most 1/n of the available tokens, and
    so on.
    """
    entry, markers = self._model.manifest['tasks'][task], {'<spe>': self._entry['spe'], '<eot>': self._entry['eot']}
    parts = entry['template_parts']  # words, markers, and fields [column, filter]
    fields = [i for i, part in enumerate(parts) if isinstance(part, list)]
    ids = [[] if i in fields else [markers[part]] if part in markers else self.tokenizer.encode(part)
           for i, part in enumerate(parts)]
    budget = entry['max_len'] - sum(map(len, ids))
    for remaining in range(len(fields), 0, -1):
      i = fields[remaining - 1]
      column, name = parts[i]
      text = _FINAL_STOP.sub('', texts[column]) if name == 'no_stop' else texts[column]
      ids[i] = self.tokenizer.encode(text)[:budget // remaining]
      budget -= len(ids[i])
    row = [token for part in ids for token in part]
    return {'text': np.array([row], np.int32), 'text_valid': np.ones((1, len(row)), bool),
            'position': np.array([[row.index(self._entry['spe'])]], np.int32)}
