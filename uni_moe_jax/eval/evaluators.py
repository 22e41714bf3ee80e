"""Evaluators: fixed protocols that turn a predictor and records into scores, chance and floors.

Which examples, which candidates, which phrasing and how many draws are fixed here and seeded by the evaluator's name;
the floors are computed from the same records in the same command. An evaluator never sees a model, only a `Predictor`.
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
_COUNTED = 20_000  # records in files whose words are counted for the unigram's floor
DRAWS = 3  # of a retrieval's candidates; the mean is reported, with the error of a single draw


@dataclasses.dataclass(frozen=True)
class Question:
  """What an evaluator works with.

  Attributes:
    evaluation: its config entry.
    predictor: the model.
    examples: of the evaluated split, made for evaluation (first phrase, every pick masked).
    asked, trained: records of the evaluated split, and of the split that the task trains on (for floors, which records in
      files have only where labels are known without reading them).
    texts: entries of the task's target set ('' for the vocabulary), by their first names. keys: what records call them.
    tokenizer: of the run.
    samples: where to show some predictions.
  """
  evaluation: Evaluation
  predictor: Predictor
  examples: Examples
  asked: Records | FileDataset
  trained: Records | FileDataset
  texts: tuple[str, ...]
  keys: tuple[str, ...]
  tokenizer: Tokenizer
  samples: Samples

  @property
  def task(self):
    return self.evaluation.task

  def ids(self) -> np.ndarray:
    """Example ids that are asked: all, or a seeded subset of `number`, in order."""
    n, size = self.evaluation.num_examples, self.examples.size
    if not n or n >= size:
      return np.arange(size)
    return np.sort(np.random.default_rng(seed_of(self.evaluation.name)).choice(size, n, replace=False))

  def pixels(self, ids: np.ndarray) -> np.ndarray:
    """What some examples show: uint8 [n, T, H, W] or [n, T, H, W, C]."""
    if isinstance(self.asked, FileDataset):
      found = next(evaluation_batches(self.examples, ids, len(ids)))[0]['pixels']
      return found[:, 0] if found.ndim == 6 else found
    found = self.asked.columns['pixels'][example_ids(self.asked, self.task)[ids]]
    return found[:, None] if found.ndim == 3 else found

  def log_p(self, fields: dict[str, np.ndarray]) -> np.ndarray:
    """log p [B, V] over the task's target set, for inputs that are read at one place."""
    return self.predictor.log_probabilities(self.predictor.inputs(self.task.type, fields), self.task)[:, 0]

  def gather(self, ids: np.ndarray, function: Callable[[dict[str, np.ndarray]], tuple[np.ndarray, ...]]):
    """Columns of `function(fields)` over the batches of `ids`, each example once."""
    parts = []
    for fields, count in evaluation_batches(self.examples, ids, self.evaluation.batch_size):
      parts.append(tuple(x[:count] for x in function(fields)))
    return tuple(np.concatenate(column) for column in zip(*parts))


def classification(q: Question) -> list[Score]:
  """Top-1, top-5 and balanced accuracy among a target set; for pictures, clips and texts alike."""
  ids = q.ids()
  log_p, labels = q.gather(ids, lambda fields: (_view_mean(q, fields), fields['label'][:, 0]))
  predicted, names = log_p.argmax(-1), np.array(q.texts)
  known, answers = known_answers(q, ids, labels)
  n, V = len(labels), log_p.shape[1]
  top1 = {name: metrics.accuracy(a, labels) for name, a in answers.items()}
  scores = [Score.proportion('top-1', metrics.accuracy(predicted, labels), n, 1 / V, top1)]
  if V > 10:
    floor = {'majority': baselines.majority_accuracy(known, labels, 5)} if len(known) else {}
    scores.append(Score.proportion('top-5', metrics.top_k_accuracy(log_p, labels, 5), n, 5 / V, floor))
  balanced = {name: metrics.balanced_accuracy(a, labels) for name, a in answers.items()}
  scores.append(Score('balanced', metrics.balanced_accuracy(predicted, labels), n, 1 / len(np.unique(labels)), balanced,
                      metrics.balanced_accuracy_error(predicted, labels)))
  if q.task.type.visual:
    q.samples.add(q.evaluation.name, q.pixels, ids, names[labels], names[predicted])
  return scores


def _view_mean(q: Question, fields: dict[str, np.ndarray]) -> np.ndarray:
  """log p [B, V] over the target set: of several views of a clip [B, views, T, S, S, C], of the mean of their probabilities."""
  pixels = fields.get('pixels')
  if pixels is None or pixels.ndim < 6:
    return q.log_p(fields)
  views = [np.exp(q.log_p({**fields, 'pixels': pixels[:, v]})) for v in range(pixels.shape[1])]
  return np.log(np.maximum(np.mean(views, axis=0), np.finfo(np.float32).tiny))


def known_answers(q: Question, ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """(training labels [N], or none; labels that simple predictors give the asked examples, by name)."""
  if isinstance(q.trained, FileDataset):
    if q.task.label_column not in q.trained.labels:
      return np.zeros(0, int), {}
    place = {name: i for i, name in enumerate(q.keys)}
    known = q.trained.labels[q.task.label_column]
    known = np.array([place[name] for name in q.trained.classes[q.task.label_column]])[known[known >= 0]]
    return known, {'majority': baselines.majority_predictions(known, len(labels))}
  truth, test = _labelled(q, q.asked, ids)
  known, train = _labelled(q, q.trained)
  assert (labels == truth).all()
  return known, {'majority': baselines.majority_predictions(known, len(truth)), **_class_floors(test, train, known)}


@dataclasses.dataclass(frozen=True)
class _Columns:
  """Input columns of some records: pixels, or texts."""
  pixels: np.ndarray | None
  texts: tuple[np.ndarray, ...]


def _labelled(q: Question, records: Records, ids: np.ndarray | None = None) -> tuple[np.ndarray, _Columns]:
  """Labels and input columns of the labelled records (those that a task's example ids count), or some of them."""
  index = example_ids(records, q.task)
  if ids is not None:
    index = index[ids]
  pixels = records.columns.get('pixels')
  texts = tuple(c[index] for name, c in records.columns.items() if name.startswith('text') and c.dtype.kind == 'U')
  place = {key: i for i, key in enumerate(q.keys)}
  labels = np.array([place[name] for name in records.columns[q.task.label_column][index].tolist()])
  return labels, _Columns(None if pixels is None else pixels[index], texts)


def _class_floors(test: _Columns, train: _Columns, known: np.ndarray) -> dict[str, np.ndarray]:
  """Predicted labels of the floors that fit the input."""
  if test.pixels is None:
    return {'tf-idf': baselines.tfidf_logistic(train.texts, known, test.texts)}
  if test.pixels.ndim == 3:
    return {'1-nn': known[baselines.nearest_neighbour(train.pixels, test.pixels)]}
  return {name: baselines.frame_logistic(train.pixels, known, test.pixels, frames)
          for name, frames in (('one frame', 'middle'), ('all frames', 'all'))}


def retrieval(q: Question) -> list[Score]:
  """R@1, 5, 10 both ways among `number` examples of distinct texts, mean of three seeded draws.

  The floor copies the name of the nearest training picture (of a clip: of its middle frame) and takes the candidate that
  shares most words with it. Of records in files every example and every text of it counts, as published: a text among those of
  the picture is right, a picture is right if the text is one of its own.
  """
  if q.examples.references:
    return _retrieval_of_all(q)
  texts = np.array(_first_phrase(q, q.asked))
  number = q.evaluation.num_examples or len(np.unique(texts))
  rng = np.random.default_rng(seed_of(q.evaluation.name))
  draws = [_distinct(texts, number, rng) for _ in range(DRAWS)]
  union = np.unique(np.concatenate(draws))

  def ask(fields):
    return q.predictor.inputs(q.task.type, fields)[:, 0], q.predictor.pairs(q.task.type, fields)

  left, right = q.gather(union, ask)
  copied = _neighbour_names(q, union)
  values: dict[str, list[float]] = {}
  for draw in draws:
    place = np.searchsorted(union, draw)
    positives = np.eye(len(draw), dtype=bool)
    model = q.predictor.similarities(left[place], right[place])
    floor = baselines.name_similarity(copied[place].tolist(), texts[draw].tolist())
    for k in RECALLS:
      for way, of in (('→ text', lambda m: m), ('← text', lambda m: m.T)):
        values.setdefault(f'R@{k} {way}', []).append(metrics.recall_at_k(of(model), positives, k))
        values.setdefault(f'floor R@{k} {way}', []).append(metrics.recall_at_k(of(floor), positives, k))
  return [Score.proportion(name, float(np.mean(v)), number, _k_of(name) / number,
                           {'1-nn name': float(np.mean(values[f'floor {name}']))})
          for name, v in values.items() if not name.startswith('floor')]


def _retrieval_of_all(q: Question) -> list[Score]:
  """R@k of every picture and every distinct text. Pictures that share a text are all right for it, and it for all of them."""
  ids = q.ids()
  texts = q.examples.references(ids)
  length = q.task.max_len
  rows = [tuple(row) for row in encode_texts([t for several in texts for t in several], q.tokenizer, length)]
  codes = {row: i for i, row in enumerate(dict.fromkeys(rows))}  # what the model reads alike, cut as it reads it, is one text
  owner = np.repeat(np.arange(len(ids)), [len(t) for t in texts])
  positives = np.zeros((len(ids), len(codes)), bool)
  positives[owner, [codes[row] for row in rows]] = True
  targets, valid = pad_tokens(list(codes), length, q.tokenizer.pad)

  def encode(rows):
    batch = np.resize(rows, q.evaluation.batch_size)  # of one shape; what fills it up is dropped
    return q.predictor.pairs(q.task.type, {
        'id': batch.astype(np.uint32), 'target': targets[batch], 'target_valid': valid[batch]})[:len(rows)]

  [left] = q.gather(ids, lambda fields: (q.predictor.inputs(q.task.type, fields)[:, 0],))
  starts = range(0, len(codes), q.evaluation.batch_size)
  right = np.concatenate([encode(np.arange(s, min(s + q.evaluation.batch_size, len(codes)))) for s in starts])
  similarity, scores = q.predictor.similarities(left, right), []
  for k in RECALLS:
    for way, s, p in (('→ text', similarity, positives), ('← text', similarity.T, positives.T)):
      scores.append(Score.proportion(f'R@{k} {way}', metrics.recall_at_k(s, p, k), len(p), metrics.recall_by_chance(p, k)))
  return scores


def _k_of(name: str) -> int:
  return int(name.partition('@')[2].split()[0])


def _first_phrase(q: Question, records: Records) -> list[str]:
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
    raise UsageError(f'evaluator asks for {number} distinct texts, the split has {len(first)}; lower its number.')
  return np.sort(order[rng.permutation(first)[:number]])


def _neighbour_names(q: Question, ids: np.ndarray) -> np.ndarray:
  """Text of the nearest training picture of each example; clips by their middle frames."""
  def still(pixels):
    return pixels if pixels.ndim == 3 else pixels[:, pixels.shape[1] // 2]
  near = baselines.nearest_neighbour(still(q.trained.columns['pixels']), still(q.asked.columns['pixels'])[ids])
  return np.array(_first_phrase(q, q.trained))[near]


def caption(q: Question) -> list[Score]:
  """Captions, greedy or by beam search, of any words or of a closed set of answers, beside copying the neighbour's text.

  Exact match, BLEU-4, ROUGE-L, CIDEr-D (up to 10) and word F1.
  """
  ids, e = q.ids(), q.evaluation
  predicted = []
  for fields, count in evaluation_batches(q.examples, ids, e.batch_size):
    predicted += q.predictor.captions(q.task, fields['pixels'], e.beam_size, e.length_penalty, e.constrain_to)[:count]
  # Both sides in the tokenizer's folded form: its case and spacing are no merit and no fault of a caption.
  fold = lambda texts: [q.tokenizer.decode(row) for row in q.tokenizer.encode_batch(list(texts))]
  if q.examples.references:
    truth, copied = [fold(several) for several in q.examples.references(ids)], None
  else:
    truth, copied = fold(np.array(_first_phrase(q, q.asked))[ids]), fold(_neighbour_names(q, ids))
  n, floor = len(ids), lambda metric: {} if copied is None else {'1-nn name': metric(copied, truth)}

  def score(name, metric):
    return Score.mean(name, metric(predicted, truth), floor(metric))

  q.samples.add(q.evaluation.name, q.pixels, ids, [t if isinstance(t, str) else ' | '.join(t) for t in truth], predicted)
  return [
      Score.proportion('exact', metrics.exact_match(predicted, truth), n, floors=floor(metrics.exact_match)),
      Score('BLEU-4', metrics.bleu4(predicted, truth), n, floors=floor(metrics.bleu4)),  # of all together: no error is known
      score('ROUGE-L', caption_metrics.rouge_l),
      score('CIDEr-D', caption_metrics.cider_d),
      score('word F1', metrics.word_f1),
  ]


def masked_language_modelling(q: Question) -> list[Score]:
  """Accuracy and perplexity over the whole vocabulary, every pick replaced by `spe`, beside the unigram's."""
  def ask(fields):
    features = q.predictor.inputs(q.task.type, fields)
    log_p = q.predictor.log_probabilities(features, q.task)
    nll = -np.take_along_axis(log_p, fields['label'][..., None], axis=-1)[..., 0]
    return nll, log_p.argmax(-1) == fields['label'], fields['label'], fields['weight'] > 0

  nll, hits, labels, counted = q.gather(q.ids(), ask)
  texts = q.trained.sample_texts(_COUNTED) if isinstance(q.trained, FileDataset) else q.trained.columns['text'].tolist()
  tokens = q.tokenizer.encode_batch(texts)
  counts = np.bincount(np.concatenate([np.asarray(t, np.int64) for t in tokens]), minlength=q.tokenizer.size)
  counts[q.tokenizer.eot] += len(tokens)
  floor = baselines.unigram(counts, labels[counted])
  n = int(counted.sum())
  return [
      Score.proportion('accuracy', float(hits[counted].mean()), n, 1 / q.tokenizer.size, {'unigram': floor.accuracy}),
      Score('perplexity', metrics.perplexity(float(nll[counted].sum()), n), n, q.tokenizer.size,
            {'unigram': floor.perplexity}, higher_is_better=False),
  ]
