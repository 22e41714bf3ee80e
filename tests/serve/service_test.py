"""The service answers like the exported programs, in batches and within its bounds, and outlives its worker."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.helpers import in_process, processes, served, tiny
from tests.stress import serve_bad_requests
from uni_moe_jax.export import loader, texts

_TOP = 100


@pytest.fixture(name='audit', scope='module')
def _audit(tmp_path_factory):
  """The folder in which the service logs the files that it opens."""
  return tmp_path_factory.mktemp('audit')


@pytest.fixture(name='service', scope='module')
def _service(audit):
  with served.running('--max_batch=4', '--max_names=20', '--max_characters=60', '--max_pixels=90000', '--max_queue=40',
                      '--batch_wait_ms=20', '--timeout=20', **serve_bad_requests.audit(audit)) as service:
    yield service


@pytest.fixture(name='model', scope='module')
def _model():
  return loader.Model(served.folder())


def _probabilities(answers):
  return {a['text']: a['probability'] for a in answers}


def _assert_close(answers, names, log_p):
  got = _probabilities(answers)
  assert sorted(got) == sorted(names)
  np.testing.assert_allclose([got[name] for name in names], np.exp(log_p), atol=1e-5)
  assert [a['probability'] for a in answers] == sorted(got.values(), reverse=True)


def test_classes_equal_those_of_the_program(service, model):
  pixels = served.images(1)
  log_p = model.run('shape', 'classify', pixels=pixels[:, None, ..., None])['log_p'][0]
  answer = service.post('/classify', task='shape', image=served.png(pixels[0]), top=_TOP)
  _assert_close(answer['answers'], tiny.CLASSES, log_p)
  task = model.manifest['tasks']['shape']
  assert answer['conditions'] == [*task['input_conditions'], model.manifest['target_sets']['shapes']['condition']]
  assert all(condition in model.manifest['mixtures'] for condition in answer['conditions'])


def test_names_of_a_request_are_answers_and_are_encoded_once(service, model):
  names, pixels = ['red', 'a green disc', 'moves over'], served.images(2)[1:]
  words = texts.Texts(model)
  tokens = words.tokens(names, model.manifest['target_sets']['shapes']['max_len'])
  features = model.run('shape', 'encode', pixels=pixels[:, None, ..., None])['features'][0]
  scale = np.exp(model.params[f'log_scale_{model.manifest["tasks"]["shape"]["temperature"]}'])
  logits = scale * np.asarray(model.run('shape', 'encode_text', **tokens)['features']) @ features
  body = dict(task='shape', image=served.png(pixels[0]), names=names, top=_TOP)
  _assert_close(service.post('/classify', **body)['answers'], names, logits - np.logaddexp.reduce(logits))
  encoded = 'unimoe_batch_size_sum{program="encode_text"}'
  before = service.metric(encoded)
  assert before >= len(names)
  service.post('/classify', **body | dict(names=names[::-1]))
  assert service.metric(encoded) == before
  service.post('/classify', **body | dict(names=['blue', *names]))
  assert service.metric(encoded) == before + 1


@pytest.mark.parametrize('task, inputs', [
    ('package', dict(texts={'text': 'a small shape moves over every line'})),
    ('question', dict(example=0, texts={'name': 'red disc'}))])
def test_texts_fill_the_template_of_a_task(service, model, task, inputs):
  filled = texts.Texts(model).fill(task, **inputs['texts'])
  pixels = {'pixels': loader.tensors(served.folder() / 'examples.safetensors')['shape/pixels'][:1]}
  log_p = model.run(task, 'classify', **filled, **(pixels if task == 'question' else {}))['log_p'][0]
  names = model.manifest['target_sets'][model.manifest['tasks'][task]['target_set']]['texts']
  _assert_close(service.post('/classify', task=task, **inputs, top=_TOP)['answers'], names, log_p)


def test_the_text_of_an_example_has_its_tokens(service, model):
  stored, pieces = json.loads(service.request('GET', '/model')[1])['tasks'], texts.Texts(model).tokenizer
  examples = loader.tensors(served.folder() / 'examples.safetensors')
  rows = {task: examples[f'{task}/text'][0].tolist() for task in ('package', 'question')}
  assert pieces.unk_id() in rows['question']  # its '?'
  markers = model.manifest['tokenizer']
  for task, row in rows.items():
    words = [i for i in row[:row.index(markers['eot'])] if i != markers['spe']]
    assert pieces.encode(stored[task]['example_text']) == words


def test_a_caption_equals_that_of_the_program_and_streams_its_words(service, model):
  pixels = served.images(4)
  tokens = np.asarray(model.run('caption', 'caption', pixels=pixels[:, None, ..., None])['tokens']).tolist()
  expected = [texts.Texts(model).text(row) for row in tokens]
  assert len(set(expected)) > 1  # otherwise equality would prove little
  for image, caption, row in zip(pixels, expected, tokens):
    body = dict(task='caption', image=served.png(image))
    answer = service.post('/caption', **body)
    assert answer['text'] == caption and answer['tokens'] == row
    status, content, headers = service.request('POST', '/caption', body | dict(stream=True))
    assert status == 200 and headers['content-type'].startswith('text/event-stream')
    events = [re.fullmatch(r'event: (\w+)\ndata: (.*)', event).groups()
              for event in content.decode().removesuffix('\n\n').split('\n\n')]
    assert [name for name, _ in events] == ['words'] * (len(events) - 1) + ['caption']
    words = [json.loads(data)['text'] for _, data in events]
    assert words[-1] == caption and all(later.startswith(earlier) for earlier, later in zip(words[:-1], words[1:-1]))
  assert len(events) > 2


def test_the_gallery_is_ranked_by_a_text_and_texts_by_an_image(service, model):
  stored = json.loads(service.request('GET', '/model')[1])
  assert [e['num_frames'] for e in stored['examples']].count(1) == 3
  pixels = loader.tensors(served.folder() / 'examples.safetensors')['shape/pixels']
  words = texts.Texts(model)
  image = np.asarray(model.run('pair', 'encode', pixels=pixels)['features'])
  text = np.asarray(model.run('pair', 'encode_text', **words.tokens(['red star'], 16))['features'])[0]
  results = service.post('/search', task='pair', text='red star', top=_TOP)['results']
  of = {item['index']: item['name'] for item in stored['gallery']['items'] if 'pair' in item['tasks']}
  scores = {r['name']: r['score'] for r in results}
  np.testing.assert_allclose([scores[of[i]] for i in sorted(of)], image @ text, atol=1e-5)
  assert [r['score'] for r in results] == sorted(scores.values(), reverse=True)
  status, content, headers = service.request('GET', f'/gallery/{results[0]["gallery"]}')
  assert status == 200 and content.startswith(b'\x89PNG') and headers['content-type'] == 'image/png'

  names = ['red star', 'every line']
  features = np.asarray(model.run('pair', 'encode_text', **words.tokens(names, 16))['features'])
  ranked = service.post('/search', task='pair', example=0, names=names, top=_TOP)['results']
  np.testing.assert_allclose(
      [{r['text']: r['score'] for r in ranked}[name] for name in names], features @ image[0], atol=1e-5)
  by_set = service.post('/search', task='pair', example=0, candidates='shapes', top=_TOP)['results']
  assert sorted(r['text'] for r in by_set) == sorted(tiny.CLASSES)


def test_every_mask_is_filled_by_the_most_likely_tokens(service, model):
  words = texts.Texts(model)
  masked = words.masked('a [mask] shape [mask] over', 16)
  log_p = np.asarray(model.run('text', 'classify', **masked)['log_p'])[0]
  answer = service.post('/fill', task='text', text='a [mask] shape [mask] over', top=3)
  assert len(answer['masks']) == 2
  for best, row in zip(answer['masks'], log_p):
    np.testing.assert_allclose([w['probability'] for w in best], np.sort(np.exp(row))[::-1][:3], atol=1e-5)
    assert best[0]['text'].removeprefix('##') == words.tokenizer.id_to_piece(int(row.argmax())).removeprefix('▁')


@pytest.mark.parametrize('before, after', [('a ', ''), ('', ' a')], ids=['last', 'first'])
def test_a_text_with_a_mask_is_read_as_a_whole_or_refused(service, model, before, after):
  length = model.manifest['tasks']['text']['max_len']
  assert model.manifest['model']['max_text_len'] == length  # no limit hides the other
  text = lambda number: before * number + '[mask]' + after * number
  longest = length // 2 - 1  # words of two tokens, beside the mask and the end
  tokens = texts.Texts(model).masked(text(longest), length + 1)
  assert tokens['text'].shape == (1, length)
  log_p = np.asarray(model.run('text', 'classify', **tokens)['log_p'])[0, 0]
  [best] = service.post('/fill', task='text', text=text(longest), top=3)['masks']
  np.testing.assert_allclose([w['probability'] for w in best], np.sort(np.exp(log_p))[::-1][:3], atol=1e-5)
  for number in (longest + 1, 20):
    status, content, _ = service.request('POST', '/fill', dict(task='text', text=text(number)))
    assert status == 422 and json.loads(content) == {
        'error': f'The text has {2 * number + 2} tokens, but the model reads at most {length}; shorten it.'}


def test_features_of_inputs_and_texts_are_normalized_and_equal_the_program(service, model):
  pixels = served.images(1)
  [features] = service.post('/embed', task='pair', image=served.png(pixels[0]))['features']
  np.testing.assert_allclose(
      features, model.run('pair', 'encode', pixels=pixels[:, None, ..., None])['features'][0], atol=1e-5)
  of_texts = service.post('/embed', task='pair', names=['red star', 'red star'])['features']
  assert of_texts[0] == of_texts[1] and np.linalg.norm(of_texts[0]) == pytest.approx(1, abs=1e-5)


def test_requests_of_many_connections_form_batches(service, model):
  deadline = time.monotonic() + served.START_TIMEOUT
  pixels = served.images(16)
  expected = np.asarray(model.run('shape', 'classify', pixels=pixels[:, None, ..., None])['log_p'])
  count, total = 'unimoe_batch_size_count{program="classify"}', 'unimoe_batch_size_sum{program="classify"}'
  while True:  # larger batches are compiled after the start
    before = service.metric(count), service.metric(total)
    with ThreadPoolExecutor(16) as threads:
      answers = list(threads.map(
          lambda image: service.post('/classify', task='shape', image=served.png(image), top=_TOP)['answers'], pixels))
    for answer, log_p in zip(answers, expected):
      _assert_close(answer, tiny.CLASSES, log_p)
    batches, requests = service.metric(count) - before[0], service.metric(total) - before[1]
    assert requests == 16
    if batches <= 8:
      break
    assert time.monotonic() < deadline
    time.sleep(0.5)


_IMAGE = served.png(np.zeros((4, 4), np.uint8))


@pytest.mark.parametrize('path, body, status, parts', [
    ('/classify', dict(task='shap', example=0), 422, ["'shap' is unknown", "did you mean 'shape'"]),
    ('/classify', dict(task='caption', example=0), 422, ["Task 'caption' does not classify"]),
    ('/classify', dict(task='pair', example=0), 422, ['give names']),
    ('/classify', dict(task='shape'), 422, ["Task 'shape' reads an image; give image or example"]),
    ('/classify', dict(task='shape', example=0, image=_IMAGE), 422, ['not several']),
    ('/classify', dict(task='shape', example=9999), 422, ['example=9999 is not an image of this model; give one of 0']),
    ('/classify', dict(task='shape', example=-1), 422, ["Field 'example' should be greater than or equal to 0"]),
    ('/classify', dict(task='motion', image=_IMAGE), 422, ['reads a video; give the file as video']),
    ('/classify', dict(task='motion', video=_IMAGE), 422, ['The video is not a readable file']),
    ('/classify', dict(task='shape', image='###'), 422, ['image is not base64']),
    ('/classify', dict(task='shape', image='QUJD'), 422, ['The image is not a readable file']),
    ('/classify', dict(task='shape', image=served.png(np.zeros((301, 300), np.uint8))), 422,
     ['300 × 301 pixels, but at most 90,000']),
    ('/classify', dict(task='shape', image=served.png(np.zeros((1, 90000), np.uint8))), 422, ['crop it']),
    ('/classify', dict(task='shape', example=0, names=['a'] * 21), 422, ['21 entries, but at most 20']),
    ('/classify', dict(task='shape', example=0, names=['a', ' ']), 422, ['names[1] is empty']),
    ('/classify', dict(task='shape', example=0, names=['b' * 61]), 422, ['names[0] has 61 characters, but at most 60']),
    ('/classify', dict(task='shape', example=0, names=['\ud800']), 422, ['half of a surrogate pair']),
    ('/classify', dict(task='shape', example=0, names='a'), 422, ["Field 'names' should be a valid list."]),
    ('/classify', dict(task='shape', example=0, texts={'a': 'b'}), 422, ["entry 'a'; task 'shape' reads: no texts"]),
    ('/classify', dict(task='package', texts={'\ud800': ' '}), 422, ["texts.'\\ud800' is empty"]),
    ('/classify', dict(task='package'), 422, ["texts has no entry 'text'; task 'package' reads: text."]),
    ('/classify', dict(task='shape', example=0, path='/etc/passwd'), 422, ["Field 'path' is unknown"]),
    ('/classify', dict(example=0), 422, ["Field 'task' is missing"]),
    ('/classify', [], 422, ['The body should be a valid dictionary']),
    ('/classify', b'{', 422, ['The body is not JSON']),
    ('/classify', b'\xff', 400, ['The body is not JSON']),
    ('/classify', b'[' * 5000, 400, ['The body is not JSON']),
    ('/caption', dict(task='shape', example=0, stream=True), 422, ["does not caption; choices: caption"]),
    ('/caption', dict(task='caption', image='QUJD', stream=True), 422, ['The image is not a readable file']),
    ('/search', dict(task='pair'), 422, ['Give either text']),
    ('/search', dict(task='pair', example=0, candidates='none'), 422, ["candidates='none' is not a list"]),
    ('/search', dict(task='package', text='a'), 422, ['does not search']),
    ('/fill', dict(task='text', text='no mask'), 422, ['text has [mask] 0 times']),
    ('/fill', dict(task='text', text='[mask]' * 9), 422, ['[mask] 9 times, but 1 to 8']),
    ('/embed', dict(task='pair'), 422, ['Give either names']),
    ('/none', {}, 404, ["POST '/none' does not exist"]),
])
def test_a_wrong_request_is_refused_in_one_sentence(service, path, body, status, parts):
  got, content, headers = service.request('POST', path, body)
  error = json.loads(content)
  assert got == status and list(error) == ['error'], content
  assert all(part in error['error'] for part in parts), error
  assert headers['content-type'] == 'application/json' and headers['x-content-type-options'] == 'nosniff'


@pytest.mark.parametrize('path', ['/examples/-1', '/examples/999', '/gallery/-1', '/gallery/999'])
def test_an_image_that_does_not_exist_is_not_found(service, path):
  assert service.request('GET', path)[0] == 404


@pytest.mark.parametrize('path, program, body, part', [
    ('/classify', 'classify', dict(task='shape'), b'"answers"'),
    ('/caption', 'stream', dict(task='caption', stream=True), b'event: words')])
def test_one_wrong_image_of_a_batch_fails_alone(service, path, program, body, part):
  bodies = [body | dict(image=served.png(served.images(4)[3])), body | dict(image='QUJD')] * 4
  count, deadline = f'unimoe_batch_size_count{{program="{program}"}}', time.monotonic() + served.START_TIMEOUT
  while True:
    before = service.metric(count)
    with ThreadPoolExecutor(8) as threads:
      answers = list(threads.map(lambda body: service.request('POST', path, body), bodies))
    assert [status for status, *_ in answers] == [200, 422] * 4
    assert all((part in content) == (status == 200) for status, content, _ in answers)
    if service.metric(count) - before <= 4:  # others shared a batch; larger ones are compiled after the start
      break
    assert time.monotonic() < deadline


def test_a_port_in_use_is_reported_at_once(service):
  done = processes.python('launch/serve.py', f'--model={served.folder()}', f'--port={service.port}')
  assert done.returncode == 2 and f'--port={service.port} cannot be used: Address already in use' in done.stderr


@pytest.mark.nightly
def test_random_wrong_requests_are_refused_and_open_no_file(service, audit):
  serve_bad_requests.arm(audit)
  worker = service.worker()
  counts = serve_bad_requests.check(service, 300)
  assert counts[422] > 50 and not counts[500] and service.worker() == worker
  # Batch sizes that are compiled in the background are read from, and written to, the folders of model and cache.
  caches = str(served.folder()), '/cache', os.environ['JAX_COMPILATION_CACHE_DIR']
  assert not serve_bad_requests.opened(audit, caches)
  assert not [line for line in service.output if 'Traceback' in line], service.output


def test_pages_load_nothing_from_elsewhere(service):
  for path in ('/', '/docs'):
    status, content, headers = service.request('GET', path)
    page = content.decode()
    assert status == 200 and not re.findall(r'(?:src|href|url\(|import)\W*(?:https?:)?//', page)
    policy = headers['content-security-policy']
    assert "default-src 'none'" in policy and 'unsafe' not in policy and 'http' not in policy
    assert not re.search(r'<[^>]* (?:style|on\w+)=', page)  # the policy would block them
  assert all(name in page for name in ('/classify', '/caption', '/search', '/fill', '/embed', '/healthz', '/metrics'))
  assert json.loads(service.request('GET', '/openapi.json')[1])['openapi'].startswith('3.')


def test_a_killed_worker_is_replaced_and_requests_are_answered_or_get_503(service):
  pid, results, stop = service.worker(), [], threading.Event()

  def send() -> None:
    while not stop.is_set():
      results.append(service.request('POST', '/classify', dict(task='shape', image=_IMAGE)))

  threads = [threading.Thread(target=send) for _ in range(4)]
  for thread in threads:
    thread.start()
  time.sleep(0.2)
  os.kill(pid, signal.SIGKILL)
  while service.metric('unimoe_worker_restarts') != 1:  # until the service has seen it
    time.sleep(0.05)
  service.wait_ready()
  stop.set()
  for thread in threads:
    thread.join()
  assert {status for status, _, _ in results} <= {200, 503}
  assert all('send the request again' in json.loads(c)['error'] for status, c, _ in results if status == 503)
  assert service.post('/classify', task='shape', image=_IMAGE)['answers'] and service.worker() != pid
  assert service.metric('unimoe_worker_restarts') == 1


def test_sigterm_ends_after_the_requests_that_run(service):
  with ThreadPoolExecutor(8) as threads:
    names = [f'{i}{j}' for i in range(4) for j in range(4)]
    running = [threads.submit(service.request, 'POST', '/classify', dict(task='shape', example=0, names=[
        f'{k} {name}' for name in names])) for k in range(8)]
    while service.metric('unimoe_active_requests') + sum(r.done() for r in running) < len(running):
      time.sleep(0.001)  # all are connected
    service.process.send_signal(signal.SIGTERM)
    statuses = [r.result()[0] for r in running]
  assert set(statuses) <= {200, 503} and 200 in statuses
  assert service.process.wait(30) == 0
  assert not [line for line in service.output if 'Traceback' in line], service.output


def test_the_front_never_imports_jax():
  done = subprocess.run(
      [sys.executable, '-c', 'import sys, uni_moe_jax.serve.server; print({"jax", "tensorflow"} & {*sys.modules})'],
      capture_output=True, text=True, check=True, cwd=processes.ROOT, env={**os.environ, 'PYTHONPATH': '.'})
  assert done.stdout == 'set()\n'


@pytest.mark.parametrize('flags, message', [
    ([], 'give either --model=FOLDER'), (['--model=a', '--workdir=b'], 'give either --model=FOLDER'),
    (['--model=tests'], 'tests is not a folder of uni-moe export'),
    (['--model=a', '--max_batch=6'], '--max_batch=6 is not a power of two'),
    (['--model=a', '--timeout=inf'], '--timeout=inf is not finite; give a number, such as 10.'),
    (['--model=a', '--max_seconds=nan'], '--max_seconds=nan is not finite; give a number, such as 60.'),
    (['--model=a', '--gallery=tests/serve'], 'has no file ending in any of .png'),
    (['--model=a', '--token_file=tests/nothing'], 'tests/nothing: No such file'),
    (['--model=a', '--host=300.0.0.1'], '--host=300.0.0.1 --port=8000 cannot be used')])
def test_wrong_flags_end_in_one_sentence(flags, message):
  done = in_process.python('launch/serve.py', *flags)
  assert done.returncode in (1, 2) and message in done.stderr and done.stderr.count('\n') == 1, done.stderr
