"""What the service answers, by programs of the exported folder: classes, captions, rankings, masked words, features."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.serve.batching import Batcher
from uni_moe_jax.serve.gallery import Gallery, is_searcher
from uni_moe_jax.serve.limits import Limits, Refused
from uni_moe_jax.serve.supervisor import Supervisor
from uni_moe_jax.serve.worker import MAX_MASKS, STREAM, Item, media_of, text_length
from uni_moe_jax.utils.suggest import nearest

MASK = '[mask]'
GALLERY_TEXTS = 'gallery'  # candidates: the texts of the gallery, beside the target sets
_CACHED_TEXTS = 20_000  # features of texts
_MAX_SET = 2000  # entries of a target set that can be candidates of a search
_MEDIA = {'image': 'an image', 'video': 'a video', 'text': 'text alone'}

Answer = dict[str, Any]


class Service:
  """Answers by the tasks of a model. All methods raise Refused."""

  def __init__(self, supervisor: Supervisor, batcher: Batcher, gallery: Gallery, limits: Limits):
    self._facts, self._batcher, self._limits = supervisor.facts, batcher, limits
    self._manifest = self._facts.manifest
    self._features: dict[tuple[str, int, str], np.ndarray] = {}  # of texts
    self.gallery = gallery

  @property
  def tasks(self) -> dict[str, dict[str, Any]]:
    """Tasks by name, as in the manifest."""
    return self._manifest['tasks']

  def task(self, name: str, fits, what: str) -> dict[str, Any]:
    """The entry of a task that fits. Raises Refused naming those that do."""
    known = [t for t, entry in self.tasks.items() if fits(entry)]
    if name not in known:
      problem = f'does not {what}' if name in self.tasks else 'is unknown'
      raise Refused(422, f'Task {name[:60]!r} {problem}; {nearest(name[:60], known)}.')
    return self.tasks[name]

  async def classify(self, task: str, item: Item, names: Sequence[str]) -> Answer:
    """Most likely entries of a task's target set, or of names."""
    entry = self.task(task, is_classifier, 'classify')
    self._check_inputs(task, entry, item)
    if not names:
      if entry['target'] == 'pair':
        raise Refused(422, f'Task {task!r} compares inputs with texts and has no target set; give names.')
      [best] = (await self._batcher.submit(task, 'classify', item))['best']
      return self._answer(task, best, self._manifest['target_sets'][entry['target_set']]['condition'])
    self.task(task, lambda t: 'encode_text' in t['programs'], 'encode names: its answers are fixed')
    output, texts = await asyncio.gather(self._batcher.submit(task, 'encode', item), self.texts(task, names))
    logits = self._facts.scales[task] * (texts @ output['features'])
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind='stable')[:item.top].tolist()
    return self._answer(task, [(names[i], float(p[i])) for i in order], entry['text_condition'])

  async def caption(self, task: str, item: Item) -> Answer:
    """The caption of an image or video."""
    self._check_inputs(task, self.task(task, is_captioner, 'caption'), item)
    return self._captioned(task, await self._batcher.submit(task, 'caption', item))

  async def stream(self, task: str, item: Item) -> AsyncIterator[tuple[str, Answer]]:
    """Yields ('words', …) of the greedy caption as it grows, then ('caption', …), which equals that of `caption`."""
    self._check_inputs(task, self.task(task, is_captioner, 'caption'), item)
    parts: asyncio.Queue[str | None] = asyncio.Queue()
    answer = asyncio.ensure_future(self._batcher.submit(task, STREAM, item, parts.put_nowait))
    answer.add_done_callback(lambda _: parts.put_nowait(None))
    try:
      while (text := await parts.get()) is not None:
        yield 'words', {'text': text}
      yield 'caption', self._captioned(task, await answer)
    finally:
      answer.cancel()
      with contextlib.suppress(asyncio.CancelledError, Refused):
        await answer

  async def fill(self, task: str, item: Item) -> Answer:
    """The most likely words of every mask."""
    self.task(task, is_filler, 'fill masks')
    if not 1 <= (n := item.text.count(MASK)) <= MAX_MASKS:
      raise Refused(422, f'text has {MASK} {n} times, but 1 to {MAX_MASKS} are accepted; add or remove some.')
    best = (await self._batcher.submit(task, 'classify', item))['best']
    return {'task': task, 'masks': [_entries(words) for words in best], 'conditions': self._conditions(task, None)}

  async def embed(self, task: str, item: Item | None, texts: Sequence[str]) -> Answer:
    """Normalized features of an input, or of texts."""
    if item is None:
      entry = self.task(task, lambda t: 'encode_text' in t['programs'], 'encode texts')
      features = await self.texts(task, texts)
      return {'task': task, 'features': features.tolist(), 'conditions': [entry['text_condition']]}
    entry = self.task(task, lambda t: 'encode' in t['programs'] and t['readout'] != 'masked', 'encode inputs')
    self._check_inputs(task, entry, item)
    output = await self._batcher.submit(task, 'encode', item)
    return {'task': task, 'features': [output['features'].tolist()], 'conditions': self._conditions(task, None)}

  async def search(self, task: str, item: Item, text: str, names: Sequence[str], candidates: str) -> Answer:
    """Items of the gallery by text, or texts by image or video: most similar first."""
    entry, top = self.task(task, is_searcher, 'search'), item.top
    if text:
      gallery = [g for g in self.gallery.items if task in g.features]
      if not gallery:
        raise Refused(422, f'Task {task!r} searches {media_of(entry)}s, but the gallery has none; choose another task.')
      [query] = await self.texts(task, [text])
      scores = np.stack([g.features[task] for g in gallery]) @ query
      results = [{'gallery': gallery[i].index, 'name': gallery[i].name, 'score': float(scores[i])}
               for i in np.argsort(-scores, kind='stable')[:top].tolist()]
      return {'task': task, 'results': results, 'conditions': self._conditions(task, entry['text_condition'])}
    self._check_inputs(task, entry, item)
    ranked = list(names) or self._candidates(candidates)
    output, encoded = await asyncio.gather(self._batcher.submit(task, 'encode', item), self._encoded(task, ranked))
    if not names:  # of the model or gallery: who searches cannot shorten those that are too long for this task
      ranked = [t for t in ranked if not (isinstance(encoded[t], Refused) and encoded[t].status == 422)] or ranked
    scores = _stacked([encoded[t] for t in ranked]) @ output['features']
    results = [{'text': ranked[i], 'score': float(scores[i])}
               for i in np.argsort(-scores, kind='stable')[:top].tolist()]
    return {'task': task, 'results': results, 'conditions': self._conditions(task, entry['text_condition'])}

  def candidates(self) -> list[str]:
    """Names of lists of texts that a search by image can rank: target sets, the largest first, and the gallery."""
    sizes = {name: len(s['texts']) for name, s in self._manifest['target_sets'].items()}
    sets = sorted((name for name, size in sizes.items() if 0 < size <= _MAX_SET), key=sizes.get, reverse=True)
    return sets + [GALLERY_TEXTS] * any(g.text for g in self.gallery.items)

  async def texts(self, task: str, texts: Sequence[str]) -> np.ndarray:
    """Normalized features [n, D] of texts as answers of a task."""
    encoded = await self._encoded(task, texts)
    return _stacked([encoded[text] for text in texts])

  async def _encoded(self, task: str, texts: Sequence[str]) -> dict[str, np.ndarray | BaseException]:
    """The features of every text, or why it has none; each is encoded once."""
    entry = self.tasks[task]
    condition = entry['text_condition'], text_length(self._manifest, task)
    keys = {text: (*condition, text) for text in texts}
    encoded = {text: self._features[key] for text, key in keys.items() if key in self._features}
    missing = [text for text in keys if text not in encoded]
    made = await asyncio.gather(
        *(self._batcher.submit(task, 'encode_text', Item(text=text)) for text in missing), return_exceptions=True)
    for text, output in zip(missing, made):
      encoded[text] = output
      if not isinstance(output, BaseException):
        encoded[text] = self._features[keys[text]] = output['features']
    if len(self._features) > _CACHED_TEXTS:
      self._features.clear()  # they are encoded again
    return encoded

  def _candidates(self, name: str) -> list[str]:
    if name not in (known := self.candidates()):
      raise Refused(
          422, f'candidates={name[:60]!r} is not a list of texts; {nearest(name[:60], known)}. Or give names.')
    return (list(dict.fromkeys(g.text for g in self.gallery.items if g.text)) if name == GALLERY_TEXTS
            else self._manifest['target_sets'][name]['texts'])

  def _check_inputs(self, task: str, entry: dict[str, Any], item: Item) -> None:
    """Checks that an item has exactly what a task reads."""
    has_media, frames, media = bool(item.size or item.example >= 0), entry['num_frames'], media_of(entry)
    if bool(frames) != has_media:
      raise Refused(422, f'Task {task!r} reads {_MEDIA[media]}; '
                         + (f'give {media} or example.' if frames else 'remove image, video and example.'))
    if item.example >= 0:
      examples = self._facts.examples
      fitting = [i for i, e in enumerate(examples) if e['num_frames'] == frames]
      if item.example not in fitting:
        raise Refused(422, f'example={item.example} is not {_MEDIA[media]} of this model; '
                           + (f'give one of {", ".join(map(str, fitting))}.' if fitting else
                              'it has none, so send a file.'))
    elif item.size and bool(item.video) != (media == 'video'):
      raise Refused(422, f'Task {task!r} reads {_MEDIA[media]}; give the file as {media}.')
    columns = columns_of(entry)
    if wrong := sorted(set(columns) ^ set(item.texts)):
      raise Refused(422, f'texts has {"no" if wrong[0] in columns else "an unknown"} entry {wrong[0][:60]!r}; task '
                         f'{task!r} reads: {", ".join(columns) or "no texts"}.')

  def _captioned(self, task: str, output: Answer) -> Answer:
    return {'task': task, **output, 'conditions': self._conditions(task, None)}

  def _answer(self, task: str, best: Sequence[tuple[str, float]], condition: str | None) -> Answer:
    return {'task': task, 'answers': _entries(best), 'conditions': self._conditions(task, condition)}

  def _conditions(self, task: str, text_condition: str | None) -> list[str]:
    """Conditions that computed an answer: of the inputs, then of the texts."""
    return [*self.tasks[task]['input_conditions'], *([text_condition] if text_condition else [])]


def is_classifier(entry: dict[str, Any]) -> bool:
  """Whether a task has classes, or compares with texts."""
  return 'encode' in entry['programs'] and entry['readout'] in ('cls', 'slot')


def is_captioner(entry: dict[str, Any]) -> bool:
  """Whether a task captions."""
  return 'caption' in entry['programs']


def is_filler(entry: dict[str, Any]) -> bool:
  """Whether a task fills masks."""
  return entry['readout'] == 'masked'


def _stacked(features: Sequence[np.ndarray | BaseException]) -> np.ndarray:
  """Features as one array. Raises the first reason why a text has none."""
  if error := next((f for f in features if isinstance(f, BaseException)), None):
    raise error
  return np.stack(features)


def columns_of(entry: dict[str, Any]) -> list[str]:
  """Columns of a task's template."""
  return [part[0] for part in entry['template_parts'] if isinstance(part, list)]


def _entries(best: Sequence[tuple[str, float]]) -> list[Answer]:
  return [{'text': text, 'probability': p} for text, p in best]
