"""A page in an exported folder that runs its ONNX models by onnxruntime-web: a static folder, and no service.

The page is that of the service, with `browser.js` in its place. onnxruntime-web comes from the registry of npm once, by
version and digest, and goes into exported folders alone.
"""

import base64
import hashlib
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from uni_moe_jax.data.text.clip_tokenizer import ClipTokenizer
from uni_moe_jax.data.text.tokenizer import Tokenizer
from uni_moe_jax.utils.errors import RunError, UsageError

_messages: Any = sentencepiece_model_pb2  # it makes its classes when it is imported
_PAGE = pathlib.Path(__file__).parents[1] / 'serve/page.html'
_RUNTIME = 'onnxruntime-web@1.30.0'
_INTEGRITY = 'sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=='
# In the package → in the folder. Stock nginx serves an .mjs with a type that browsers do not import.
_FILES = {
    'dist/ort.wasm.min.js': 'onnxruntime/ort.wasm.min.js',
    'dist/ort-wasm-simd-threaded.mjs': 'onnxruntime/ort-wasm-simd-threaded.js',
    'dist/ort-wasm-simd-threaded.wasm': 'onnxruntime/ort-wasm-simd-threaded.wasm',
    'package.json': 'onnxruntime/package.json'}
_FOOTER = '<a href="docs" id="docs">API</a> <span id="where">Your input goes only to this service.</span>'


def check_tokenizer(tokenizer: Tokenizer, file: pathlib.Path) -> None:
  """Raises UsageError for a SentencePiece model to which browser.js would give other ids."""
  if isinstance(tokenizer, ClipTokenizer):
    return  # the page takes no texts
  model = _messages.ModelProto.FromString(file.read_bytes())
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  others = {
      'a model_type other than unigram': trainer.model_type != trainer.UNIGRAM, 'byte_fallback': trainer.byte_fallback,
      'user_defined_symbols': any(piece.type == piece.USER_DEFINED for piece in model.pieces),
      'treat_whitespace_as_suffix': trainer.treat_whitespace_as_suffix,
      'add_dummy_prefix=false': not normalizer.add_dummy_prefix,
      'remove_extra_whitespaces=false': not normalizer.remove_extra_whitespaces,
      'escape_whitespaces=false': not normalizer.escape_whitespaces}
  if settings := [name for name, is_set in others.items() if is_set]:
    raise UsageError(f'--browser: the tokenizer {file} has {", ".join(settings)}, so the page would give other '
                     'tokens; use --onnx or uni-moe serve, or train with a tokenizer of this package.')


def write(folder: pathlib.Path, runtime: pathlib.Path) -> None:
  """Writes index.html, browser.js and the folder onnxruntime beside ONNX models. runtime: see `fetch`."""
  (folder / 'onnxruntime').mkdir()
  with tarfile.open(runtime) as archive:
    for name, written in _FILES.items():
      if (file := archive.extractfile(f'package/{name}')) is None:
        raise RunError(f'{_RUNTIME} has no file {name}.')
      (folder / written).write_bytes(file.read())
  shutil.copyfile(pathlib.Path(__file__).with_name('browser.js'), folder / 'browser.js')
  page = _PAGE.read_text().replace('<script>', _scripts(folder), 1)
  (folder / 'index.html').write_text(page.replace(_FOOTER, 'Your input never leaves this page.'))


def _scripts(folder: pathlib.Path) -> str:
  """Loads the files of `write`, up to the page's own script. Browsers store a file by its address, with the digest."""
  address = lambda name: f'{name}?{hashlib.sha256((folder / name).read_bytes()).hexdigest()[:8]}'
  runtime, mjs, wasm, _ = map(address, _FILES.values())
  return (f'<script src="{runtime}"></script>\n<script src="{address("browser.js")}"></script>\n<script>\n'
          f"ort.env.wasm.wasmPaths = {{mjs: new URL('{mjs}', location), wasm: new URL('{wasm}', location)}};")


def fetch(cache: pathlib.Path | None = None, npm: str = 'npm', integrity: str = _INTEGRITY) -> pathlib.Path:
  """Returns the package of onnxruntime-web, from the cache or from npm.

  Raises:
    UsageError: npm is not installed. RunError: it cannot fetch onnxruntime-web, or its digest is wrong.
  """
  cached = (cache or pathlib.Path(os.path.expanduser('~/.cache/uni_moe_jax'))) / f'{_RUNTIME}.tgz'
  if not cached.exists():
    if shutil.which(npm) is None:
      raise UsageError('--browser needs npm to fetch onnxruntime-web, but npm is not installed; install Node.js.')
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as temporary:
      done = subprocess.run([npm, 'pack', '--silent', _RUNTIME], cwd=temporary, capture_output=True, text=True)
      if done.returncode:
        raise RunError(f'npm cannot fetch {_RUNTIME}: {done.stderr.strip()[-200:]}; check the network and the npm '
                       'registry, and run the command again.')
      [fetched] = pathlib.Path(temporary).glob('*.tgz')
      _check(fetched, integrity)
      fetched.replace(cached)
  _check(cached, integrity)
  return cached


def _check(archive: pathlib.Path, integrity: str) -> None:
  digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
  if f'sha512-{digest}' != integrity:
    raise RunError(f'{archive} differs from the published {_RUNTIME}: its digest is sha512-{digest}; delete it, check '
                   'the npm registry, and run the command again.')
