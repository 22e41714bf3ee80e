"""The page in Chromium: every panel answers, nothing is logged as an error, and axe finds no serious fault.

UNI_MOE_CHROMIUM names the browser; without it, and without one on PATH, these tests are skipped. UNI_MOE_SCREENSHOTS
names a folder for screenshots.
"""

import io
import json
import os
import pathlib
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image

from tests.helpers import served, tiny

_BROWSER = os.environ.get('UNI_MOE_CHROMIUM') or next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
_FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
          '--disable-component-update', '--disable-sync']
_SCREENS = {'desk': (1100, 850), 'phone': (360, 740)}
_PANELS = ('classify', 'caption', 'search', 'fill')

pytestmark = [pytest.mark.nightly, pytest.mark.skipif(
    not _BROWSER, reason='no Chromium on PATH; install it, or name one by UNI_MOE_CHROMIUM')]


@pytest.fixture(name='service', scope='module')
def _service():
  with served.running('--max_batch=1', '--timeout=30') as service:
    yield service


@pytest.fixture(name='browser', scope='module')
def _chromium():
  sync_api = pytest.importorskip('playwright.sync_api')
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=_BROWSER, args=_FLAGS)
    yield browser
    browser.close()


@pytest.fixture(name='open_page')
def _open_page(service, browser):
  """Opens the page, waits for its tabs, and checks at the end what the browser logged and loaded."""
  pages, errors, loaded = [], [], []

  def open_page(screen='desk', scheme='light', prepare=lambda page: None, selector='[role=tab]'):
    width, height = _SCREENS[screen]
    page = browser.new_page(viewport={'width': width, 'height': height}, color_scheme=scheme)
    page.on('console', lambda message: errors.append(message.text) if message.type in ('error', 'warning') else None)
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.on('request', lambda request: loaded.append(request.url))
    prepare(page)
    page.goto(f'http://127.0.0.1:{service.port}/')
    page.wait_for_selector(selector)
    pages.append(page)
    return page

  open_page.errors = errors
  yield open_page
  for page in pages:
    page.close()
  assert not errors
  own = (f'http://127.0.0.1:{service.port}/', f'blob:http://127.0.0.1:{service.port}/', 'data:')
  assert all(url.startswith(own) for url in loaded)


def _draw(page):
  box = page.locator('canvas').bounding_box()
  at = lambda x, y: (box['x'] + x * box['width'], box['y'] + y * box['height'])
  page.mouse.move(*at(0.2, 0.5))
  page.mouse.down()
  page.mouse.move(*at(0.8, 0.5), steps=4)
  page.mouse.up()


def _until(page, condition):
  """Waits until an expression of JavaScript is true; the page's policy forbids Playwright's own waiting."""
  end = time.monotonic() + 30
  while not page.evaluate(condition):
    assert time.monotonic() < end, condition
    page.wait_for_timeout(20)


def _names(page, count):
  """Names of the bars, as soon as there are so many."""
  _until(page, f"document.querySelectorAll('#live ol.bars li').length === {count}")
  _until(page, "document.querySelector('#answer').getAttribute('aria-busy') === 'false'")
  return page.locator('#live ol.bars .name').all_inner_texts()


def _show(page, panel):
  """Opens a panel and waits for its answer."""
  page.click(f'#tab-{panel}')
  if panel == 'classify':
    _draw(page)
    _names(page, 3)
  elif panel == 'caption':
    page.wait_for_selector('#caption:not(.draft)')
  elif panel == 'search':
    page.get_by_label('Text', exact=True).fill('red star')
    page.wait_for_selector('#live .grid img[src]')
  else:
    page.wait_for_selector('#live mark')
  page.wait_for_selector('#why .cells')


def test_a_drawing_is_classified_and_names_move_the_bars(open_page, service):
  page = open_page()
  assert page.locator('#hint').inner_text().startswith('Draw something')
  _draw(page)
  assert sorted(_names(page, 3)) == sorted(tiny.CLASSES)
  page.get_by_label('Names, one per line').fill('red\ngreen disc')
  assert sorted(_names(page, 2)) == ['green disc', 'red']
  values = [float(text.removesuffix(' %')) for text in page.locator('#live .value').all_inner_texts()]
  assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(100, abs=1)
  assert page.locator('#spoken').inner_text().startswith(_names(page, 2)[0])
  stored = json.loads(service.request('GET', '/model')[1])
  [shown] = [code for code in page.locator('#why code').all_inner_texts() if code.startswith('10011000')]
  assert any(condition.startswith(shown) for condition in stored['mixtures'])
  page.click('text=Clear')
  _until(page, "document.querySelector('#hint').textContent.startsWith('Draw something')")


def test_a_drawing_is_sent_centered_and_half_as_large_as_the_image(open_page):
  page = open_page()
  _draw(page)  # a line of 0.6 of the width
  png = bytes(page.evaluate('async () => [...new Uint8Array(await (await drawn()).arrayBuffer())]'))
  ink = np.asarray(Image.open(io.BytesIO(png)).convert('L')) > 127
  ink = ink if ink.mean() < 0.5 else ~ink
  rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
  np.testing.assert_allclose([columns[0], columns[-1], rows[0], rows[-1]], [64, 191, 120, 135], atol=2)


def test_a_page_that_is_opened_while_the_model_starts_shows_that_and_answers_later(open_page):
  compiled = threading.Event()

  def starting(page):
    page.route('**/model', lambda route: route.fulfill(json={**route.fetch().json(), 'ready': False}))
    page.route('**/classify', lambda route: route.continue_() if compiled.is_set() else route.fulfill(
        status=503, json={'error': 'No answer within 10 s.'}))
  page = open_page(prepare=starting)
  _draw(page)
  _until(page, "document.querySelector('#hint').textContent.startsWith('The model is starting')")
  page.wait_for_timeout(700)
  assert page.locator('#error').is_hidden()
  compiled.set()
  assert sorted(_names(page, 3)) == sorted(tiny.CLASSES)
  assert page.locator('#hint').inner_text() == '' and all('503' in error for error in open_page.errors)
  open_page.errors.clear()


def test_a_page_that_is_opened_before_the_gallery_is_encoded_knows_its_texts_later(open_page):
  answers = iter([{'items': [], 'candidates': []}] * 2)

  def encoding(page):
    def answer(route):
      model = route.fetch().json()
      route.fulfill(json={**model, 'gallery': {**model['gallery'], **next(answers, {})}})
    page.route('**/model', answer)
  page = open_page(prepare=encoding)
  _until(page, "model.gallery.candidates.includes('gallery')")
  assert not list(answers) and page.evaluate('model.ready === true')


def test_files_and_examples_are_classified(open_page, tmp_path):
  page = open_page()
  Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(tmp_path / 'line.png')
  page.click('text=File')
  page.set_input_files('#file', tmp_path / 'line.png')
  page.wait_for_selector('#preview img')
  first = dict(zip(_names(page, 3), page.locator('#live .value').all_inner_texts()))
  with page.expect_response('**/classify'):
    page.get_by_label('Invert colors').check()
  page.click('text=Examples')
  page.get_by_role('button', name='Example 2').click()
  _until(page, "document.querySelector('.examples [aria-pressed=true]').ariaLabel.startsWith('Example 2:')")
  assert sorted(_names(page, 3)) == sorted(first)
  page.get_by_label('Task').select_option(label='motion (video)')
  assert sorted(_names(page, 2)) == sorted(tiny.MOTIONS)
  assert page.locator('#input-title').inner_text() == 'Video' and page.locator('[data-source=draw]').is_hidden()
  page.get_by_label('Task').select_option(label='package (text)')
  assert page.locator('#input').is_hidden() and sorted(_names(page, 2)) == sorted(tiny.PACKAGES)
  page.get_by_label('Task').select_option(label='question (image)')
  assert page.get_by_label('Name', exact=True).input_value()  # the text of the first example
  assert sorted(_names(page, 3)) == sorted(tiny.CLASSES)


def test_a_caption_streams_and_ends_as_the_service_answers(open_page, service):
  page = open_page()
  page.click('#tab-caption')
  page.click('text=Examples')
  page.wait_for_selector('#caption:not(.draft)')
  chosen = page.evaluate('given.example')
  assert page.locator('#caption').inner_text().split() == (
      service.post('/caption', task='caption', example=chosen)['text'].split())


def test_the_gallery_is_searched_by_text_and_texts_by_an_image(open_page):
  page = open_page()
  _show(page, 'search')
  assert page.locator('#live .grid li').count() == 3
  assert page.evaluate('task') == 'pair'  # shape can search, too, but there is a task for it
  page.get_by_label('Find').select_option(label='texts by image')
  page.click('text=Examples')
  assert sorted(_names(page, 3)) == sorted(tiny.CLASSES)
  page.get_by_label('Among').select_option(label='motions')
  assert sorted(_names(page, 2)) == sorted(tiny.MOTIONS)
  page.get_by_label('Among').select_option(label='my own texts')
  page.get_by_label('Texts, one per line').fill('red star\ngreen\nblue')
  assert sorted(_names(page, 3)) == ['blue', 'green', 'red star']


def test_masks_are_filled_and_classes_of_a_drawing_come_in_their_place(open_page):
  page = open_page()
  _draw(page)
  _names(page, 3)
  page.click('#tab-fill')
  page.get_by_label('Text', exact=True).fill('a [mask] shape')
  _until(page, "document.querySelectorAll('#live mark').length === 1")
  assert len(_names(page, 5)) == 5
  page.click('text=Insert a mask')
  _until(page, "document.querySelectorAll('#live mark').length === 2")
  page.click('#tab-classify')
  assert sorted(_names(page, 3)) == sorted(tiny.CLASSES)


def test_what_the_service_refuses_is_shown_in_its_words(open_page, tmp_path):
  page = open_page()
  (tmp_path / 'broken.png').write_bytes(b'no image')
  page.click('text=File')
  page.set_input_files('#file', tmp_path / 'broken.png')
  page.wait_for_selector('#error:visible')
  assert 'The image is not a readable file; send one of PNG' in page.get_by_role('alert').inner_text()
  assert page.locator('#live').inner_text() == ''
  assert all('422' in error for error in open_page.errors)  # the browser logs the status
  open_page.errors.clear()
  page.click('text=Draw')
  _draw(page)
  _names(page, 3)
  assert page.locator('#error').is_hidden()


def test_a_service_that_has_ended_is_reported(open_page):
  page = open_page()
  page.route('**/classify', lambda route: route.abort())
  _draw(page)
  page.wait_for_selector('#error:visible')
  assert 'The service is not responding' in page.get_by_role('alert').inner_text()
  open_page.errors.clear()


@pytest.mark.parametrize('end', ['', 'network error'])
def test_a_caption_that_is_cut_off_is_reported(open_page, end):
  page = open_page()
  page.evaluate("""end => {
    const real = fetch, words = new TextEncoder().encode('event: words\\ndata: {"text": "red"}\\n\\n');
    const stop = c => end ? c.error(new TypeError(end)) : c.close();
    globalThis.fetch = async (path, ...rest) => path !== 'caption' ? real(path, ...rest) : new Response(
      new ReadableStream({start(c) { c.enqueue(words); setTimeout(stop, 200, c); }}));
  }""", end)
  page.click('#tab-caption')
  page.get_by_role('button', name='Examples').click()
  page.wait_for_selector('#caption.draft')
  page.wait_for_selector('#error:visible')
  assert 'The service is not responding' in page.get_by_role('alert').inner_text()
  assert page.locator('#live').inner_text() == ''


def test_a_token_of_any_characters_is_sent_and_may_be_wrong(open_page, service):
  sent = []

  def protect(page):
    def answer(route):
      sent.append(route.request.headers.get('authorization', ''))
      route.continue_() if sent[-1] == 'Bearer schlüssel€' else route.fulfill(status=401, body='{"error": "wrong"}')
    page.route('**/model', answer)
  page = open_page(prepare=protect, selector='#token:visible')
  page.get_by_label('Token').fill('••••')  # pasted from a field that hides it
  page.keyboard.press('Enter')
  _until(page, "document.querySelector('#fatal').textContent === 'The token is wrong.'")
  page.reload()
  page.wait_for_selector('#token:visible')
  page.get_by_label('Token').fill('schlüssel€')
  page.keyboard.press('Enter')
  page.wait_for_selector('[role=tab]')
  assert sent == ['', 'Bearer ••••', 'Bearer ••••', 'Bearer schlüssel€']
  assert all('401' in error for error in open_page.errors)
  open_page.errors.clear()


_GIVE = """([type, field, text, image]) => {
  const data = new DataTransfer(), target = field ? document.querySelector('textarea') : document.body;
  if (text) data.items.add('cat', 'text/plain');
  if (image) data.items.add(new File([Uint8Array.from(image)], 'table.png', {type: 'image/png'}));
  const options = {bubbles: true, cancelable: true};
  const event = type === 'paste' ? new ClipboardEvent(type, {...options, clipboardData: data})
    : new DragEvent(type, {...options, dataTransfer: data});
  target.dispatchEvent(event);
  return [given.source, event.defaultPrevented];
}"""


def test_pasted_text_stays_text_also_if_an_image_of_it_comes_along(open_page):
  page = open_page()
  page.get_by_role('button', name='Examples').click()
  _names(page, 3)
  Image.fromarray(np.zeros((16, 16), np.uint8)).save(image := io.BytesIO(), 'PNG')
  image = list(image.getvalue())
  assert page.evaluate(_GIVE, ['paste', True, True, image])[0] == 'example'  # cells of a spreadsheet
  assert page.evaluate(_GIVE, ['drop', True, True, None]) == ['example', False]  # the field takes the text
  assert page.evaluate(_GIVE, ['paste', True, False, image])[0] == 'file'
  page.get_by_role('button', name='Examples').click()
  assert page.evaluate(_GIVE, ['paste', False, True, image])[0] == 'file'
  page.get_by_role('button', name='Examples').click()
  assert page.evaluate(_GIVE, ['drop', True, False, image]) == ['file', True]
  _names(page, 3)


def test_everything_can_be_reached_by_the_keyboard(open_page):
  page = open_page()
  focused = lambda: page.evaluate("document.activeElement.id || document.activeElement.textContent")
  page.keyboard.press('Tab')
  assert focused() == 'tab-classify'
  page.keyboard.press('ArrowRight')
  assert focused() == 'tab-caption' and page.locator('#tab-caption').get_attribute('aria-selected') == 'true'
  page.keyboard.press('ArrowLeft')
  stops = []
  for _ in range(12):
    page.keyboard.press('Tab')
    stops.append(focused())
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == 'solid'
    if stops[-1] == 'docs':
      break
  assert {'Draw', 'File', 'Examples', 'undo', 'clear', 'docs'} <= set(stops)


@pytest.mark.parametrize('screen, scheme', [('desk', 'light'), ('desk', 'dark'), ('phone', 'light'), ('phone', 'dark')])
def test_no_panel_has_a_serious_fault_of_accessibility_or_overflows(open_page, screen, scheme):
  from axe_playwright_python.base import AXE_SCRIPT
  page = open_page(screen, scheme)
  page.evaluate(AXE_SCRIPT)
  for panel in _PANELS:
    _show(page, panel)
    faults = [(fault['id'], fault['nodes'][0]['html']) for fault in page.evaluate('axe.run()')['violations']
              if fault['impact'] in ('serious', 'critical')]
    assert not faults, panel
    assert page.evaluate('document.scrollingElement.scrollWidth <= innerWidth'), panel
    if folder := os.environ.get('UNI_MOE_SCREENSHOTS'):
      page.screenshot(path=pathlib.Path(folder) / f'{panel}_{screen}_{scheme}.png', full_page=True)
