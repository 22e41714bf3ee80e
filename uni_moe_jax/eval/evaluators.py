"""Evaluators: fixed protocols for scores of a predictor, beside chance and simple baselines.

Examples, candidates and phrasing are fixed here and seeded by the evaluator's name. Baselines are computed from the
same records in the same command, once per dataset. An evaluator receives a `Predictor`, never a model.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.config.metric_names import RECALLS, is_measured, modality
from uni_moe_jax.config.plan import Evaluation
from uni_moe_jax.data.batches.mixtures import evaluation_batches
from uni_moe_jax.data.examples.examples import Examples
from uni_moe_jax.data.examples.features import text_columns
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.data.text.token_rows import distinct_rows
from uni_moe_jax.data.text.tokenizer import Tokenizer
from uni_moe_jax.eval import baselines, batches, caption_metrics, metrics, samples
from uni_moe_jax.eval.batches import Fields
from uni_moe_jax.eval.dataset_baselines import DatasetBaselines
from uni_moe_jax.eval.metrics import Score
from uni_moe_jax.eval.predictor import Predictor, Ranked
from uni_moe_jax.utils.errors import UsageError

_COUNTED = 50_000  # records whose words are counted for the unigram baseline
NONE = '(none of them)'  # in place of an answer where several have the highest score, or one is NaN
_NEAREST_NAME = "nearest neighbor's name"


@dataclasses.dataclass(frozen=True)
class Query:
  """What an evaluator works with."""
  evaluation: Evaluation
  predictor: Predictor
  examples: Examples  # built for evaluation (first phrase, every masked position replaced)
  evaluated: FileDataset
  trained: FileDataset  # of the task's training split, for baselines
  names: tuple[str, ...]  # first name of each entry of the task's target set ('' for the vocabulary)
  keys: tuple[str, ...]  # the records' names for these entries
  tokenizer: Tokenizer
  samples: dict[str, list[dict[str, Any]]]  # some predictions of each evaluator for the report, see `show`
  data_dir: str  # prepared data, and results of baselines
  before_batch: Callable[[], None] = lambda: None  # called in every process; its error ends the evaluation

  @property
  def task(self):
    return self.evaluation.task

  @property
  def seed(self) -> int:
    """Fixed by the evaluator's name: every model gets the same examples."""
    return zlib.crc32(self.evaluation.name.encode())

  def ids(self) -> np.ndarray:
    """Ids of the evaluated examples, in order: all, or a seeded subset of `num_examples`."""
    return baselines.subset(self.examples.size, self.evaluation.num_examples or self.examples.size, self.seed)

  def pixels(self, ids: np.ndarray) -> np.ndarray:
    """Pixels of some examples: uint8 [n, T, H, W, C]."""
    pixels = next(evaluation_batches(self.examples, ids, len(ids)))[0]['pixels']
    return pixels[:, 0] if pixels.ndim == 6 else pixels

  def show(self, ids: np.ndarray, truth: Sequence[str | Sequence[str]], predicted: Sequence[str]) -> None:
    """Adds some of the examples, with their references, one or several each, and predictions, to the samples."""
    self.samples[self.evaluation.name] = samples.choose(self.pixels, ids, truth, predicted)

  def ranked(self, fields: Fields) -> Ranked:
    """Ranks [B] of the first label in the task's target set, for inputs with one readout position.

    Views of a video [B, views, T, S, S, C] are ranked together.
    """
    pixels, views = fields.get('pixels'), [fields]
    if pixels is not None and pixels.ndim == 6:
      views = [{**fields, 'pixels': pixels[:, v]} for v in range(pixels.shape[1])]
    features = [self.predictor.inputs(self.task.type, view) for view in views]
    return Ranked(*(x[:, 0] for x in self.predictor.ranked(features, self.task, fields['label'][:, :1])))

  def gather(self, ids: np.ndarray, function: Callable[[Fields], Any]) -> Any:
    """Concatenates the arrays of `function(fields)`, one or a tree, over the batches of `ids`, see `batches.gather`."""
    def run(fields):
      self.before_batch()
      return function(fields)

    e = self.evaluation
    return batches.gather(run, self.examples, ids, e.batch_size, self.predictor.mesh, e.name)

  @property
  def baselines(self) -> DatasetBaselines:
    return DatasetBaselines(self.evaluation, self.trained, self.evaluated, self.keys, self.data_dir)

  def neighbor_phrases(self, ids: np.ndarray) -> list[str] | None:
    """Text of the nearest training image of each example; videos by their middle frames. None: no baselines."""
    return self.baselines.neighbor_texts(ids) if self.evaluation.baselines else None



def classification(q: Query) -> list[Score]:
  """Top-1, top-5 and balanced accuracy among a target set, for images, videos and texts."""
  ids = q.ids()
  predicted, ranks, labels = answered(q, ids)
  names, n, V = np.array([*q.names, NONE, '(not in the target set)']), len(ids), len(q.names)
  train_labels, by, counts = label_baselines(q, ids, labels)
  scores = [Score.share('top-1', metrics.hits(predicted, labels), 1 / V, by(metrics.accuracy))]
  if is_measured('top-5', V):
    top5 = {'majority': baselines.majority_accuracy(train_labels, labels, 5)} if len(train_labels) else {}
    scores.append(Score.share('top-5', ranks <= 5, 5 / V, top5))
  scores.append(Score('balanced_accuracy', metrics.balanced_accuracy(predicted, labels), n, 1 / V,
                      by(metrics.balanced_accuracy), metrics.balanced_accuracy_error(predicted, labels)))
  scores = [dataclasses.replace(score, baseline_counts=counts) for score in scores]
  if q.task.type.visual:
    q.show(ids, names[labels], names[predicted])
  return scores


def answered(q: Query, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(predictions, ranks of the labels, labels) int [N] of examples with one label each, of V targets.

  A label has rank 1 only if no other target has its score; if it has the highest one and not rank 1, the prediction is
  V, none of them, since ties and NaNs count against the model. The label of an answer that the target set lacks is -1:
  every prediction is wrong.
  """
  (predicted, ranks, *_), labels, weights = q.gather(
      ids, lambda fields: (q.ranked(fields), fields['label'][:, 0], fields['weight'][:, 0]))
  V = len(q.names)
  predicted = np.where((predicted == labels) & (ranks > 1), V, predicted)
  return predicted, np.where(weights > 0, ranks, V + 1), np.where(weights > 0, labels, -1)


def label_baselines(
    q: Query, ids: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, Callable[..., dict[str, Any]], dict[str, int]]:
  """(training labels [N], metric → its value for each baseline that predicts the labels [Q] of the examples, counts).

  Counts are the numbers of examples of the baselines that predict a part of them. Training labels are empty if there
  are no baselines. Baselines fit the input: texts, images or videos.
  """
  if not q.evaluation.baselines:
    return np.zeros(0, int), lambda metric: {}, {}
  train_labels, rows, fitted = q.baselines.classes(ids)
  answers = {'majority': baselines.majority_predictions(train_labels, len(labels))} if len(train_labels) else {}
  by = lambda metric: {**{name: metric(predicted, labels) for name, predicted in answers.items()},
                       **{name: metric(predicted, labels[rows]) for name, predicted in fitted.items()}}
  return train_labels, by, dict.fromkeys(fitted, len(rows)) if len(rows) < len(ids) else {}


def retrieval(q: Query) -> list[Score]:
  """R@1, 5, 10 in both directions among all examples, or among some with distinct texts.

  Without draws every example and each of its texts counts, as published: any text of an image is correct for it, and an
  image is correct if the text is one of its own. With `num_draws`, the value is the mean over so many seeded draws of
  `num_examples` examples with distinct texts, with the error of a single draw. The baseline copies the text of the
  nearest training image (of a video: of its middle frame) and takes the candidate that shares most words with it.
  """
  if not q.evaluation.num_draws:
    return _full_retrieval(q)
  texts = np.array([first for first, *_ in q.examples.references(np.arange(q.examples.size))])
  *_, rows = distinct_rows(texts.tolist(), q.tokenizer, q.task.max_len)
  number = q.evaluation.num_examples or len(np.unique(rows))
  rng = np.random.default_rng(q.seed)
  draws = [_distinct(texts, rows, number, rng) for _ in range(q.evaluation.num_draws)]
  union = np.unique(np.concatenate(draws))
  left, right = q.gather(union, lambda fields: (
      q.predictor.inputs(q.task.type, fields)[:, 0], q.predictor.pairs(q.task.type, fields)))
  copied, recalls, baseline = q.neighbor_phrases(union), [], []
  for draw in draws:
    index, positives = np.searchsorted(union, draw), np.eye(len(draw), dtype=bool)
    recalls.append(_by_direction(q, np.less_equal, *_ranks(q, left[index], right[index], positives)))
    if copied is not None:
      by_name = baselines.name_similarity([copied[i] for i in index], texts[draw])
      baseline.append(_by_direction(q, metrics.share_within, *metrics.mutual_ranks(by_name.__getitem__, positives)))
  mean = lambda draws, name: float(np.mean([np.mean(recall[name]) for recall in draws]))
  return [Score.proportion(name, mean(recalls, name), number, min(int(name.partition('@')[2]) / number, 1.0),
                           {_NEAREST_NAME: mean(baseline, name)} if baseline else {})
          for name in recalls[0]]


def _ranks(q: Query, left: np.ndarray, right: np.ndarray, positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Ranks of the best text of each image and of the best image of each text."""
  return metrics.mutual_ranks(lambda part: q.predictor.similarities(left[part], right), positives)


def _by_direction(q: Query, function: Callable[..., Any], to_text: Any, from_text: Any) -> dict[str, Any]:
  """{'i2t_R@1': function(to_text, 1), …} for both directions of retrieval; v for videos."""
  letter = modality(q.task.type.name)
  directions = {f'{letter}2t': to_text, f't2{letter}': from_text}
  return {f'{name}_R@{k}': function(values, k) for k in RECALLS for name, values in directions.items()}


def _full_retrieval(q: Query) -> list[Score]:
  """R@k of every image and every distinct text: images that share a text are correct for it, and it for them."""
  ids, length, batch_size = q.ids(), q.task.max_len, q.evaluation.batch_size
  texts = q.examples.references(ids)
  flat = [t for several in texts for t in several]
  targets, valid, row_of = distinct_rows(flat, q.tokenizer, length)
  owner = np.repeat(np.arange(len(ids)), [len(t) for t in texts])
  positives = np.zeros((len(ids), len(targets)), bool)
  positives[owner, row_of] = True

  def encode(start):
    q.before_batch()
    rows = np.arange(start, min(start + batch_size, len(targets)))
    batch = np.resize(rows, batch_size)  # of one shape; repeated rows are dropped
    return q.predictor.pairs(q.task.type, {
        'id': batch.astype(np.uint32), 'target': targets[batch], 'target_valid': valid[batch]})[:len(rows)]

  left = q.gather(ids, lambda fields: q.predictor.inputs(q.task.type, fields)[:, 0])
  right = np.concatenate([encode(start) for start in range(0, len(targets), batch_size)])
  right_within = _by_direction(q, np.less_equal, *_ranks(q, left, right, positives))
  chance = _by_direction(q, metrics.recall_by_chance, positives, positives.T)
  baseline = {}
  if (copied := q.neighbor_phrases(ids)) is not None:
    text_of = dict(zip(row_of.tolist(), flat, strict=True))
    candidates = [text_of[i] for i in range(len(targets))]
    named = metrics.mutual_ranks(lambda part: baselines.name_similarity(copied[part], candidates), positives)
    baseline = _by_direction(q, lambda ranks, k: {_NEAREST_NAME: metrics.share_within(ranks, k)}, *named)
  return [Score.share(name, is_right, chance[name], baseline.get(name)) for name, is_right in right_within.items()]


def _distinct(texts: np.ndarray, rows: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
  """Sorted ids of `number` examples with distinct texts, each drawn among those of its text.

  rows: int [N], equal for texts with the same tokens, of which one counts.
  """
  order = rng.permutation(len(texts))
  _, first = np.unique(texts[order], return_index=True)
  drawn = order[rng.permutation(first)]
  _, first = np.unique(rows[drawn], return_index=True)
  if len(first) < number:
    raise UsageError(f'the evaluator needs {number} distinct texts, but the split has {len(first)}; lower its '
                     'num_examples.')
  return np.sort(drawn[np.sort(first)[:number]])


def caption(q: Query) -> list[Score]:
  """Exact match, BLEU-4, ROUGE-L, CIDEr-D (up to 10) and word F1 of captions.

  Captions are decoded greedily or by beam search, reranked by retrieval if wanted, and detokenized. References stay as
  they are in the data. The baseline is the nearest neighbor's text.
  """
  ids, e = q.ids(), q.evaluation
  predicted = q.gather(ids, lambda fields: np.array(q.predictor.captions(
      q.task, fields['pixels'], e.beam_size, e.length_penalty, e.max_len, e.reranker))).tolist()
  if e.detokenize:
    predicted = [q.tokenizer.detokenize(text) for text in predicted]
  truth = q.examples.references(ids)
  copied = q.neighbor_phrases(ids)
  by = lambda metric: {} if copied is None else {_NEAREST_NAME: metric(copied, truth)}
  q.show(ids, truth, predicted)
  bleu4 = caption_metrics.bleu4
  means = {'ROUGE-L': caption_metrics.rouge_l, 'CIDEr-D': caption_metrics.cider_d, 'word F1': metrics.word_f1}
  return [Score.share('exact_match', metrics.exact_matches(predicted, truth), baselines=by(metrics.exact_match)),
          # One number for the corpus, so no standard error.
          Score('BLEU-4', bleu4(predicted, truth), len(ids), baselines=by(bleu4)),
          *(Score.mean(name, metric(predicted, truth), by(metric)) for name, metric in means.items())]


def masked_language_modeling(q: Query) -> list[Score]:
  """Accuracy and perplexity over the whole vocabulary, beside those of the unigram baseline.

  Every masked position is replaced by `spe`.
  """
  def score(fields):
    predicted = q.predictor.ranked([q.predictor.inputs(q.task.type, fields)], q.task, fields['label'])
    return predicted, fields['label'], fields['weight'] > 0

  (_, ranks, log_p, _), labels, counted = q.gather(q.ids(), score)
  n, V, unigram = int(counted.sum()), q.tokenizer.size, ({}, {})
  accuracy = metrics.share_within(ranks[counted], 1)
  if q.evaluation.baselines:
    tokens = q.tokenizer.encode_batch(q.trained.sample_texts(text_columns(q.task), _COUNTED))
    counts = np.bincount(np.concatenate([np.asarray(t, np.int64) for t in tokens]), minlength=V)
    counts[q.tokenizer.eot] += len(tokens)
    unigram = [{'unigram': value} for value in baselines.unigram(counts, labels[counted])]
  times = counted.sum(1)
  perplexity = metrics.perplexity(float(-log_p[counted].sum()), n)
  error = metrics.perplexity_error(perplexity, np.where(counted, log_p, 0).sum(1) / np.maximum(times, 1), times)
  return [Score.proportion('accuracy', accuracy, n, 1 / V, unigram[0]),
          Score('perplexity', perplexity, n, V, unigram[1], error)]
