"""Runs this exported model. It needs jax, numpy and flatbuffers, not the code that trained it; texts.py is for texts.

  model = load.Model()                                   # of the folder that this file lies in; checks every file
  model.run(TASK, 'classify', pixels=pixels)['log_p']    # manifest.json lists tasks, programs and inputs; any batch
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
  """The manifest. Raises ValueError unless every file is what SHA256SUMS says, and that names every file of the manifest."""
  listed = set()
  *lines, last = (folder / 'SHA256SUMS').read_bytes().decode(errors='replace').split('\n')
  for line in [*lines, last] if last else lines:
    digest, _, name = line.partition('  ')
    file = folder / name
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
      raise ValueError(f'{file} is not what was exported (SHA256SUMS): it is damaged, changed or missing. Copy the folder again.')
    listed.add(name)
  manifest = json.loads((folder / 'manifest.json').read_bytes()) if 'manifest.json' in listed else {'files': ['manifest.json']}
  if missing := sorted({*manifest['files']} - listed):
    raise ValueError(f'{folder / "SHA256SUMS"} does not name {missing[0]}: it is empty, cut off or changed. Copy the folder again.')
  return manifest


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
    found = re.match(rb'\{\s*"format": (\d+)', (self.folder / 'manifest.json').read_bytes())
    if found and int(found[1]) > FORMAT:
      raise ValueError(f'{self.folder} has format {int(found[1])}, and this loader reads up to {FORMAT}: use the load.py that '
                       'lies in the folder, or export the model with a version of uni_moe_jax that fits.')
    self.manifest = verify(self.folder)
    self.params, self.sets = (jax.device_put(tensors(self.folder / f'{n}.safetensors')) for n in ('params', 'sets'))
    self._programs = {}

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
