"""Answers to test examples by the service, by ONNX models and by the page without a service, against the evaluator's.

  uni-moe export --workdir=runs/quickstart --output=exported --num_examples=200 --browser
  python -m tests.stress.serve_equality --workdir=runs/quickstart --model=exported --formats=service,onnx,browser

Every task answers the first examples of its evaluator's split: classes by name, captions token for token, the best of
the examples' own texts for retrieval, the best token of a mask for masked words. The page decodes no video files, so
videos are examples of the folder there. ONNX models run in their environment, the page in Chromium.
"""

import base64
import contextlib
import dataclasses
import functools
import http.server
import io
import json
import pathlib
import pickle
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import sentencepiece
from absl import flags

from tests.helpers import saved_run, served, shipped
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.data.batches.mixtures import evaluation_batches
from uni_moe_jax.data.examples.examples import encode_texts, example_ids, fill_captions, pad_tokens
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.export import contents, onnx_programs, texts
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train import workdir as workdir_lib
from uni_moe_jax.utils import templates

_WORKDIR = flags.DEFINE_string('workdir', None, 'Trained run.', required=True)
_MODEL = flags.DEFINE_string('model', None, 'Its exported folder.', required=True)
_FORMATS = flags.DEFINE_list('formats', ['service'], 'Of service, onnx and browser.')
_TASKS = flags.DEFINE_list('tasks', [], 'Tasks; default: all.')
_NUM_EXAMPLES = flags.DEFINE_integer('num_examples', 200, 'Per task.', lower_bound=1)
_MASKED_WORDS = 12  # words of a text of which one is masked

Answers = list[Any]


@dataclasses.dataclass
class Case:
  """Examples of a task, and what the evaluator answers.

  Attributes:
    does: 'classify', 'caption', 'rank' or 'fill'.
    pixels: uint8 [N, T, H, W, C], if the task reads any.
    columns: of each example, the texts of its template.
    names: to rank; sentences: with a mask each.
  """
  task: str
  does: str
  expected: Answers
  pixels: np.ndarray | None = None
  columns: list[dict[str, str]] = dataclasses.field(default_factory=list)
  names: list[str] = dataclasses.field(default_factory=list)
  sentences: list[str] = dataclasses.field(default_factory=list)


def cases(run: train_run.Run, predictor: Predictor, params: Any, num_examples: int, entries: dict[str, Any]
          ) -> Iterator[Case]:
  """Yields the examples of every task. entries: tasks of the exported folder's manifest."""
  spec = contents.portable(run.spec.model.spec, 'float32')
  for task in run.plan.tasks:
    task = dataclasses.replace(task, split=next(e.split for e in run.plan.evaluations if e.task == task))
    examples, records = run.data.examples(task), run.data.records(task.source, task.split)
    ids = np.arange(min(num_examples, examples.size))
    [(fields, _)] = evaluation_batches(examples, ids, len(ids))
    rows, pixels = example_ids(records, task)[ids], fields.get('pixels')
    if task.type.readout == 'masked':
      sentences = [_masked(text) for text in records.columns['text'][::7].tolist()
                   if len(text.split()) >= _MASKED_WORDS][:len(ids)]
      yield Case(task.name, 'fill', [_filled(run, predictor, task, s) for s in sentences], sentences=sentences)
    elif task.type.readout == 'queries':
      words, entry = predictor.target_set(task.target_set), entries[task.name]
      options = {name: entry[name] for name in ('beam_size', 'length_penalty')}
      captions = shipped.search(spec, params, task, run.data.tokenizer, pixels, words, **options)
      yield Case(task.name, 'caption', captions.tokens[:, 0].tolist(), pixels)
    elif task.type.target == 'pair':
      names = [name for name in sorted(set(fill_captions(records, task)[rows, 0].tolist()))
               if len(run.data.tokenizer.encode(name)) < task.max_len]  # the service refuses longer ones
      tokens, valid = pad_tokens(
          encode_texts(names, run.data.tokenizer, task.max_len), task.max_len, run.data.tokenizer.pad)
      names_of = normalize(predictor.pairs(
          task.type, {'id': np.zeros(len(names), np.uint32), 'target': tokens, 'target_valid': valid}))
      best = (predictor.inputs(task.type, fields)[:, 0] @ names_of.T).argmax(-1)
      yield Case(task.name, 'rank', [names[i] for i in best.tolist()], pixels, names=names)
    else:
      log_p = predictor.log_probabilities(predictor.inputs(task.type, fields), task)[:, 0]
      names = run.data.target_sets[task.target_set].names
      used = templates.columns(task.template) if task.type.readout == 'slot' else []
      yield Case(task.name, 'classify', [names[i] for i in log_p.argmax(-1).tolist()], pixels,
                 [{c: str(records.columns[c][i]) for c in used} for i in rows] if used else [])


def _masked(text: str) -> str:
  words = text.split()[:_MASKED_WORDS]
  return ' '.join([*words[:5], texts.MASK, *words[6:]])


def _filled(run: train_run.Run, predictor: Predictor, task: TaskSpec, sentence: str) -> str:
  """The best token of the only mask of a sentence, as the API writes it."""
  tokenizer = run.data.tokenizer
  before, after = map(tokenizer.encode, sentence.split(texts.MASK))
  row = [*before, tokenizer.spe, *after, tokenizer.eot]
  text, valid = pad_tokens([row], task.max_len, tokenizer.pad)
  fields = {'id': np.zeros(1, np.uint32), 'text': text, 'text_valid': valid,
            'position': np.array([[len(before)]], np.int32)}
  log_p = predictor.log_probabilities(predictor.inputs(task.type, fields), task)[0, 0]
  pieces = sentencepiece.SentencePieceProcessor(model_file=str(run.data.tokenizer_file))
  return word_of(pieces.id_to_piece(int(log_p.argmax())))


def word_of(piece: str) -> str:
  """A piece of SentencePiece as the API writes it: a continuation of a word as '##ing'."""
  if piece.startswith('▁'):
    return piece[1:] or piece
  return f'##{piece}' if piece.isalnum() else piece


def by_service(folder: pathlib.Path, given: list[Case]) -> list[Answers]:
  """Answers of uni-moe serve, eight requests at a time."""
  with (served.running('--max_characters=100000', model=folder, XLA_FLAGS='') as service,
        ThreadPoolExecutor(8) as threads):
    def answer(case: Case, i: int) -> Any:
      if case.does == 'fill':
        return service.post('/fill', task=case.task, text=case.sentences[i])['masks'][0][0]['text']
      body = {'task': case.task, **({'texts': case.columns[i]} if case.columns else {})}
      if case.pixels is not None:
        frames = case.pixels[i]
        body |= {'image': _png(frames[0])} if len(frames) == 1 else {'video': _video(frames)}
      if case.does == 'caption':
        return service.post('/caption', **body)['tokens']
      if case.does == 'rank':
        return service.post('/search', **body, names=case.names)['results'][0]['text']
      return service.post('/classify', **body)['answers'][0]['text']
    return [list(threads.map(functools.partial(answer, case), range(len(case.expected)))) for case in given]


def _png(pixels: np.ndarray) -> str:
  return served.png(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _video(frames: np.ndarray) -> str:
  """Base64 of a video without loss. frames: uint8 [T, H, W, C]."""
  import av
  with av.open(out := io.BytesIO(), 'w', format='matroska') as container:
    stream = container.add_stream('ffv1', rate=8)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = 'bgr0'
    for frame in np.broadcast_to(frames, (*frames.shape[:3], 3)):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format='rgb24')))
    container.mux(stream.encode(None))
  return base64.b64encode(out.getvalue()).decode()


_ONNX = '''
import pickle, sys, numpy as np, onnx_model
model, out = onnx_model.Model(), []
for task, program, inputs in pickle.load(open(sys.argv[1], 'rb')):
  made = model.run(task, program, **inputs)
  out.append(next(made[name] for name in ('log_p', 'tokens', 'features') if name in made))
pickle.dump(out, open(sys.argv[2], 'wb'))
'''


def by_onnx(folder: pathlib.Path, given: list[Case]) -> list[Answers]:
  """Answers of the ONNX models in onnxruntime, in a process without JAX."""
  model = shipped.module(folder).Model(folder)
  words, entries, jobs = texts.Texts(model), model.manifest['tasks'], []
  for case in given:
    task = case.task
    if case.does == 'fill':
      jobs += [(task, 'classify', words.masked(s, entries[task]['max_len'])) for s in case.sentences]
    elif case.does == 'rank':
      jobs += [(task, 'encode', {'pixels': case.pixels}),
               (task, 'encode_text', words.tokens(case.names, entries[task]['max_len']))]
    elif case.columns:
      for i, columns in enumerate(case.columns):
        pixels = {} if case.pixels is None else {'pixels': case.pixels[i:i + 1]}
        jobs.append((task, 'classify', pixels | words.fill(task, **columns)))
    else:
      has_text = 'text' in entries[task]['programs'][case.does]['inputs']
      text = {k: np.repeat(x, len(case.pixels), axis=0) for k, x in words.fill(task).items()} if has_text else {}
      jobs.append((task, case.does, {'pixels': case.pixels, **text}))
  with tempfile.TemporaryDirectory() as name:
    job, out = pathlib.Path(name, 'job'), pathlib.Path(name, 'out')
    job.write_bytes(pickle.dumps(jobs))
    subprocess.run([onnx_programs.python(), '-c', _ONNX, job, out], cwd=folder, check=True)
    outputs = iter(pickle.loads(out.read_bytes()))
  result = []
  for case in given:
    names = model.manifest['target_sets'].get(entries[case.task]['target_set'], {}).get('texts', [])
    if case.does == 'fill':
      best = [int(next(outputs)[0, 0].argmax()) for _ in case.sentences]
      result.append([word_of(words.tokenizer.id_to_piece(i)) for i in best])
    elif case.does == 'rank':
      result.append([case.names[i] for i in (next(outputs) @ next(outputs).T).argmax(-1).tolist()])
    elif case.does == 'caption':
      result.append(next(outputs).tolist())
    else:
      log_p = np.concatenate([next(outputs) for _ in case.columns] or [next(outputs)])
      result.append([names[i] for i in log_p.argmax(-1).tolist()])
  return result


_IN_PAGE = '''async ([does, bodies]) => {
  const answers = [];
  for (const {png, ...body} of bodies) {
    if (png) body.image = await (await fetch(`data:image/png;base64,${png}`)).blob();
    if (does === 'fill') answers.push((await backend.fill(body)).masks[0][0].text);
    else if (does === 'caption') {
      let last;
      for await (const [, content] of backend.caption(body)) last = content;
      answers.push(last.tokens);
    } else answers.push((await backend.classify(body)).answers[0].text);
  }
  return answers;
}'''


def by_browser(folder: pathlib.Path, given: list[Case]) -> list[Answers]:
  """Answers of the page of --browser in Chromium."""
  manifest, stored = json.loads((folder / 'manifest.json').read_text()), shipped.module(folder).tensors(
      folder / 'examples.safetensors')
  index = {}  # of distinct examples with pixels, as the page counts them
  for task, answers in manifest['examples'].items():
    for x in (stored[f'{task}/pixels'] if f'{task}/pixels' in stored else stored[f'{task}/text'])[:len(answers)]:
      index.setdefault((x.shape, x.tobytes()), len(index))

  def body(case: Case, i: int) -> dict[str, Any]:
    content = {'task': case.task}
    if case.does == 'fill':
      return content | {'text': case.sentences[i]}
    if case.columns:
      content['texts'] = case.columns[i]
    if case.names:
      content['names'] = case.names
    if case.pixels is not None:
      x = case.pixels[i]
      content |= {'png': _png(x[0])} if len(x) == 1 else {'example': index[x.shape, x.tobytes()], 'texts': {}}
    return content

  with _page(folder) as page:
    return [page.evaluate(_IN_PAGE, [case.does, [body(case, i) for i in range(len(case.expected))]]) for case in given]


@contextlib.contextmanager
def _page(folder: pathlib.Path) -> Iterator[Any]:
  from playwright.sync_api import sync_playwright
  quiet = type('Quiet', (http.server.SimpleHTTPRequestHandler,), {'log_message': lambda *_: None})
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(quiet, directory=str(folder)))
  threading.Thread(target=server.serve_forever, daemon=True).start()
  with sync_playwright() as p, p.chromium.launch(
      executable_path=shutil.which('chromium'), args=['--no-sandbox', '--disable-gpu']) as chromium:
    page = chromium.new_page()
    page.goto(f'http://127.0.0.1:{server.server_address[1]}/index.html')
    yield page
  server.shutdown()
  server.server_close()


_BY: dict[str, Callable[[pathlib.Path, list[Case]], list[Answers]]] = {
    'service': by_service, 'onnx': by_onnx, 'browser': by_browser}


def main() -> int:
  folder, wrong = pathlib.Path(_MODEL.value).absolute(), 0
  run, predictor, params = saved_run.load(workdir_lib.load_config(_WORKDIR.value), _WORKDIR.value)
  entries, eot = json.loads((folder / 'manifest.json').read_text())['tasks'], run.data.tokenizer.eot
  given = [case for case in cases(run, predictor, params, _NUM_EXAMPLES.value, entries)
           if not _TASKS.value or case.task in _TASKS.value]
  for name in _FORMATS.value:
    for case, answers in zip(given, _BY[name](folder, given), strict=True):
      if case.does == 'caption':  # the page ends one where all hypotheses have ended
        answers = [row + [eot] * (len(case.expected[0]) - len(row)) for row in answers]
      pairs = list(zip(answers, case.expected, strict=True))
      equal = sum(a == b for a, b in pairs)
      wrong += len(pairs) - equal
      print(f'{name}: {case.task}: {equal} of {len(pairs)} equal, {len(set(map(str, case.expected)))} distinct',
            flush=True)
  return int(bool(wrong))


if __name__ == '__main__':
  cli.run(main)
