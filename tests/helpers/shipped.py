"""The modules in an exported folder."""

import importlib.util
import pathlib
import types

BATCHES = (1, 3, 64)

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


def module(folder: pathlib.Path, name: str = 'load') -> types.ModuleType:
  """Import load.py or texts.py of a folder."""
  spec = importlib.util.spec_from_file_location(name, folder / f'{name}.py')
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded
