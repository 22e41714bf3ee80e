"""The page without a service: its tokenizer equals SentencePiece, and Chromium gets the answers of the programs."""

import base64
import contextlib
import functools
import hashlib
import http.server
import io
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import types
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from sentencepiece import sentencepiece_model_pb2

from tests.helpers import own_environment, shipped, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.data.text.clip_tokenizer import SURPLUS_SPACES
from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer
from uni_moe_jax.export import artifact, browser, contents, onnx_programs, texts
from uni_moe_jax.serve import media
from uni_moe_jax.serve.limits import Limits
from uni_moe_jax.train import run as train_run
from uni_moe_jax.utils.errors import RunError, UsageError

_SCRIPT = pathlib.Path(browser.__file__).with_name('browser.js')
_TOKENIZE = '''
const fs = require('fs');
globalThis.fetch = async name => ({ok: true, arrayBuffer: async () => Uint8Array.from(fs.readFileSync(name)).buffer});
require(process.argv[1]);
(async () => {
  const ids = [];
  for (const text of JSON.parse(fs.readFileSync('texts.json'))) ids.push(await backend.tokenize(text));
  console.log(JSON.stringify(ids));
})();
'''
_CHROMIUM = shutil.which('chromium')
_FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
          '--disable-background-networking', '--disable-component-update', '--disable-sync')


@pytest.mark.skipif(shutil.which('node') is None, reason='node is not installed')
def test_the_tokenizer_of_the_page_equals_sentencepiece(tmp_path):
  tokenizer, rng = SentencePieceTokenizer(tiny.tokenizer_file()), random.Random(0)
  odd = 'abc XYZ  \t\n.,!?éÉßſİıǅﬁ①½Ａｂ　️e\u0301한글ㄱㅏ漢字😀👩‍👩‍👧Ωώ\u200b\u00a0\u00ad\ufeffﷺ▁\0\u2028<spe><eot>'
  words = pathlib.Path(texts.__file__).read_text().split()
  given = [' '.join(rng.choices(words, k=rng.randrange(12))) for _ in range(1000)]
  given += [''.join(rng.choices(odd, k=rng.randrange(25))) for _ in range(1000)]
  given += [''.join(chr(rng.choice([rng.randrange(32, 0xd7ff), rng.randrange(0xe000, 0x10ffff)])) for _ in range(8))
            for _ in range(500)]
  (tmp_path / 'texts.json').write_text(json.dumps(given))
  shutil.copyfile(tiny.tokenizer_file(), tmp_path / 'tokenizer.model')
  entry = {'type': 'sentencepiece', 'file': 'tokenizer.model'}
  (tmp_path / 'manifest.json').write_text(json.dumps({'tokenizer': entry}))
  done = subprocess.run(['node', '-e', _TOKENIZE, _SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=True)
  for text, ids in zip(given, json.loads(done.stdout), strict=True):
    assert ids == tokenizer.encode(text), text


_PAGE = """
const fs = require('fs');
const given = JSON.parse(fs.readFileSync('given.json'));
globalThis.given = given;
globalThis.fetch = async (name, options) => {
  (given.caches ??= new Set()).add(options?.cache);
  const again = (given.missing ?? []).filter(x => x !== name), missing = again.length < given.missing?.length;
  given.missing = again;
  if (missing) throw new TypeError('Failed to fetch');
  return {ok: true, arrayBuffer: async () => Uint8Array.from(fs.readFileSync(name)).buffer};
};
globalThis.createImageBitmap = async (image, options) => (given.conversion = options?.colorSpaceConversion, image);
globalThis.OffscreenCanvas = class {
  getContext() {
    const rgba = rgb => Array.from({length: rgb.length / 3}, (_, i) => [...rgb.slice(3 * i, 3 * i + 3), 255]).flat();
    return {fillRect() {}, drawImage: image => { this.image = image; },
            getImageData: () => ({data: Uint8ClampedArray.from(rgba(this.image.rgb))})};
  }
};
globalThis.ort = {env: {wasm: {}}, Tensor: function(type, data, dims) { Object.assign(this, {type, data, dims}); },
  InferenceSession: {create: async () => ({
    inputNames: given.inputs ?? ['pixels'], outputNames: ['log_p'], run: async feeds => {
    given.pixels = [...feeds.pixels?.data ?? []];
    return {log_p: {data: Float32Array.of(-1, 0), dims: [1, 2]}};
  }})}};
require(process.argv[1]);
(async () => console.log(JSON.stringify(await eval(process.argv[2])()))) ();
"""


def _in_node(folder: pathlib.Path, manifest: dict, code: str, **given) -> Any:
  """What a function of JavaScript returns that uses `backend` beside a manifest and, at first, no file of `missing`.

  The image decoder and onnxruntime are stand-ins: `given.pixels` is what a model was called with.
  """
  (folder / 'manifest.json').write_text(json.dumps(manifest))
  (folder / 'given.json').write_text(json.dumps(given))
  (folder / 'params.safetensors').touch()
  (folder / 'model.onnx').touch()
  done = subprocess.run(
      ['node', '-e', _PAGE, _SCRIPT, code], cwd=folder, capture_output=True, text=True, check=False)
  assert not done.returncode, done.stderr
  return json.loads(done.stdout)


def _manifest(**fields) -> dict:
  program = {'inputs': {}, 'onnx': {'file': 'model.onnx', 'outputs': ['log_p']}}
  task = {'type': 'image_classification', 'crop': 'resize_crop', 'target_set': 'shapes', 'readout': 'cls',
          'template_parts': [], 'template': '', 'input_conditions': [], 'conditions': {}, 'num_frames': 1,
          'programs': {'classify': program, 'encode': program}}
  return {
      'model': {'image_size': 16, 'channels': 3, 'parameters': 1, 'num_layers': 1, 'width': 16, 'pixel_mean': [0.5]},
      'trained': {'router': 'dense', 'moe_layers': []}, 'provenance': {'name': 'mine'}, 'mixtures': {}, 'examples': {},
      'tasks': {'shape': task}, 'target_sets': {'shapes': {'texts': ['bar', 'disc'], 'condition': 'c'}}, **fields}


@pytest.mark.skipif(shutil.which('node') is None, reason='node is not installed')
@pytest.mark.parametrize('width, height, crop', [
    (39, 30, 'resize_crop'), (16, 23, 'resize_crop'), (57, 187, 'resize_crop'), (64, 65, 'resize_crop'),
    (49, 30, 'random_resized_crop'), (9, 20, 'random_resized_crop')])
def test_the_page_resizes_and_crops_images_as_the_service_does(tmp_path, width, height, crop):
  image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
  manifest = _manifest()
  manifest['tasks']['shape']['crop'] = crop
  got, conversion = _in_node(
      tmp_path, manifest,
      "async () => (await backend.classify({task: 'shape', image: given}), [given.pixels, given.conversion])",
      width=width, height=height, rgb=image.ravel().tolist())
  Image.fromarray(image).save(file := io.BytesIO(), 'PNG')
  want = media.image_pixels(file.getvalue(), 16, 3, crop, Limits())[0].astype(int)
  assert np.abs(np.reshape(got, want.shape) - want).max() <= 1 and conversion == 'none'
  assert np.abs(np.roll(want, 1, 0) - want).max() > 50  # other rows differ


@pytest.mark.skipif(shutil.which('node') is None, reason='node is not installed')
@pytest.mark.parametrize('missing', ['manifest.json', 'params.safetensors', 'model.onnx'])
def test_a_file_that_cannot_be_fetched_once_is_fetched_again_at_the_next_question(tmp_path, missing):
  got = _in_node(
      tmp_path, _manifest(), """async () => {
        const ask = () => backend.classify({task: 'shape', image: given}).then(x => x.answers[0].text, e => e.message);
        return [await ask(), await ask(), ...given.caches];
      }""", missing=[missing], width=16, height=16, rgb=[0] * 768)
  assert got == ['Failed to fetch', 'disc', 'no-cache']  # a stored one only if the server has no other


@pytest.mark.skipif(shutil.which('node') is None, reason='node is not installed')
@pytest.mark.parametrize('answers', [
    "backend.caption({task: 'shape'}, signal)",
    "[backend.classify({task: 'shape', names: Array.from({length: 200}, (_, i) => `a ${i}`)}, signal)]"])
def test_the_page_draws_and_aborts_between_words_of_a_caption_and_between_names(tmp_path, answers):
  file = pathlib.Path(tiny.tokenizer_file())
  manifest = _manifest(tokenizer=artifact.write_tokenizer(tmp_path, SentencePieceTokenizer(file), file))
  program = {'inputs': {}, 'onnx': {'file': 'model.onnx', 'outputs': ['log_p'], 'cache_axes': []}}
  features = {'inputs': {}, 'file': 'x', 'onnx': {'file': 'model.onnx', 'outputs': ['features']}}
  manifest['tasks']['shape'] |= {'max_len': 200, 'beam_size': 1, 'length_penalty': 0, 'programs': {
      'prefill': {**program, 'onnx': {**program['onnx'], 'outputs': []}}, 'step': program, 'encode': features,
      'encode_text': features}}
  manifest['target_sets']['shapes']['max_len'] = 200
  assert _in_node(tmp_path, manifest, f"""async () => {{
    const controller = new AbortController(), {{signal}} = controller;
    setTimeout(() => controller.abort());
    try {{ for await (const _ of {answers}); }} catch (e) {{ return e.name; }}
    return 'all without a pause';
  }}""", inputs=[]) == 'AbortError'


@pytest.mark.skipif(shutil.which('node') is None, reason='node is not installed')
def test_every_task_with_a_text_has_one_although_its_images_are_those_of_another(tmp_path):
  tokenizer, pixels = SentencePieceTokenizer(tiny.tokenizer_file()), np.zeros((2, 1, 16, 16, 3), np.uint8)
  pixels[1] = 1
  texts_of = lambda *given: np.array([[*tokenizer.encode(x), tokenizer.eot] for x in given], np.int32)
  artifact.save(tmp_path / 'examples.safetensors', {
      'shape/pixels': pixels, 'question/pixels': pixels, 'question/text': texts_of('red star', 'red star'),
      'package/text': texts_of('a small shape')})
  shutil.copyfile(tiny.tokenizer_file(), tmp_path / 'tokenizer.model')
  entry = artifact.write_tokenizer(tmp_path, tokenizer, pathlib.Path(tiny.tokenizer_file()))
  task = _manifest()['tasks']['shape']
  got = _in_node(tmp_path, _manifest(
      tokenizer=entry, tasks={**dict.fromkeys(('shape', 'question'), task), 'package': task | {'media': 'video'}},
      examples={'shape': ['bar', 'disc'], 'question': ['a', 'b'], 'package': ['alpha']}), 'backend.model')
  assert {name: t['example_text'] for name, t in got['tasks'].items()} == {
      'shape': '', 'question': 'red star', 'package': 'a small shape'}
  assert [t['input'] for t in got['tasks'].values()] == ['image', 'image', 'video']  # of one frame
  assert got['examples'] == [{'index': i, 'task': 'shape', 'answer': answer, 'num_frames': 1}
                             for i, answer in enumerate(['bar', 'disc'])]


@pytest.mark.skipif(shutil.which('node') is None, reason='node is not installed')
def test_a_model_with_the_vocabulary_of_clip_has_a_page_with_its_texts(tmp_path):
  words = "ein größer dog 's 2 nd 'ſ black - and - weiß , ٣ ٤ é 's 1 , 0 0 0 _ - ² . 5 times ."
  pieces = [bytes([byte]) for byte in words.encode()]  # of which a character may need several
  (tmp_path / 'pieces.json').write_text(json.dumps([piece.hex() for piece in pieces]))
  spe, eot = len(pieces), len(pieces) + 1
  artifact.save(tmp_path / 'examples.safetensors', {
      'shape/pixels': np.zeros((1, 1, 16, 16, 3), np.uint8),
      'shape/text': np.array([[spe, *range(spe), eot, 0]], np.int32)})
  got = _in_node(tmp_path, _manifest(
      tokenizer={'type': 'clip', 'pieces': 'pieces.json', 'eot': eot, 'special': [spe, eot],
                 'surplus_spaces': [spaces.pattern for spaces in SURPLUS_SPACES]}, examples={'shape': ['bar']}),
      'backend.model')
  want = functools.reduce(lambda text, spaces: spaces.sub('', text), SURPLUS_SPACES, words)
  assert got['tasks']['shape']['example_text'] == want and want.startswith("ein größer dog's 2nd")


def test_the_page_loads_files_by_their_digests_and_every_suffix_has_a_type_on_any_server(tmp_path):
  with tarfile.open(tmp_path / 'x.tgz', 'w:gz') as archive:
    for name in browser._FILES:
      (tmp_path / 'x').write_text(name)
      archive.add(tmp_path / 'x', f'package/{name}')
  folder = tmp_path / 'exported'
  folder.mkdir()
  browser.write(folder, tmp_path / 'x.tgz')
  loaded = re.findall(r"""["']([\w./-]+)\?(\w+)["']""", (folder / 'index.html').read_text())
  assert [name for name, _ in loaded] == [
      'onnxruntime/ort.wasm.min.js', 'browser.js', 'onnxruntime/ort-wasm-simd-threaded.js',
      'onnxruntime/ort-wasm-simd-threaded.wasm']
  for name, digest in loaded:
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest().startswith(digest) and len(digest) == 8
  assert {p.suffix for p in folder.rglob('*') if p.is_file()} == {'.html', '.js', '.wasm', '.json'}


_data = lambda file: types.SimpleNamespace(tokenizer=None, tokenizer_file=pathlib.Path(file))


@pytest.mark.parametrize('part, field, value, message', [
    ('trainer_spec', 'model_type', 2, 'a model_type other'), ('trainer_spec', 'byte_fallback', True, 'byte_fallback'),
    ('normalizer_spec', 'add_dummy_prefix', False, 'add_dummy_prefix=false')])
def test_a_tokenizer_to_which_the_page_would_give_other_ids_is_refused(tmp_path, part, field, value, message):
  browser.check_tokenizer(None, file := pathlib.Path(tiny.tokenizer_file()))
  model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
  setattr(getattr(model, part), field, value)
  (tmp_path / 'x.model').write_bytes(model.SerializeToString())
  problem = f'--browser: the tokenizer .*x.model has {message}.*, so the page .*; use --onnx'
  with pytest.raises(UsageError, match=problem):
    artifact.prepare(['browser'], 'float32', _data(tmp_path / 'x.model'))


def _npm(folder: pathlib.Path, content: str, code: int = 0) -> dict[str, Any]:
  """Arguments of `browser.fetch` with a stand-in of npm, which fetches `content`."""
  npm = folder / 'npm'
  npm.write_text(f'#!/bin/sh\nprintf "{content}" > x.tgz\necho E404 >&2\nexit {code}\n')
  npm.chmod(0o755)
  return dict(cache=folder / 'cache', npm=str(npm))


def test_the_runtime_is_fetched_once_and_has_the_digest_of_its_version(tmp_path):
  integrity = f'sha512-{base64.b64encode(hashlib.sha512(b"package").digest()).decode()}'
  archive = browser.fetch(**_npm(tmp_path, 'package'), integrity=integrity)
  assert archive.read_bytes() == b'package'
  fails = _npm(tmp_path, '', code=1)
  assert browser.fetch(**fails, integrity=integrity) == archive
  archive.write_bytes(b'changed')
  with pytest.raises(RunError, match='differs from the published onnxruntime-web@.*: its digest is sha512-'):
    browser.fetch(**fails, integrity=integrity)


def test_an_npm_that_is_missing_or_fails_is_one_sentence(tmp_path):
  with pytest.raises(RunError, match='differs from the published onnxruntime-web@'):
    browser.fetch(**_npm(tmp_path, 'another package'))
  with pytest.raises(RunError, match='npm cannot fetch onnxruntime-web@.*: E404; check the network'):
    browser.fetch(**_npm(tmp_path, '', code=1))
  with pytest.raises(UsageError, match='--browser needs npm .*; install Node.js'):
    browser.fetch(tmp_path, npm=str(tmp_path / 'none'))


@pytest.mark.parametrize('formats, dtype, message', [
    (['torch'], 'float32', 'need PyTorch'), (['onnx'], 'float32', 'environment for jax2onnx'),
    (['torch', 'onnx'], 'bfloat16', 'float32.* has bfloat16')])
def test_what_a_format_needs_is_missed_before_anything_is_exported(monkeypatch, formats, dtype, message):
  def fail():
    raise RunError('the environment for jax2onnx could not be made')

  monkeypatch.setitem(sys.modules, 'torch', None)  # not installed
  monkeypatch.setattr(onnx_programs, 'python', fail)
  with pytest.raises((RunError, UsageError), match=message) if message else contextlib.nullcontext():
    artifact.prepare(formats, dtype, _data('unused'))


@pytest.fixture(name='folder', scope='module')
def _folder(tmp_path_factory):
  """An exported folder of a model with random parameters."""
  if _CHROMIUM is None:
    pytest.skip('Chromium is not installed')
  pytest.importorskip('playwright')
  c = tiny.config('shape', 'caption', 'package', data_dir=tiny.data_dir())
  c.evaluators.captions = config_lib.evaluator('caption', 'caption', split='train', beam_size=2, length_penalty=1.0)
  run = train_run.build(c, jax.devices()[:1])
  params = shipped.random_params(run.shapes.params)
  exported = contents.make_contents(
      run.spec.model.spec, params, run.plan, run.data, dtype='float32', num_examples=6)
  folder = tmp_path_factory.mktemp('browser') / 'model'
  own_environment.made_or_skipped(lambda: artifact.prepare(['browser'], np.float32, run.data))
  artifact.write(folder, exported, {'name': 'mine'}, [], formats=['browser'])
  return folder


@pytest.fixture(name='page')
def _page(folder):
  """The page in Chromium; fails on a request to another host and on an error in the console."""
  from playwright.sync_api import sync_playwright
  handler_class = type('Quiet', (http.server.SimpleHTTPRequestHandler,), {'log_message': lambda *_: None})
  handler = functools.partial(handler_class, directory=str(folder))
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  address, wrong = f'http://127.0.0.1:{server.server_address[1]}/', []
  try:
    with sync_playwright() as p, p.chromium.launch(executable_path=_CHROMIUM, args=_FLAGS) as chromium:
      page = chromium.new_page()
      page.on('console', lambda m: wrong.append(m.text)
              if m.type == 'error' and 'favicon' not in m.location['url'] else None)
      page.on('pageerror', lambda e: wrong.append(str(e)))
      page.on('request', lambda r: None if r.url.startswith((address, 'blob:', 'data:')) else wrong.append(r.url))
      page.goto(f'{address}index.html')
      yield page
      assert not wrong
  finally:
    server.shutdown()
    server.server_close()


_CAPTION = '''async index => {
  let last;
  for await (const [event, content] of backend.caption({task: 'caption', example: index})) last = content;
  return last;
}'''

_CLASSIFY_FILE = "file => backend.classify({task: 'shape', image: new Blob([Uint8Array.from(file)])})"


@pytest.mark.nightly
def test_chromium_gives_the_classes_and_captions_of_the_programs(folder, page):
  model = shipped.module(folder).Model(folder)
  words, stored = texts.Texts(model), shipped.module(folder).tensors(folder / 'examples.safetensors')
  examples = page.evaluate('async () => (await backend.model()).examples')
  names = model.manifest['target_sets']['shapes']['texts']
  pixels = list({x.tobytes(): x for task in model.manifest['examples'] if f'{task}/pixels' in stored
                 for x in stored[f'{task}/pixels']}.values())  # distinct ones
  images = [e['index'] for e in examples if e['num_frames'] == 1]
  (profile := PngImagePlugin.PngInfo()).add(b'gAMA', (100_000).to_bytes(4))  # of linear light
  assert len(images) == len(pixels) >= 3
  for index, x in zip(images, pixels):
    want = model.run('caption', 'caption', pixels=x[None])['tokens'][0].tolist()
    got = page.evaluate(_CAPTION, index)
    assert got['text'] == words.text(want) and got['tokens'] == want[:len(got['tokens'])]
    log_p = np.asarray(model.run('shape', 'classify', pixels=x[None])['log_p'])[0]
    got = page.evaluate("i => backend.classify({task: 'shape', example: i})", index)['answers']
    order = np.argsort(-log_p)
    assert [a['text'] for a in got] == [names[k] for k in order]
    np.testing.assert_allclose([a['probability'] for a in got], np.exp(log_p[order]), rtol=1e-4)
    Image.fromarray(x[0, :, :, 0]).save(file := io.BytesIO(), 'PNG', pnginfo=profile)
    assert page.evaluate(_CLASSIFY_FILE, list(file.getvalue()))['answers'] == got
  # Names that the reader types.
  given = page.evaluate("i => backend.classify({task: 'shape', example: i, names: ['a red star', 'disc']})", images[0])
  image = np.asarray(model.run('shape', 'encode', pixels=pixels[0][None])['features'])[0]
  text = np.asarray(model.run('shape', 'encode_text', **words.tokens(['a red star', 'disc'], 16))['features'])
  scale = min(float(np.exp(model.params[f'log_scale_{model.manifest["tasks"]["shape"]["temperature"]}'])), 100)
  p = np.exp(scale * text @ image)
  answers = {a['text']: a['probability'] for a in given['answers']}
  np.testing.assert_allclose([answers['a red star'], answers['disc']], p / p.sum(), rtol=1e-3)


@pytest.mark.nightly
def test_a_reader_chooses_an_example_and_reads_its_classes(page):
  page.get_by_role('button', name='Examples').click()
  page.locator('.examples button').first.click()
  page.locator('#live .bars li').first.wait_for(timeout=60_000)
  assert page.locator('#live .bars li').count() == 3
  assert 'service' not in page.locator('footer').inner_text()
