"""The HTTP interface: request bodies, routes, errors as one sentence, and the OpenAPI description without a network."""

import base64
import binascii
import hashlib
import html
import json
import pathlib
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

import fastapi
import pydantic
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from uni_moe_jax import __version__
from uni_moe_jax.serve import service as service_lib
from uni_moe_jax.serve.gallery import Gallery, is_searcher
from uni_moe_jax.serve.guard import Metrics, refusal
from uni_moe_jax.serve.limits import Limits, Refused
from uni_moe_jax.serve.service import Service
from uni_moe_jax.serve.supervisor import Supervisor
from uni_moe_jax.serve.worker import Item, media_of

PAGE = pathlib.Path(__file__).with_name('page.html')
_MAX_TOP = 100
_Texts = Annotated[list[str], pydantic.FailFast()]  # an error for each of a million entries would fill the memory
_SUMMARY = 'Requests and responses are JSON. Errors are {"error": "one sentence"}.'


class _Body(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra='forbid', strict=True)
  task: str = pydantic.Field(description='Name of a task; see GET /model.')


class Input(_Body):
  """Input of a task: exactly one of image, video and example, unless the task reads only text."""
  image: str = pydantic.Field('', description='Base64 of a PNG, JPEG, WebP, GIF or BMP file.')
  video: str = pydantic.Field('', description='Base64 of an mp4, webm or gif file.')
  example: int | None = pydantic.Field(None, ge=0, description="Index of one of the model's examples; see GET /model.")
  texts: dict[str, str] = pydantic.Field({}, description="Text for each column of the task's template.")
  top: int = pydantic.Field(5, ge=1, le=_MAX_TOP, description='Number of answers.')

  def item(self, limits: Limits) -> Item:
    """Raises Refused."""
    if sum([bool(self.image), bool(self.video), self.example is not None]) > 1:
      raise Refused(422, 'Give one of image, video and example, not several.')
    return Item(
        image=_decoded(self.image, 'image'), video=_decoded(self.video, 'video'),
        example=-1 if self.example is None else self.example, top=self.top,
        texts={column: limits.check_text(text, f'texts.{column[:60]!r}') for column, text in self.texts.items()})


class Classify(Input):
  """An input, and names instead of the task's target set."""
  names: _Texts = pydantic.Field([], description="Possible answers; default: the entries of the task's target set.")


class Caption(Input):
  """An image or video."""
  stream: bool = pydantic.Field(False, description='Server-sent events: words from greedy search while the caption '
                                                   'is computed, then the caption.')


class Search(Input):
  """A text, or an image or video with the texts to rank."""
  text: str = pydantic.Field('', description='Text to rank the gallery by.')
  names: _Texts = pydantic.Field([], description='Texts to rank by similarity to an image or video.')
  candidates: str = pydantic.Field('', description="Instead of names: a target set or 'gallery' (see GET /model), "
                                                'without texts that are too long for the task.')


class Fill(_Body):
  """A text with masks."""
  text: str = pydantic.Field(description=f'Text in which every {service_lib.MASK} stands for one token.')
  top: int = pydantic.Field(5, ge=1, le=_MAX_TOP, description='Number of answers.')


class Embed(Input):
  """An input, or names."""
  names: _Texts = pydantic.Field([], description='Texts instead of an input.')


def create(supervisor: Supervisor, service: Service, gallery: Gallery, limits: Limits, metrics: Metrics) -> Any:
  """Returns the FastAPI application."""
  app = fastapi.FastAPI(title='uni_moe_jax', version=__version__, description=_SUMMARY, docs_url=None, redoc_url=None)
  facts, page = supervisor.facts, PAGE.read_text()

  @app.exception_handler(Refused)
  async def refused(_, error: Refused) -> Response:
    return refusal(error)

  @app.exception_handler(RequestValidationError)
  async def invalid(_, error: RequestValidationError) -> Response:
    return refusal(Refused(422, sentence(error.errors()[0])))

  @app.exception_handler(HTTPException)
  async def http_error(request: fastapi.Request, error: HTTPException) -> Response:
    known = {404: f'{request.method} {request.url.path[:60]!r} does not exist; GET /docs lists the endpoints.',
             405: f'{request.method} is not allowed for {request.url.path[:60]!r}; GET /docs lists the methods.',
             400: 'The body is not JSON; send an object as described in GET /docs.'}
    return refusal(Refused(error.status_code, known.get(error.status_code, f'{error.detail}.')), error.headers)

  @app.get('/', include_in_schema=False)
  async def index() -> Response:
    return HTMLResponse(page, headers={'Content-Security-Policy': policy(page)})

  @app.get('/docs', include_in_schema=False)
  async def docs() -> Response:
    text = _documentation(app.openapi())
    return HTMLResponse(text, headers={'Content-Security-Policy': policy(text)})

  @app.get('/healthz', summary='Whether the service is ready: 200 or 503')
  async def healthz() -> dict[str, str]:
    if not supervisor.ready:
      raise Refused(503, 'The worker is starting; wait a few seconds.')
    return {'status': 'ready'}

  @app.get('/metrics', summary='Metrics for Prometheus')
  async def prometheus() -> Response:
    metrics.restarts.set(supervisor.restarts)
    return Response(metrics.text(), media_type='text/plain; version=0.0.4')

  @app.get('/model', summary='Tasks, sets, examples and gallery of the model')
  async def model() -> dict[str, Any]:
    return {'ready': supervisor.ready, **describe(facts, service, gallery, limits)}

  @app.get('/examples/{index}', summary='PNG of an example')
  async def example(index: int) -> Response:
    if not 0 <= index < len(facts.examples):
      raise Refused(404, f'There is no example {index}; GET /model lists the examples.')
    return Response(facts.examples[index]['png'], media_type='image/png')

  @app.get('/gallery/{index}', summary='PNG of a gallery item')
  async def gallery_item(index: int) -> Response:
    if not (item := gallery.item(index)):
      raise Refused(404, f'The gallery has no item {index}, or it is not encoded yet.')
    return Response(item.png, media_type='image/png')

  @app.post('/classify', summary='Most likely entries of a target set, or of names, for an image, video or text')
  async def classify(body: Classify) -> dict[str, Any]:
    names = limits.check_texts(body.names, 'names')
    return await service.classify(body.task, body.item(limits), names)

  @app.post('/caption', summary='Caption of an image or video, at once or word by word')
  async def caption(body: Caption) -> Any:
    if not body.stream:
      return await service.caption(body.task, body.item(limits))
    events = service.stream(body.task, body.item(limits))
    first = await anext(events)  # what is refused gets its own status
    return StreamingResponse(_server_sent(first, events), media_type='text/event-stream')

  @app.post('/search', summary='Search the gallery by text, or texts by image or video')
  async def search(body: Search) -> dict[str, Any]:
    item = body.item(limits)
    if bool(body.text) == bool(item.size or item.example >= 0):
      raise Refused(422, 'Give either text, or one of image, video and example.')
    text = limits.check_text(body.text, 'text') if body.text else ''
    names = limits.check_texts(body.names, 'names')
    return await service.search(body.task, item, text, names, body.candidates)

  @app.post('/fill', summary='Most likely words for every mask')
  async def fill(body: Fill) -> dict[str, Any]:
    return await service.fill(body.task, Item(text=limits.check_text(body.text, 'text'), top=body.top))

  @app.post('/embed', summary='Normalized features of an input or of texts')
  async def embed(body: Embed) -> dict[str, Any]:
    item = body.item(limits)
    has_input = bool(item.size or item.example >= 0 or item.texts)
    if has_input == bool(body.names):
      raise Refused(422, 'Give either names, or one of image, video, example and texts.')
    return await service.embed(body.task, item if has_input else None, limits.check_texts(body.names, 'names'))

  return app


def describe(facts: Any, service: Service, gallery: Gallery, limits: Limits) -> dict[str, Any]:
  """The answer of GET /model."""
  manifest = facts.manifest
  model, trained = manifest['model'], manifest['trained']
  does = {'classify': service_lib.is_classifier, 'caption': service_lib.is_captioner, 'fill': service_lib.is_filler}
  return {
      'name': manifest['provenance']['name'], 'step': manifest['provenance'].get('step'),
      'parameters': model['parameters'], 'num_layers': model['num_layers'], 'width': model['width'],
      'image_size': model['image_size'], 'channels': model['channels'], 'dark': model['pixel_mean'][0] < 0.5,
      'router': trained['router'], 'num_experts': trained.get('num_experts', 0), 'moe_layers': trained['moe_layers'],
      'tasks': {name: {
          'type': task['type'], 'does': [d for d, fits in does.items() if fits(task)] + ['search'] * is_searcher(task),
          'input': media_of(task), 'num_frames': task['num_frames'], 'columns': service_lib.columns_of(task),
          'template': task['template'], 'example_text': facts.texts.get(name, ''), 'target_set': task['target_set'],
          'takes_names': 'encode_text' in task['programs'],
          'conditions': task['conditions']} for name, task in manifest['tasks'].items()},
      'target_sets': {name: {'size': s['size'], 'texts': s['texts'][:limits.max_names], 'condition': s['condition']}
                      for name, s in manifest['target_sets'].items()},
      'examples': [{'index': i, **{k: e[k] for k in ('task', 'num_frames', 'answer')}}
                   for i, e in enumerate(facts.examples)],
      'gallery': {'size': gallery.size, 'searchers': gallery.searchers(), 'candidates': service.candidates(),
                  'items': [{'index': g.index, 'name': g.name, 'tasks': list(g.features)} for g in gallery.items]},
      'mixtures': manifest['mixtures'], 'limits': {f: getattr(limits, f) for f in limits.__dataclass_fields__}}


def policy(page: str) -> str:
  """Content-Security-Policy of a page: its own inline style and script by their hashes, and nothing of other hosts."""
  hashes = lambda tag: ' '.join(
      f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
      for text in re.findall(rf'<{tag}>(.*?)</{tag}>', page, re.DOTALL)) or "'none'"
  return (f"default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; media-src blob:; script-src "
          f"{hashes('script')}; style-src {hashes('style')}; frame-ancestors 'none'; base-uri 'none'; "
          "form-action 'none'")


def sentence(error: dict[str, Any]) -> str:
  """One sentence for an error of pydantic."""
  field = '.'.join(str(part)[:60] for part in error['loc'][1:])  # the first is 'body' or 'path'
  known = {'missing': 'is missing; add it', 'extra_forbidden': 'is unknown; GET /docs lists the fields',
           'json_invalid': 'is not JSON; send an object as described in GET /docs'}
  problem = known.get(error['type'], (error['msg'][:1].lower() + error['msg'][1:]).replace('input should', 'should'))
  name = f'Field {field!r}' if field and error['type'] != 'json_invalid' else 'The body'
  return f'{name} {problem}.'


async def _server_sent(first: tuple[str, Any], events: AsyncIterator[tuple[str, Any]]) -> AsyncIterator[str]:
  line = lambda event: f'event: {event[0]}\ndata: {json.dumps(event[1])}\n\n'
  try:
    yield line(first)
    async for event in events:
      yield line(event)
  except Refused as e:
    yield line(('error', {'error': e.message}))
  finally:
    await events.aclose()


def _decoded(text: str, field: str) -> bytes:
  try:
    return base64.b64decode(text, validate=True)
  except (binascii.Error, ValueError):
    raise Refused(422, f'{field} is not base64; encode the bytes of the file.') from None


def _documentation(schema: dict[str, Any]) -> str:
  """A page of the OpenAPI schema, without script: FastAPI's own loads scripts from another host."""
  style = ('body{font:16px/1.5 system-ui;max-width:52rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}'
           'pre{overflow:auto;padding:.75rem;border:1px solid #8886;border-radius:.5rem}')
  parts = []
  for path, methods in schema['paths'].items():
    for method, entry in methods.items():
      parts.append(f'<h2><code>{method.upper()} {path}</code></h2><p>{html.escape(entry["summary"])}</p>')
      if body := entry.get('requestBody'):
        name = body['content']['application/json']['schema']['$ref'].rpartition('/')[2]
        required = schema['components']['schemas'][name].get('required', [])
        parts += ['<dl>', *(
            f'<dt><code>{field}</code>{" (required)" if field in required else ""}</dt>'
            f'<dd>{html.escape(p.get("description", ""))}</dd>'
            for field, p in schema['components']['schemas'][name]['properties'].items()), '</dl>']
  return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width='
          f'device-width"><title>API</title><style>{style}</style></head><body><main><h1>Service API</h1>'
          f'<p>{html.escape(_SUMMARY)} The schema is <a href="openapi.json">openapi.json</a>.</p>{"".join(parts)}'
          '</main></body></html>')
