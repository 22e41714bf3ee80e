"""An exported folder: its loader, a server, and the model with experts that they are compared with."""

import builtins
import importlib.util
import pathlib
import types
from typing import Any

import jax
import numpy as np

from tests.helpers import processes, small_model
from uni_moe_jax.model import decoding
from uni_moe_jax.model.uni_perceiver import UniPerceiver

BATCHES = (1, 3, 64)
_EXPORT = processes.ROOT / 'uni_moe_jax/export'

# Runs in a process that cannot import this package and the libraries that only it needs.
SERVER = '''
import sys
class Blocker:
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in (
        'uni_moe_jax', 'flax', 'optax', 'orbax', 'tensorflow', 'safetensors', 'torch', 'ml_collections'):
      raise ImportError(f'{name} is not installed')
sys.meta_path.insert(0, Blocker())
import jax, numpy as np, load, example, texts
model = load.Model()
words = texts.Texts(model)
x, out = dict(np.load(sys.argv[1])), {}
for n in %r:
  out[f'shape{n}'] = model.run('shape', 'classify', pixels=x['pixels'][:n])['log_p']
  out[f'tokens{n}'] = model.run('caption', 'caption', pixels=x['pixels'][:n])['tokens']
  text = words.tokens((['a red star of moves', 'green disc'] * n)[:n], 8)
  out[f'image{n}'] = model.run('pair', 'encode', pixels=x['pixels'][:n])['features']
  out[f'text{n}'] = model.run('pair', 'encode_text', **text)['features']
  out[f'scores{n}'] = model.run('pair', 'score', features=out[f'image{n}'], texts=out[f'text{n}'])['scores']
  out[f'words{n}'] = np.stack(list(example.captions_word_by_word(model, 'caption', x['pixels'][:n])), axis=1)
  cache = model.run('caption', 'prefill', pixels=x['pixels'][:n])['cache']
  out[f'first{n}'] = model.run('caption', 'step', cache=cache, word=np.zeros(n, np.int32), t=np.int32(0))['log_p']
names = model.manifest['target_sets']['shapes']['texts']
out['names'] = model.run('shape', 'encode_text', **words.tokens(names, 6))['features']
out['captions'] = np.array(words.captions('caption', x['pixels'][:3]))
out.update(text)
np.savez(sys.argv[2], **out)
example.main()
try:
  import uni_moe_jax
except ImportError as e:
  print(e)
''' % (BATCHES,)  # noqa: UP031


def random_params(shapes: Any) -> Any:
  """Random parameters of these shapes, biases and gates among them."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: np.asarray(0.3 * rng.normal(size=x.shape), np.float32), shapes)


def module(folder: pathlib.Path) -> types.ModuleType:
  """Import load.py of a folder."""
  spec = importlib.util.spec_from_file_location('load', folder / 'load.py')
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


def onnx_model(**onnxruntime: Any) -> types.ModuleType:
  """Import onnx_model.py of a folder beside a load.py without a loader, with stand-ins of what onnxruntime has."""
  beside = {'load': types.SimpleNamespace(Model=object), 'onnxruntime': types.SimpleNamespace(**onnxruntime)}
  shipped = types.ModuleType('onnx_model')
  imports = lambda name, *rest: beside.get(name) or builtins.__import__(name, *rest)
  shipped.__builtins__ = {**vars(builtins), '__import__': imports}
  exec(compile((_EXPORT / 'onnx_model.py').read_text(), 'onnx_model.py', 'exec'), vars(shipped))
  return shipped


def search(spec, params, task, tokenizer, pixels, words, **options) -> decoding.Captions:
  """Captions by the evaluator's search; words: features of their target set."""
  run = small_model.jit(lambda values: decoding.beam_search(
      decoding.Decoder.of(UniPerceiver(spec), values, task.type), pixels, words, temperature=task.temperature,
      spe=tokenizer.spe, eot=tokenizer.eot, max_len=task.max_len, **options))
  return jax.device_get(run(params))


def assert_close(actual, expected, name: str = '') -> None:
  """Numbers are equal up to 1e-5 of the largest."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape, name
  assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max(), name
