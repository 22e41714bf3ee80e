"""Evaluators: fixed protocols for scores of a predictor, beside chance and simple baselines.

Examples, candidates, phrasing and number of draws are fixed here and seeded by the evaluator's name. Baselines are
computed from the same records in the same command. An evaluator receives a `Predictor`, never a model.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from uni_moe_jax.config.plan import Evaluation
from uni_moe_jax.data.files.file_dataset import FileDataset
from uni_moe_jax.data.pipeline.examples import Examples, encode_texts, example_ids, pad_tokens
from uni_moe_jax.data.pipeline.mixtures import evaluation_batches
from uni_moe_jax.data.pipeline.records import Records
from uni_moe_jax.data.pipeline.tokenizer import Tokenizer
from uni_moe_jax.eval import baselines, caption_metrics, metrics
from uni_moe_jax.eval.metrics import Score
from uni_moe_jax.eval.predictor import Predictor, seed_of
from uni_moe_jax.eval.samples import Samples
from uni_moe_jax.utils.errors import UsageError

RECALLS = (1, 5, 10)
_COUNTED = 20_000  # records in files whose words are counted for the unigram baseline
DRAWS = 3  # of retrieval candidates; the mean is reported, with the error of a single draw
_NEAREST, _NEAREST_NAME = 'nearest neighbor', "nearest neighbor's name"


@dataclasses.dataclass(frozen=True)
class Query:
  """What an evaluator works with.

  Attributes:
    evaluation: its config entry.
    predictor: the model.
    examples: of the evaluated split, built for evaluation (first phrase, every masked position replaced).
    evaluated, trained: records of the evaluated split and of the task's training split. Baselines need the latter;
      records in files have baselines only where labels are known without reading them.
    names: first name of each entry of the task's target set ('' for the vocabulary).
    keys: the records' names for these entries.
    tokenizer: of the run.
    samples: collects some predictions for the report.
  """
  evaluation: Evaluation
  predictor: Predictor
  examples: Examples
  evaluated: Records | FileDataset
  trained: Records | FileDataset
  names: tuple[str, ...]
  keys: tuple[str, ...]
  tokenizer: Tokenizer
  samples: Samples

  @property
  def task(self):
    return self.evaluation.task

  def ids(self) -> np.ndarray:
    """Ids of the evaluated examples, in order: all, or a seeded subset of `num_examples`."""
    n, size = self.evaluation.num_examples, self.examples.size
    if not n or n >= size:
      return np.arange(size)
    return np.sort(np.random.default_rng(seed_of(self.evaluation.name)).choice(size, n, replace=False))

  def pixels(self, ids: np.ndarray) -> np.ndarray:
    """Pixels of some examples: uint8 [n, T, H, W] or [n, T, H, W, C]."""
    if isinstance(self.evaluated, FileDataset):
      pixels = next(evaluation_batches(self.examples, ids, len(ids)))[0]['pixels']
      return pixels[:, 0] if pixels.ndim == 6 else pixels
    pixels = self.evaluated.columns['pixels'][example_ids(self.evaluated, self.task)[ids]]
    return pixels[:, None] if pixels.ndim == 3 else pixels

  def log_p(self, fields: dict[str, np.ndarray]) -> np.ndarray:
    """log p [B, V] over the task's target set, for inputs with one readout position."""
    return self.predictor.log_probabilities(self.predictor.inputs(self.task.type, fields), self.task)[:, 0]

  def gather(self, ids: np.ndarray, function: Callable[[dict[str, np.ndarray]], tuple[np.ndarray, ...]]):
    """Concatenates `function(fields)` over the batches of `ids`, each example once."""
    parts = []
    for fields, count in evaluation_batches(self.examples, ids, self.evaluation.batch_size):
      parts.append(tuple(x[:count] for x in function(fields)))
    return tuple(np.concatenate(column) for column in zip(*parts))


def classification(q: Query) -> list[Score]:
  """Top-1, top-5 and balanced accuracy among a target set, for images, videos and texts."""
  ids = q.ids()
  log_p, labels = q.gather(ids, lambda fields: (_view_mean(q, fields), fields['label'][:, 0]))
  predicted, names = log_p.argmax(-1), np.array(q.names)
  train_labels, answers = baseline_labels(q, ids, labels)
  n, V = len(labels), log_p.shape[1]
  top1 = {name: metrics.accuracy(a, labels) for name, a in answers.items()}
  scores = [Score.proportion('top-1', metrics.accuracy(predicted, labels), n, 1 / V, top1)]
  if V > 10:
    top5 = {'majority': baselines.majority_accuracy(train_labels, labels, 5)} if len(train_labels) else {}
    scores.append(Score.proportion('top-5', metrics.top_k_accuracy(log_p, labels, 5), n, 5 / V, top5))
  balanced = {name: metrics.balanced_accuracy(a, labels) for name, a in answers.items()}
  scores.append(Score('balanced_accuracy', metrics.balanced_accuracy(predicted, labels), n, 1 / len(np.unique(labels)),
                      balanced, metrics.balanced_accuracy_error(predicted, labels)))
  if q.task.type.visual:
    q.samples.add(q.evaluation.name, q.pixels, ids, names[labels], names[predicted])
  return scores


def _view_mean(q: Query, fields: dict[str, np.ndarray]) -> np.ndarray:
  """log p [B, V] over the target set: for views of a video [B, views, T, S, S, C], of their mean."""
  pixels = fields.get('pixels')
  if pixels is None or pixels.ndim < 6:
    return q.log_p(fields)
  views = [np.exp(q.log_p({**fields, 'pixels': pixels[:, v]})) for v in range(pixels.shape[1])]
  return np.log(np.maximum(np.mean(views, axis=0), np.finfo(np.float32).tiny))


def baseline_labels(q: Query, ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """(training labels [N], labels [Q] of the evaluated examples as each baseline predicts them).

  Training labels are empty if they are unknown.
  """
  if isinstance(q.trained, FileDataset):
    column = q.task.label_column
    if column not in q.trained.labels:
      return np.zeros(0, int), {}
    index, known = {key: i for i, key in enumerate(q.keys)}, q.trained.labels[column]
    train_labels = np.array([index[name] for name in q.trained.classes[column]])[known[known >= 0]]
    return train_labels, {'majority': baselines.majority_predictions(train_labels, len(labels))}
  truth, test = _labeled(q, q.evaluated, ids)
  train_labels, train = _labeled(q, q.trained)
  assert (labels == truth).all()
  majority = baselines.majority_predictions(train_labels, len(truth))
  return train_labels, {'majority': majority, **_input_baselines(test, train, train_labels)}


@dataclasses.dataclass(frozen=True)
class _Columns:
  """Input columns of some records: pixels, or texts."""
  pixels: np.ndarray | None
  texts: tuple[np.ndarray, ...]


def _labeled(q: Query, records: Records, ids: np.ndarray | None = None) -> tuple[np.ndarray, _Columns]:
  """Labels and input columns of the labeled records, which have an example id, or of some of them."""
  index = example_ids(records, q.task)
  if ids is not None:
    index = index[ids]
  pixels = records.columns.get('pixels')
  texts = tuple(c[index] for name, c in records.columns.items() if name.startswith('text') and c.dtype.kind == 'U')
  index_of = {key: i for i, key in enumerate(q.keys)}
  labels = np.array([index_of[name] for name in records.columns[q.task.label_column][index].tolist()])
  return labels, _Columns(None if pixels is None else pixels[index], texts)


def _input_baselines(test: _Columns, train: _Columns, train_labels: np.ndarray) -> dict[str, np.ndarray]:
  """Labels predicted by the baselines for this input: texts, images or videos."""
  if test.pixels is None:
    return {'tf-idf': baselines.tfidf_logistic(train.texts, train_labels, test.texts)}
  if test.pixels.ndim == 3:
    return {_NEAREST: train_labels[baselines.nearest_neighbor(train.pixels, test.pixels)]}
  return {name: baselines.frame_logistic(train.pixels, train_labels, test.pixels, frames)
          for name, frames in (('one frame', 'middle'), ('all frames', 'all'))}


def retrieval(q: Query) -> list[Score]:
  """R@1, 5, 10 in both directions among examples with distinct texts.

  The value is the mean over three seeded draws of `num_examples` examples. The baseline copies the name of the nearest
  training image (of a video: of its middle frame) and takes the candidate that shares most words with it. Of records in
  files every example and each of its texts counts, as published: any text of an image is correct for it, and an image
  is correct if the text is one of its own.
  """
  if q.examples.references:
    return _full_retrieval(q)
  texts = np.array(_first_phrase(q, q.evaluated))
  number = q.evaluation.num_examples or len(np.unique(texts))
  rng = np.random.default_rng(seed_of(q.evaluation.name))
  draws = [_distinct(texts, number, rng) for _ in range(DRAWS)]
  union = np.unique(np.concatenate(draws))

  def encode(fields):
    return q.predictor.inputs(q.task.type, fields)[:, 0], q.predictor.pairs(q.task.type, fields)

  left, right = q.gather(union, encode)
  copied = _neighbor_names(q, union)
  values: dict[str, list[float]] = {}
  baseline: dict[str, list[float]] = {}
  for draw in draws:
    index, positives = np.searchsorted(union, draw), np.eye(len(draw), dtype=bool)
    similarity = q.predictor.similarities(left[index], right[index])
    copied_similarity = baselines.name_similarity(copied[index].tolist(), texts[draw].tolist())
    for k in RECALLS:
      for name, orient in _directions(q):
        values.setdefault(f'{name}@{k}', []).append(metrics.recall_at_k(orient(similarity), positives, k))
        baseline.setdefault(f'{name}@{k}', []).append(metrics.recall_at_k(orient(copied_similarity), positives, k))
  return [Score.proportion(name, float(np.mean(v)), number, int(name.partition('@')[2]) / number,
                           {_NEAREST_NAME: float(np.mean(baseline[name]))}) for name, v in values.items()]


def _directions(q: Query) -> tuple[tuple[str, Callable[[np.ndarray], np.ndarray]], ...]:
  """('i2t_R', identity) and ('t2i_R', transpose): names of both directions of retrieval; v for videos."""
  modality = 'v' if q.task.type.name.startswith('video') else 'i'
  return (f'{modality}2t_R', lambda m: m), (f't2{modality}_R', lambda m: m.T)


def _full_retrieval(q: Query) -> list[Score]:
  """R@k of every image and every distinct text.

  Images that share a text are all correct for it, and it is correct for all of them.
  """
  ids = q.ids()
  texts = q.examples.references(ids)
  length = q.task.max_len
  rows = [tuple(row) for row in encode_texts([t for several in texts for t in several], q.tokenizer, length)]
  # Texts with the same tokens, cut to the task's length, count as one.
  codes = {row: i for i, row in enumerate(dict.fromkeys(rows))}
  owner = np.repeat(np.arange(len(ids)), [len(t) for t in texts])
  positives = np.zeros((len(ids), len(codes)), bool)
  positives[owner, [codes[row] for row in rows]] = True
  targets, valid = pad_tokens(list(codes), length, q.tokenizer.pad)

  def encode(rows):
    batch = np.resize(rows, q.evaluation.batch_size)  # of one shape; repeated rows are dropped
    return q.predictor.pairs(q.task.type, {
        'id': batch.astype(np.uint32), 'target': targets[batch], 'target_valid': valid[batch]})[:len(rows)]

  [left] = q.gather(ids, lambda fields: (q.predictor.inputs(q.task.type, fields)[:, 0],))
  starts = range(0, len(codes), q.evaluation.batch_size)
  right = np.concatenate([encode(np.arange(s, min(s + q.evaluation.batch_size, len(codes)))) for s in starts])
  similarity, scores = q.predictor.similarities(left, right), []
  for k in RECALLS:
    for name, orient in _directions(q):
      p = orient(positives)
      recall = metrics.recall_at_k(orient(similarity), p, k)
      scores.append(Score.proportion(f'{name}@{k}', recall, len(p), metrics.recall_by_chance(p, k)))
  return scores


def _first_phrase(q: Query, records: Records) -> list[str]:
  """The evaluated phrasing: the task's first template."""
  template = q.task.caption_templates[0]
  text = {k: c.tolist() for k, c in records.columns.items() if c.dtype.kind == 'U'}
  n = len(next(iter(records.columns.values())))
  return [template.format(**{k: v[i] for k, v in text.items()}) for i in range(n)]


def _distinct(texts: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
  """Sorted ids of `number` examples with distinct texts, each drawn among those of its text."""
  order = rng.permutation(len(texts))
  _, first = np.unique(texts[order], return_index=True)
  if len(first) < number:
    raise UsageError(f'the evaluator needs {number} distinct texts, the split has {len(first)}; lower its '
                     'num_examples.')
  return np.sort(order[rng.permutation(first)[:number]])


def _neighbor_names(q: Query, ids: np.ndarray) -> np.ndarray:
  """Text of the nearest training image of each example; videos by their middle frames."""
  def still(pixels):
    return pixels if pixels.ndim == 3 else pixels[:, pixels.shape[1] // 2]
  nearest = baselines.nearest_neighbor(
      still(q.trained.columns['pixels']), still(q.evaluated.columns['pixels'])[ids])
  return np.array(_first_phrase(q, q.trained))[nearest]


def caption(q: Query) -> list[Score]:
  """Exact match, BLEU-4, ROUGE-L, CIDEr-D (up to 10) and word F1 of captions.

  Captions are decoded greedily or by beam search, from any words or from a closed set. The baseline is the nearest
  neighbor's text.
  """
  ids, e = q.ids(), q.evaluation
  predicted = []
  for fields, count in evaluation_batches(q.examples, ids, e.batch_size):
    predicted += q.predictor.captions(q.task, fields['pixels'], e.beam_size, e.length_penalty, e.constrain_to)[:count]
  # Both sides in the tokenizer's folded form: case and spacing do not count.
  fold = lambda texts: [q.tokenizer.decode(row) for row in q.tokenizer.encode_batch(list(texts))]
  if q.examples.references:
    truth, copied = [fold(several) for several in q.examples.references(ids)], None
  else:
    truth, copied = fold(np.array(_first_phrase(q, q.evaluated))[ids]), fold(_neighbor_names(q, ids))
  n, baseline = len(ids), lambda metric: {} if copied is None else {_NEAREST_NAME: metric(copied, truth)}

  def score(name, metric):
    return Score.mean(name, metric(predicted, truth), baseline(metric))

  shown = [t if isinstance(t, str) else ' | '.join(t) for t in truth]
  q.samples.add(q.evaluation.name, q.pixels, ids, shown, predicted)
  exact = metrics.exact_match
  return [
      Score.proportion('exact_match', exact(predicted, truth), n, baselines=baseline(exact)),
      # One number for the corpus, so no standard error.
      Score('BLEU-4', metrics.bleu4(predicted, truth), n, baselines=baseline(metrics.bleu4)),
      score('ROUGE-L', caption_metrics.rouge_l),
      score('CIDEr-D', caption_metrics.cider_d),
      score('word F1', metrics.word_f1),
  ]


def masked_language_modeling(q: Query) -> list[Score]:
  """Accuracy and perplexity over the whole vocabulary, beside those of the unigram baseline.

  Every masked position is replaced by `spe`.
  """
  def score(fields):
    features = q.predictor.inputs(q.task.type, fields)
    log_p = q.predictor.log_probabilities(features, q.task)
    nll = -np.take_along_axis(log_p, fields['label'][..., None], axis=-1)[..., 0]
    return nll, log_p.argmax(-1) == fields['label'], fields['label'], fields['weight'] > 0

  nll, hits, labels, counted = q.gather(q.ids(), score)
  in_files = isinstance(q.trained, FileDataset)
  tokens = q.tokenizer.encode_batch(
      q.trained.sample_texts(_COUNTED) if in_files else q.trained.columns['text'].tolist())
  counts = np.bincount(np.concatenate([np.asarray(t, np.int64) for t in tokens]), minlength=q.tokenizer.size)
  counts[q.tokenizer.eot] += len(tokens)
  unigram = baselines.unigram(counts, labels[counted])
  n = int(counted.sum())
  V = q.tokenizer.size
  return [
      Score.proportion('accuracy', float(hits[counted].mean()), n, 1 / V, {'unigram': unigram.accuracy}),
      Score('perplexity', metrics.perplexity(float(nll[counted].sum()), n), n, V,
            {'unigram': unigram.perplexity}, higher_is_better=False),
  ]
