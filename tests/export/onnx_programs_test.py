"""ONNX models equal the StableHLO programs, in an environment with onnxruntime and without this package."""

import contextlib
import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import own_environment, shipped, small_model, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.export import artifact, contents, onnx_programs, programs
from uni_moe_jax.export.programs import ExportedTask
from uni_moe_jax.model import heads
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.train import run as train_run
from uni_moe_jax.utils.errors import RunError
from uni_moe_jax.utils.tree_paths import by_path

_BATCHES = 1, 3
_SERVER = '''
import sys
class Blocker:
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in ('jax', 'jaxlib', 'flax', 'onnx', 'uni_moe_jax'):
      raise ImportError(f'{name} is not installed')
sys.meta_path.insert(0, Blocker())
import numpy as np, onnx_model
model, given, out = onnx_model.Model(), dict(np.load(sys.argv[1])), {}
for key in {key.partition('/')[0] for key in given}:
  task, program, _ = key.split('.')
  inputs = {name.partition('/')[2]: x for name, x in given.items() if name.startswith(key + '/')}
  out |= {f'{key}/{name}': np.asarray(x) for name, x in model.run(task, program, **inputs).items() if name != 'cache'}
np.savez(sys.argv[2], **out)
'''


@pytest.mark.parametrize('outputs, difference', [
    ([[0., 1.], [2., 2.]], 0.0), ([[0., 1.], [2., 1.]], 0.5), ([[0., 1.], [2., np.nan]], np.nan)])
def test_nan_in_any_output_is_a_difference(outputs, difference):
  """No tolerance accepts it: it is compared by `not <=`."""
  got, want = list(map(np.float32, outputs)), [np.float32([0, 1]), np.float32([2, 2])]
  np.testing.assert_equal(onnx_programs._difference(got, want), difference)


@pytest.mark.nightly
@pytest.mark.parametrize('router', ['attribute', 'token'])
def test_models_equal_the_programs_where_onnxruntime_and_numpy_are_alone(tmp_path, router):
  python = own_environment.made_or_skipped(onnx_programs.python)
  c = tiny.config('shape', 'caption', 'text', data_dir=tiny.data_dir())
  c.moe.router, c.model.word_neighbors = router, 2
  c.evaluators.captions = config_lib.evaluator('caption', 'caption', split='train', beam_size=2, length_penalty=1.0)
  run = train_run.build(c, jax.devices()[:1])
  params = shipped.random_params(run.shapes.params)
  exported = contents.make_contents(run.spec.model.spec, params, run.plan, run.data, dtype='float32')
  folder = tmp_path / 'model'
  artifact.write(folder, exported, {'name': 'mine'}, [], formats=['onnx'])
  model, given, want = shipped.module(folder).Model(folder), {}, {}
  rng = np.random.default_rng(0)
  for task, entry in model.manifest['tasks'].items():
    for name, program in entry['programs'].items():
      assert ('reason' in program['onnx']) == (name == 'caption'), (task, name, program['onnx'])
      if name == 'step':
        continue
      for batch in _BATCHES:
        sizes = {'b': batch, 's': 5, 'm': 2, 'v': 4, 'c': 4}
        inputs = {}
        for field, described in program['inputs'].items():
          dtype, _, shape = described.rstrip(']').partition('[')
          shape = [int(d) if d.isdigit() else sizes[d] for d in shape.split(', ')]
          if field == 'targets' and batch == 1:
            continue  # the entries of the set
          inputs[field] = (rng.normal(size=shape) if dtype == 'float32' else rng.integers(0, 5, shape)).astype(dtype)
          if field == 'text_valid':
            inputs[field] = np.arange(shape[1])[None] < np.arange(shape[1], shape[1] - batch, -1)[:, None]
        if name == 'caption':
          inputs = {'pixels': rng.integers(0, 256, inputs['pixels'].shape, np.uint8)}
        given |= {f'{task}.{name}.{batch}/{field}': x for field, x in inputs.items()}
        want[f'{task}.{name}.{batch}'] = jax.device_get(model.run(task, name, **inputs))
  np.savez(tmp_path / 'given.npz', **given)
  done = subprocess.run([python, '-c', _SERVER, tmp_path / 'given.npz', tmp_path / 'out.npz'], capture_output=True,
                        text=True, cwd=folder, timeout=300, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  got = np.load(tmp_path / 'out.npz')
  assert router == 'token' or len({tuple(row) for row in want['caption.caption.3']['tokens']}) > 1
  for key, outputs in want.items():
    for name, x in outputs.items():
      if name == 'tokens':
        np.testing.assert_array_equal(got[f'{key}/{name}'], x)
      elif name != 'cache':
        shipped.assert_close(got[f'{key}/{name}'], x, f'{key} {name}')
  manifest = json.loads((folder / 'manifest.json').read_text())
  assert manifest['tasks']['shape']['programs']['classify']['onnx']['difference'] <= 1e-5
  models = b''.join(p.read_bytes() for p in folder.glob('*.onnx'))
  arrays = [x.tobytes() for x in load_file(folder / 'params.safetensors').values() if x.size > 1]
  assert b'params.safetensors' in models and not any(x in models for x in arrays)


@pytest.mark.nightly
def test_captions_that_are_searched_on_the_host_equal_the_program():
  spec, name = small_model.spec('dense'), 'image_caption'
  exported = ExportedTask(
      small_model.task_spec(name, target_set='words'), 1, small_model.VOCABULARY, beam_size=3, length_penalty=0.7)
  params = by_path(small_model.params(spec))
  made = programs.programs(UniPerceiver(spec), exported, small_model.SPE, small_model.EOT)
  rng = np.random.default_rng(0)
  words = np.array(heads.normalize(rng.normal(size=(small_model.VOCABULARY, 16)).astype(np.float32)))
  words[small_model.EOT] = 2 * words[small_model.EOT]  # some captions end early
  run = {key: small_model.jit(made[key].run) for key in made}
  model = shipped.onnx_model().Model()
  model.run = lambda task, program, **inputs: jax.tree.map(np.array, jax.device_get(run[program](
      params, inputs if program == 'prefill' else {**inputs, 'targets': words})))
  axes = [[str(d) for d in x.shape].index('b') for x in made['step'].inputs['cache']]
  model.manifest = {'tokenizer': {'eot': small_model.EOT}, 'tasks': {name: {
      'beam_size': 3, 'length_penalty': 0.7, 'max_len': 4, 'programs': {'step': {'onnx': {'cache_axes': axes}}}}}}
  pixels = rng.integers(0, 256, (5, 1, 8, 8, 1), dtype=np.uint8)
  want = jax.device_get(run['caption'](params, {'pixels': pixels, 'targets': words}))
  got = model._search(name, pixels)
  assert len(set(map(tuple, want['tokens']))) > 1
  np.testing.assert_array_equal(got['tokens'], want['tokens'])
  np.testing.assert_allclose(got['score'], want['score'], rtol=1e-5)


def test_other_types_of_products_are_reported_before_anything_is_converted():
  with pytest.raises(ValueError, match=r'--onnx needs products in float32, but this export has bfloat16, .*float32\.'):
    onnx_programs.check_dtype(jnp.dtype('bfloat16'))


@pytest.mark.parametrize('encode, expected', [({'file': 'x'}, contextlib.nullcontext()), (
    {'reason': 'b'}, pytest.raises(RunError, match='no program could be converted to ONNX, .*; nothing was exported'))])
def test_an_export_without_any_onnx_model_is_an_error(encode, expected):
  converted = {'shape': {'classify': {'reason': 'a'}, 'encode': encode}}
  files = {'shape': {'classify': {}, 'encode': {}}}
  with expected:
    onnx_programs._add(files, converted)
    assert files['shape']['encode']['onnx'] == encode
