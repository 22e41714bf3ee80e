"""Runs this exported model. It needs jax, numpy and flatbuffers, and sentencepiece for texts; not the code that trained it.

  model = load.Model()                                   # of the folder that this file lies in; checks every file
  model.run(TASK, 'classify', pixels=pixels)['log_p']    # manifest.json lists tasks, programs and inputs; any batch
  model.caption(TASK, pixels)                            # pixels: uint8 [B, T, H, W, C]
"""

import hashlib
import json
import pathlib
import re

import jax
import jax.export
import numpy as np

FORMAT = 1  # the newest format that this file reads
_TYPES = {'F32': np.float32, 'I32': np.int32, 'U8': np.uint8, 'BOOL': np.bool_}


def verify(folder):
  """Raises ValueError unless every file is what SHA256SUMS says."""
  *lines, last = (folder / 'SHA256SUMS').read_bytes().decode(errors='replace').split('\n')
  for line in [*lines, last] if last else lines:
    digest, _, name = line.partition('  ')
    file = folder / name
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
      raise ValueError(f'{file} is not what was exported (SHA256SUMS): it is damaged, changed or missing. Copy the folder again.')


def tensors(file):
  """{name: array} of a safetensors file: eight bytes of length, a header in JSON, the arrays' bytes."""
  data = file.read_bytes()
  start = 8 + int.from_bytes(data[:8], 'little')
  header = {name: t for name, t in json.loads(data[8:start]).items() if name != '__metadata__'}
  part = lambda begin, end: data[start + begin:start + end]
  return {name: np.frombuffer(part(*t['data_offsets']), _TYPES[t['dtype']]).reshape(t['shape']) for name, t in header.items()}


class Model:
  """manifest: what the model is and does. sets: features [V, D] of every target set."""

  def __init__(self, folder=pathlib.Path(__file__).parent):
    self.folder = pathlib.Path(folder)
    text = (self.folder / 'manifest.json').read_bytes()
    found = re.match(rb'\{\s*"format": (\d+)', text)
    if found and int(found[1]) > FORMAT:
      raise ValueError(f'{self.folder} has format {int(found[1])}, and this loader reads up to {FORMAT}: use the load.py that '
                       'lies in the folder, or export the model with a version of uni_moe_jax that fits.')
    verify(self.folder)
    self.manifest = json.loads(text)
    self.params, self.sets = (jax.device_put(tensors(self.folder / f'{n}.safetensors')) for n in ('params', 'sets'))
    self._programs, self._tokenizer, self._words = {}, None, self.manifest['tokenizer']

  def run(self, task, program, **inputs):
    """Outputs of a program of a task, by name. Targets are the entries of the task's set where none are given."""
    entry = self.manifest['tasks'][task]['programs'][program]
    if 'targets' in entry['inputs']:
      inputs.setdefault('targets', self.sets[self.manifest['tasks'][task]['set']])
    if wrong := set(entry['inputs']) ^ set(inputs):
      raise ValueError(f'{task}, {program}: {", ".join(sorted(wrong))} missing or unknown; give {", ".join(entry["inputs"])}.')
    if entry['file'] not in self._programs:
      exported = jax.export.deserialize(bytearray((self.folder / entry['file']).read_bytes()))
      self._programs[entry['file']] = jax.jit(exported.call)
    return self._programs[entry['file']](self.params, inputs)

  def caption(self, task, pixels):
    """Captions of pictures or clips."""
    return [self.text(row) for row in np.asarray(self.run(task, 'caption', pixels=pixels)['tokens']).tolist()]

  @property
  def tokenizer(self):
    """The SentencePiece model."""
    if self._words['kind'] != 'sentencepiece':
      raise ValueError("this model's texts are byte pairs of CLIP's vocabulary: make and read their ids yourself.")
    if self._tokenizer is None:
      import sentencepiece
      self._tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(self.folder / self._words['file']))
    return self._tokenizer

  def text(self, ids):
    """The text of token ids before the first end."""
    ids = ids[:ids.index(self._words['eot'])] if self._words['eot'] in ids else ids
    return self.tokenizer.decode([i for i in ids if i not in self._words['special']])

  def tokens(self, texts, length):
    """{'text', 'text_valid'} of texts, each ended, cut and padded to a length."""
    rows = [row[:length - 1] + [self._words['eot']] for row in self.tokenizer.encode(list(texts))]
    ids = np.array([row + [self._words['pad']] * (length - len(row)) for row in rows], np.int32)
    return {'text': ids, 'text_valid': np.arange(length)[None] < np.array([[len(row)] for row in rows])}

  def fill(self, task, **texts):
    """{'text', 'text_valid', 'position'} of one example of a task with a template, filled with texts."""
    row, markers = [], {'<spe>': self._words['spe'], '<eot>': self._words['eot']}
    for part in map(str.strip, re.split(r'(<spe>|<eot>|\{\w*\})', self.manifest['tasks'][task]['template'])):
      row += [markers[part]] if part in markers else self.tokenizer.encode(texts[part[1:-1]] if part[:1] == '{' else part)
    return {'text': np.array([row], np.int32), 'text_valid': np.ones((1, len(row)), bool),
            'position': np.array([[row.index(self._words['spe'])]], np.int32)}
