"""A SavedModel, loaded in a process that has TensorFlow and no JAX, equals the StableHLO programs."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.helpers import shipped, small_model
from uni_moe_jax.export import artifact, programs, saved_model
from uni_moe_jax.export.programs import ExportedTask
from uni_moe_jax.model import heads
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.utils.tree_paths import by_path

_RNG = np.random.default_rng(0)
_SERVER = '''
import sys
class Blocker:
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in ('jax', 'jaxlib', 'flax', 'uni_moe_jax'):
      raise ImportError(f'{name} is not installed')
sys.meta_path.insert(0, Blocker())
import numpy as np
import tensorflow as tf
signatures = tf.saved_model.load(sys.argv[1]).signatures
given, out = dict(np.load(sys.argv[2])), {}
for key in {key.partition('/')[0] for key in given}:
  signature, batch = key.rsplit('@', 1)
  inputs = {name.partition('/')[2]: tf.constant(x) for name, x in given.items() if name.startswith(key + '/')}
  out |= {f'{key}/{name}': x.numpy() for name, x in signatures[signature](**inputs).items()}
np.savez(sys.argv[3], **out)
variables = tf.train.list_variables(sys.argv[1] + '/variables/variables')
print(int(sum(np.prod(shape) for name, shape in variables if name.startswith('params'))))
'''


@pytest.mark.parametrize('router, names', [
    pytest.param('token', ['text_classification'], marks=pytest.mark.nightly),
    pytest.param('attribute', ['text_classification', 'image_caption'], marks=pytest.mark.nightly)])
def test_every_signature_equals_its_program_in_a_process_without_jax(tmp_path, router, names):
  spec = small_model.spec(router, gmm='portable')
  params, model = by_path(small_model.params(spec)), UniPerceiver(spec)
  words = heads.normalize(_RNG.normal(size=(small_model.VOCABULARY, 16)).astype(np.float32))
  folder, tasks, runs = tmp_path / 'model', {}, {}
  (folder / 'programs').mkdir(parents=True)
  for name in names:
    task = ExportedTask(small_model.task_spec(name, name=name, target_set='words'), 1, small_model.VOCABULARY)
    entries = tasks.setdefault(name, {'target_set': 'words', 'programs': {}})['programs']
    for program, p in programs.programs(model, task, small_model.SPE, small_model.EOT).items():
      exported = p.lowered(params)
      (folder / f'programs/{name}.{program}').write_bytes(exported.serialize())
      entries[program] = {'file': f'programs/{name}.{program}'}
      runs[f'{name}.{program}'] = small_model.jit(exported.call)
  artifact.save(folder / 'params.safetensors', {k: np.asarray(x) for k, x in params.items()})
  artifact.save(folder / 'target_sets.safetensors', {'words': np.asarray(words)})
  saved_model.write(folder, tasks, tmp_path / 'saved')

  given, want = {}, {}
  for batch in (1, 3):
    pixels = {'pixels': _RNG.integers(0, 256, (batch, 1, 8, 8, 1), dtype=np.uint8)}
    text = {'text': _RNG.integers(2, small_model.VOCABULARY, (batch, 4)).astype(np.int32),
            'text_valid': np.ones((batch, 4), bool), 'position': np.zeros((batch, 1), np.int32)}
    cases = {'text_classification.encode': text, 'text_classification.classify': text}
    if 'image_caption' in names:
      cache = jax.device_get(runs['image_caption.prefill'](params, pixels))['cache']
      step = {'cache': cache, 'word': np.full(batch, 3, np.int32), 't': np.int32(1)}
      cases |= {'image_caption.prefill': pixels, 'image_caption.step': step, 'image_caption.caption': pixels}
    for signature, inputs in cases.items():
      if not signature.endswith(('encode', 'prefill')):
        given |= {f'{signature}.targets@{batch}/{k}': x for k, x in
                  programs.flat({**inputs, 'targets': words[:5] if 'classify' in signature else words}).items()}
        want[f'{signature}.targets@{batch}'] = runs[signature](
            params, {**inputs, 'targets': words[:5] if 'classify' in signature else words})
        want[f'{signature}@{batch}'] = runs[signature](params, {**inputs, 'targets': words})
      else:
        want[f'{signature}@{batch}'] = runs[signature](params, inputs)
      given |= {f'{signature}@{batch}/{k}': x for k, x in programs.flat(inputs).items()}
  np.savez(tmp_path / 'given.npz', **given)
  done = subprocess.run(
      [sys.executable, '-c', _SERVER, tmp_path / 'saved', tmp_path / 'given.npz', tmp_path / 'out.npz'],
      capture_output=True, text=True, timeout=300, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  got = np.load(tmp_path / 'out.npz')
  assert len(want) == (16 if len(names) == 2 else 6)
  for key, outputs in want.items():
    for name, x in programs.flat(jax.device_get(outputs)).items():
      compare = np.testing.assert_array_equal if x.dtype != np.float32 else shipped.assert_close
      compare(got[f'{key}/{name}'], x, f'{key} {name}')
  assert int(done.stdout.split()[-1]) == sum(x.size for x in params.values())  # stored once
