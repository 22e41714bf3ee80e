"""Texts of this exported model: captions that can be read, ids of texts. It needs numpy; and sentencepiece, unless the model has
CLIP's vocabulary: then captions can be read, and who has texts makes their ids himself.

  words = texts.Texts(load.Model())
  words.captions(TASK, pixels)                                  # pixels: uint8 [B, T, H, W, C]
  model.run(TASK, 'encode_text', **words.tokens(NAMES, 16))     # 16 tokens each, the end included
  model.run(TASK, 'classify', **words.fill(TASK, text=TEXT))    # a task with a template
"""

import functools
import json
import re

import numpy as np


class Texts:
  """Texts of a `load.Model`."""

  def __init__(self, model):
    self._model, self._facts = model, model.manifest['tokenizer']

  def captions(self, task, pixels):
    """Captions of pictures or clips."""
    return [self.text(row) for row in np.asarray(self._model.run(task, 'caption', pixels=pixels)['tokens']).tolist()]

  @functools.cached_property
  def tokenizer(self):
    """The SentencePiece model."""
    if self._facts['kind'] != 'sentencepiece':
      raise ValueError("this model's texts are byte pairs of CLIP's vocabulary, which nothing here makes: make the ids of "
                       f'your texts yourself ({self._facts["file"]} holds the merges), each text ended by {self._facts["eot"]}.')
    import sentencepiece
    return sentencepiece.SentencePieceProcessor(model_file=str(self._model.folder / self._facts['file']))

  @functools.cached_property
  def _pieces(self):
    """Bytes of every id of CLIP's vocabulary that is not special."""
    return [bytes.fromhex(piece) for piece in json.loads((self._model.folder / self._facts['pieces']).read_text())]

  def text(self, ids):
    """The text of token ids before the first end."""
    ids = ids[:ids.index(self._facts['eot'])] if self._facts['eot'] in ids else ids
    ids = [i for i in ids if i not in self._facts['special']]
    if self._facts['kind'] == 'clip':
      return b''.join(self._pieces[i] for i in ids).decode(errors='replace').strip()
    return self.tokenizer.decode(ids)

  def tokens(self, texts, length):
    """{'text', 'text_valid'} of texts, each ended, cut and padded to a length."""
    rows = [row[:length - 1] + [self._facts['eot']] for row in self.tokenizer.encode(list(texts))]
    ids = np.array([row + [self._facts['pad']] * (length - len(row)) for row in rows], np.int32)
    return {'text': ids, 'text_valid': np.arange(length)[None] < np.array([[len(row)] for row in rows])}

  def fill(self, task, **texts):
    """{'text', 'text_valid', 'position'} of one example of a task with a template, filled with texts.

    Texts are cut to the task's length as in training: the last of n to at most 1/n of the room, and so on.
    """
    entry, markers = self._model.manifest['tasks'][task], {'<spe>': self._facts['spe'], '<eot>': self._facts['eot']}
    parts = [part for part in map(str.strip, re.split(r'(<spe>|<eot>|\{\w*\})', entry['template'])) if part]
    fields = [place for place, part in enumerate(parts) if part[0] == '{']
    ids = [[] if part[0] == '{' else [markers[part]] if part in markers else self.tokenizer.encode(part) for part in parts]
    room = entry['max_len'] - sum(map(len, ids))
    for remaining in range(len(fields), 0, -1):
      place = fields[remaining - 1]
      ids[place] = self.tokenizer.encode(texts[parts[place][1:-1]])[:room // remaining]
      room -= len(ids[place])
    row = [token for part in ids for token in part]
    return {'text': np.array([row], np.int32), 'text_valid': np.ones((1, len(row)), bool),
            'position': np.array([[row.index(self._facts['spe'])]], np.int32)}
