"""Loads and runs this exported model with jax, numpy and flatbuffers, without the training code.

  model = load.Model()                                   # loads the folder of this file and verifies its files
  model.run(TASK, 'classify', pixels=pixels)['log_p']    # manifest.json lists tasks, programs, inputs

texts.py tokenizes and detokenizes.
"""

import functools
import hashlib
import json
import pathlib
import re

import numpy as np

FORMAT = 3  # of the folders that this file reads
_TYPES = {'F32': np.float32, 'I32': np.int32, 'U8': np.uint8, 'BOOL': np.bool_}


def verify(folder):
  """Returns the manifest. Raises ValueError if a file but the card differs from SHA256SUMS or is missing there."""
  listed = set()
  *lines, last = (folder / 'SHA256SUMS').read_bytes().decode(errors='replace').split('\n')
  for line in [*lines, last] if last else lines:
    digest, _, name = line.partition('  ')
    file = folder / name
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
      raise ValueError(f'{file} differs from the exported file (SHA256SUMS): it is damaged, changed or missing. Copy '
                       'the folder again.')
    listed.add(name)
  manifest = {'files': ['manifest.json']}
  if 'manifest.json' in listed:
    manifest = json.loads((folder / 'manifest.json').read_bytes())
  if missing := sorted({*manifest['files']} - listed):
    raise ValueError(f'{folder / "SHA256SUMS"} does not list {missing[0]}: it is empty, truncated or changed. Copy the '
                     'folder again.')
  return manifest


def tensors(file):
  """{name: array} of a safetensors file: eight bytes for the length of the header, the header as JSON, the arrays."""
  data = file.read_bytes()
  start = 8 + int.from_bytes(data[:8], 'little')
  header = {name: t for name, t in json.loads(data[8:start]).items() if name != '__metadata__'}
  section = lambda begin, end: data[start + begin:start + end]
  array = lambda t: np.frombuffer(section(*t['data_offsets']), _TYPES[t['dtype']]).reshape(t['shape'])
  return {name: array(t) for name, t in header.items()}


class Model:
  """An exported model.

  Attributes:
    manifest: contents of manifest.json.
    params: parameters by path.
    target_sets: features [V, D] of every target set.
  """

  def __init__(self, folder=pathlib.Path(__file__).parent):
    self.folder = pathlib.Path(folder)
    match = re.match(rb'\{\s*"format": (\d+)', (self.folder / 'manifest.json').read_bytes())
    if match and int(match[1]) != FORMAT:
      raise ValueError(f'{self.folder} has format {int(match[1])}, but this loader reads format {FORMAT}: use the '
                       'load.py of that folder, or export the model again.')
    self.manifest = verify(self.folder)
    self._programs = {}

  @functools.cached_property
  def params(self):
    import jax
    return jax.device_put(tensors(self.folder / 'params.safetensors'))

  @functools.cached_property
  def target_sets(self):
    import jax
    return jax.device_put(tensors(self.folder / 'target_sets.safetensors'))

  def run(self, task, program, **inputs):
    """Returns the outputs of a program by name. `targets` defaults to the entries of the task's target set."""
    entry = self.manifest['tasks'][task]['programs'][program]
    if 'targets' in entry['inputs']:
      inputs.setdefault('targets', self.target_sets[self.manifest['tasks'][task]['target_set']])
    if wrong := set(entry['inputs']) ^ set(inputs):
      raise ValueError(f'{task}, {program}: missing or unknown inputs {", ".join(sorted(wrong))}; expected '
                       f'{", ".join(entry["inputs"])}.')
    return self._call(entry, inputs)

  def _call(self, entry, inputs):
    import jax.export
    if entry['file'] not in self._programs:
      exported = jax.export.deserialize(bytearray((self.folder / entry['file']).read_bytes()))
      self._programs[entry['file']] = jax.jit(exported.call)
    return self._programs[entry['file']](self.params, inputs)
