"""Baselines of a dataset: the predictors of `baselines` on bounded samples, computed once per dataset.

Samples are bounded by counts, so that the numbers do not depend on the machine: of images 10,000 training and 5,000
evaluated examples, of videos 1,000 each, of texts and of arrays 50,000 each, of arrays of frames 20,000 for training.
Results are files in data_dir/baselines, named by the content of both splits and everything else that they depend on.
Every process computes or reads them by itself.
"""

import dataclasses
import hashlib
import json
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.config.plan import Evaluation
from uni_moe_jax.data.examples import thumbnails
from uni_moe_jax.data.examples.examples import example_ids
from uni_moe_jax.data.examples.features import references
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.data.shards.record_format import CorruptExample, Record
from uni_moe_jax.data.text.vqa_answers import normalize_answer
from uni_moe_jax.eval import baselines
from uni_moe_jax.io import storage
from uni_moe_jax.utils import templates
from uni_moe_jax.utils.errors import UsageError

NEAREST = 'nearest neighbor'
FOLDER = 'baselines'  # in data_dir
_VERSION = 3  # of the results; raise it when a baseline changes
NUM_EXAMPLES = {'image': (10_000, 5_000), 'video': (1_000, 1_000), 'text': (50_000, 50_000),  # trained, evaluated
                'image array': (50_000, 50_000), 'video array': (20_000, 50_000)}
# Most classes of a logistic regression: its solver keeps twenty copies of features × classes.
_PIXEL_CLASSES, _TEXT_CLASSES = 1_000, 100


class _LeftOut(Exception):
  """Baselines that cannot be computed; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class DatasetBaselines:
  """The baselines of one evaluation."""
  evaluation: Evaluation
  trained: FileDataset  # the split that the task trains on
  evaluated: FileDataset
  keys: tuple[str, ...]  # the records' names of the entries of the task's target set
  data_dir: str
  num_examples: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=lambda: NUM_EXAMPLES)

  def classes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(training labels [N], rows [Q] of `ids` that baselines answer, {baseline: predicted labels [Q]}).

    Labels are indices into `keys`; a prediction that the target set lacks is the number of keys, never a label. Those
    of training are all where they are known without reading records, else those of the sample.
    """
    column = self.evaluation.task.label_column
    is_class = self.trained.columns[column] == 'class'
    index = {key if is_class else normalize_answer(key): i for i, key in enumerate(self.keys)}
    rows, result = self._predict(ids)
    labels = lambda names: np.array([index.get(name, len(self.keys)) for name in names], int)
    if column in self.trained.labels:
      known = self.trained.labels[column]
      train_labels = labels(self.trained.classes[column])[known[known >= 0]]
    else:
      train_labels = labels(result['trained'])
    train_labels = train_labels[train_labels < len(self.keys)]
    return train_labels, rows, {name: labels(names) for name, names in result['predicted'].items()}

  def answers(self, ids: np.ndarray) -> tuple[list[str], np.ndarray, dict[str, list[str]]]:
    """(training answers [N], rows [Q] of `ids` that baselines answer, {baseline: answers [Q]}), all normalized.

    A training answer is the most frequent one of a question in the sample; rare ones are left out.
    """
    rows, result = self._predict(ids)
    normalized = lambda names: [*map(normalize_answer, names)]
    return normalized(result['trained']), rows, {k: normalized(names) for k, names in result['predicted'].items()}

  def neighbor_texts(self, ids: np.ndarray) -> list[str] | None:
    """The first text of each example's nearest training image (of videos by their middle frames).

    None: there are more examples than the bound, or the baseline is left out.
    """
    task, (max_trained, max_evaluated) = self.evaluation.task, self.num_examples[self._inputs_are]
    if len(ids) > max_evaluated:
      print(f'{self.evaluation.name}: no baseline for more than {max_evaluated:,} {self._inputs_are}s; to get one, set '
            f'config.evaluators[{self.evaluation.name!r}].num_examples={max_evaluated}.', flush=True)
      return None

    def compute():
      trained, texts = self._sample(max_trained, lambda record: next(iter(references(task, record)), ''))
      neighbors = self._nearest(trained, self._inputs(ids))
      return {'texts': [texts[i] for i in neighbors]}
    return self._once('texts', ids, compute, {'texts': None})['texts']

  @property
  def _inputs_are(self) -> str:
    """What baselines see, a key of `NUM_EXAMPLES`; of questions about images or videos in files the text alone."""
    is_array = self.trained.columns.get(self.trained.media_column()) == 'array'
    if not self.evaluation.task.type.visual or self._question and not is_array:
      return 'text'
    return f'{self.trained.media_type} array' if is_array else self.trained.media_type

  @property
  def _question(self) -> list[str]:
    """Columns that the template of a task takes its text from."""
    return templates.columns(self.evaluation.task.template)

  def _predict(self, ids: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """(rows of `ids`, {'trained': names of the sample's classes [N], 'predicted': {baseline: names [Q]}})."""
    task, (max_trained, max_evaluated) = self.evaluation.task, self.num_examples[self._inputs_are]
    column, rows = task.label_column, baselines.subset(len(ids), max_evaluated)
    is_class = self.trained.columns[column] == 'class'

    def value(record):
      label = record[column]
      return label if is_class or not label else statistics.mode(map(normalize_answer, label))

    def compute():
      trained, names = self._sample(max_trained, value)
      names = np.array(names)
      if not is_class:  # answers are an open set, of which few are frequent
        kept = np.isin(names, baselines.most_frequent(names, _TEXT_CLASSES))
        trained, names = [x for x, keep in zip(trained, kept, strict=True) if keep], names[kept]
      predicted = {name: np.asarray(answers).tolist()
                   for name, answers in self._fitted(trained, names, self._inputs(ids[rows]))}
      return {'trained': names.tolist(), 'predicted': predicted}
    return rows, self._once('classes', ids[rows], compute, {'trained': [], 'predicted': {}})

  def _fitted(self, trained: list, names: np.ndarray, evaluated: list) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each baseline with its predictions; names: of the training inputs' classes."""
    if self._inputs_are == 'text':
      columns = [list(zip(*inputs, strict=True)) for inputs in (trained, evaluated)]
      if len(columns[0]) in (1, 2) and len(np.unique(names)) <= _TEXT_CLASSES:
        yield 'tf-idf', baselines.tfidf_logistic(columns[0], names, columns[1])
      return
    if self._question:
      (questions, pixels), (asked, seen) = (zip(*inputs, strict=True) for inputs in (trained, evaluated))
      pixels, seen = np.stack(pixels), np.stack(seen)
      for name, predict in (
          ('question alone', lambda a, b: baselines.majority_predictions(names[a], len(b))),
          (NEAREST, lambda a, b: names[a][self._nearest(pixels[a], seen[b])])):
        yield name, baselines.per_question(predict, np.array(questions), np.array(asked))
      return
    is_image = self.trained.media_type == 'image'
    if is_image:
      yield NEAREST, names[self._nearest(trained, evaluated)]
    if self._inputs_are != 'image array' and len(np.unique(names)) <= _PIXEL_CLASSES:
      for name, frames in [('logistic regression', 'all')] if is_image else [
          ('one frame', 'middle'), ('all frames', 'all')]:
        yield name, baselines.frame_logistic(np.stack(trained), names, np.stack(evaluated), frames)

  @staticmethod
  def _nearest(trained: Sequence[np.ndarray], evaluated: Sequence[np.ndarray]) -> np.ndarray:
    middle = lambda videos: np.stack([video[len(video) // 2] for video in videos])
    return baselines.nearest_neighbor(middle(trained), middle(evaluated))

  def _sample(self, max_number: int, value: Callable[[Record], str]) -> tuple[list, list[str]]:
    """(inputs, values) of up to `max_number` training examples; those without input or value are left out."""
    try:
      ids = example_ids(self.trained, self.evaluation.task)
    except UsageError as e:
      raise _LeftOut(e) from e
    examples = self._read(self.trained, ids[baselines.subset(len(ids), max_number)])
    pairs = [(x, v) for record, x in filter(None, examples) if (v := value(record))]
    if not pairs:
      raise _LeftOut(f'no training example of source {self.trained.name!r} can be used')
    return [x for x, _ in pairs], [v for _, v in pairs]

  def _inputs(self, ids: np.ndarray) -> list:
    """Inputs of evaluated examples; of an image that training decodes and Pillow does not, black."""
    examples = self._read(self.evaluated, example_ids(self.evaluated, self.evaluation.task)[ids])
    inputs = [example and example[1] for example in examples]
    shape = next((x.shape for x in inputs if isinstance(x, np.ndarray)), ())
    return [np.zeros(shape, np.uint8) if x is None else x for x in inputs]

  def _read(self, records: FileDataset, ids: np.ndarray) -> Iterator[tuple[Record, Any] | None]:
    """Yields (record, input) in order, None for a damaged one."""
    if self._inputs_are != 'text':
      yield from self._pixels(records, ids)
      return
    for _, record in records.read_chunks(ids):
      yield None if isinstance(record, CorruptExample) else (record, tuple(record[c] for c in self._question))

  def _pixels(self, records: FileDataset, ids: np.ndarray) -> Iterator[tuple[Record, Any] | None]:
    """With the question in front, where there is one."""
    for example in thumbnails.read(records, ids, self.evaluation.task.num_frames):
      if example and self._question:
        record, pixels = example
        example = record, ('\0'.join(record[c] for c in self._question), pixels)
      yield example

  def _once(self, purpose: str, ids: np.ndarray, compute: Callable[[], dict], otherwise: dict) -> dict:
    """The result that is kept, else of `compute`, or `otherwise` if that leaves the baselines out."""
    path = storage.path(self.data_dir) / FOLDER / f'{self._digest(purpose, ids)}.json'
    try:
      return json.loads(path.read_text())
    except (OSError, ValueError):  # not yet computed, or damaged
      pass
    name, start = self.evaluation.name, time.monotonic()
    try:
      result = compute()
      print(f'{name}: baselines computed in {time.monotonic() - start:.0f} s', flush=True)
    except _LeftOut as e:
      result = otherwise
      print(f'{name}: no baselines: {e}; to try again, remove {path}.', flush=True)
    try:
      path.parent.mkdir(exist_ok=True)
      temporary = path.with_suffix(f'.{secrets.token_hex(4)}')  # several processes may write the same result
      temporary.write_text(json.dumps(result))
      temporary.replace(path)
    except OSError as e:
      print(f'{name}: baselines cannot be saved ({e}); the next evaluation computes them again.', flush=True)
    return result

  def _digest(self, purpose: str, ids: np.ndarray) -> str:
    """Of everything that a result depends on."""
    t = self.evaluation.task
    content = (_VERSION, purpose, self.trained.fingerprint, self.evaluated.fingerprint, np.asarray(ids).tolist(),
               self._inputs_are, t.label_column, t.template, t.caption_templates, self.keys, t.num_frames)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:24]
