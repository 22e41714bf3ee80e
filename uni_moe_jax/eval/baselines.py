"""Baselines: simple predictors that are computed from the data alone, beside the evaluation.

A baseline sees the same train and test arrays as the model and nothing else. Each function returns predictions (or
indices, or a similarity) in the form that the metrics take, so that baseline and model are scored by the same code. All
of them are deterministic: the same arrays give the same numbers on any machine.

Axis letters: N train examples, Q test examples, V targets, T frames.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence

import numpy as np
import scipy.sparse
from sklearn import exceptions, feature_extraction, linear_model, preprocessing

from uni_moe_jax.eval import metrics
from uni_moe_jax.utils.errors import UsageError

_QUERY_BLOCK, _TRAIN_BLOCK = 512, 4096  # images in one product: 8 MB of distances
_CANDIDATES = 4  # float32 distances pick this many, exact integers choose among them
_ITERATIONS = 100  # of a logistic regression: a baseline must not take longer than the evaluation
_FRAME_SIDE = 16  # frames are averaged down to about this side before the logistic regression


def majority_predictions(train_labels: np.ndarray, count: int) -> np.ndarray:
  """Returns the most frequent train label `count` times, [count]; the smallest of equals."""
  return np.repeat(most_frequent(train_labels, 1), count)


def majority_accuracy(train_labels: np.ndarray, test_labels: np.ndarray, k: int = 1) -> float:
  """Returns the top-k accuracy of always answering the k most frequent train labels.

  Args:
    train_labels: int or string [N]; unlabeled examples must be dropped before.
    test_labels: int or string [Q].
    k: at least 1.
  """
  hits = np.isin(test_labels, most_frequent(train_labels, k))
  return metrics.accuracy(hits, np.ones_like(hits))


def most_frequent(labels: np.ndarray, k: int) -> np.ndarray:
  """Returns the (at most) k most frequent entries of labels [N], the smaller of equals first."""
  values, counts = np.unique(labels, return_counts=True)
  if not values.size or k < 1:
    raise UsageError(f'the {k} most frequent of {values.size} labels: both must be at least 1.')
  return values[np.argsort(-counts, kind='stable')[:k]]


@dataclasses.dataclass(frozen=True)
class Unigram:
  """Scores of a guesser without context on masked tokens."""

  token: int  # the most frequent token of the train split, its only answer
  accuracy: float
  perplexity: float


def unigram(train_counts: np.ndarray, test_tokens: np.ndarray) -> Unigram:
  """Scores train frequencies, with add-one smoothing over V, on the masked tokens of the test.

  Args:
    train_counts: int [V], how often each token occurs in the train split.
    test_tokens: int [M] in [0, V), the true tokens at the masked positions.

  Raises:
    UsageError: there are no tokens, or one is outside [0, V).
  """
  counts, tokens = np.asarray(train_counts, np.float64), np.asarray(test_tokens).ravel()
  if not tokens.size or tokens.min() < 0 or tokens.max() >= counts.size:
    raise UsageError(f'the unigram baseline needs tokens in [0, {counts.size}) and at least one; got '
                     + (f'{tokens.size} from {tokens.min()} to {tokens.max()}.' if tokens.size else 'none.'))
  log_p = np.log(counts + 1) - math.log(counts.sum() + counts.size)
  token = int(counts.argmax())
  return Unigram(token, float(np.mean(tokens == token)), metrics.perplexity(-log_p[tokens].sum(), tokens.size))


def nearest_neighbor(train_pixels: np.ndarray, test_pixels: np.ndarray, limit: int = 30_000,
                      seed: int = 0) -> np.ndarray:
  """Returns for each test image the index of the closest train image (Euclidean), int [Q].

  Index the train labels or names with it: the neighbor's class is the baseline of classification, its name the
  baseline of captioning, and `name_similarity` of its name the baseline of retrieval.

  Args:
    train_pixels: uint8 [N, ...]; of more than `limit`, a subset drawn with `seed` is searched.
    test_pixels: uint8 [Q, ...] with the same trailing axes.
    limit: at most this many train images are searched.
    seed: of the draw.

  Raises:
    UsageError: trailing axes differ, pixels are not uint8, or there are no train images.
  """
  train, test = np.asarray(train_pixels), np.asarray(test_pixels)
  if train.shape[1:] != test.shape[1:] or train.dtype != np.uint8 or test.dtype != np.uint8:
    raise UsageError(f'train pixels {train.dtype}{list(train.shape)} and test pixels '
                     f'{test.dtype}{list(test.shape)} must be uint8 and agree after axis 0.')
  if not len(train) or limit < 1:
    raise UsageError(f'{len(train)} train images and limit {limit}: both must be at least 1.')
  kept = _subset(len(train), limit, seed)
  queries = test.reshape(len(test), -1)
  best = np.zeros((len(test), 0), np.int64)  # [Q, up to _CANDIDATES] train indices
  distance = np.zeros((len(test), 0), np.float32)
  for block in (kept[i:i + _TRAIN_BLOCK] for i in range(0, len(kept), _TRAIN_BLOCK)):
    keys = train[block].reshape(len(block), -1).astype(np.float32)
    norms = np.einsum('nd,nd->n', keys, keys)
    blocks, distances = [], []
    for i in range(0, len(test), _QUERY_BLOCK):
      # The query's own norm is the same for all its candidates, so it is left out.
      d = norms - 2 * (queries[i:i + _QUERY_BLOCK].astype(np.float32) @ keys.T)
      d = np.concatenate([distance[i:i + _QUERY_BLOCK], d], axis=1)
      index = np.concatenate([best[i:i + _QUERY_BLOCK], np.tile(block, (len(d), 1))], axis=1)
      if d.shape[1] > _CANDIDATES:
        near = np.argpartition(d, _CANDIDATES, axis=1)[:, :_CANDIDATES]
        d, index = np.take_along_axis(d, near, 1), np.take_along_axis(index, near, 1)
      distances.append(d)
      blocks.append(index)
    if blocks:
      best, distance = np.concatenate(blocks), np.concatenate(distances)
  return np.array([_closest(train, candidates, query)
                   for candidates, query in zip(best, test)], np.int64)


def _closest(train: np.ndarray, candidates: np.ndarray, query: np.ndarray) -> int:
  # float32 sums of squared bytes are inexact and differ between machines; integers decide, and of
  # equally close images the first.
  candidates = np.sort(candidates)
  gap = train[candidates].astype(np.int64) - query
  return int(candidates[np.square(gap).reshape(len(candidates), -1).sum(axis=1).argmin()])


def name_similarity(neighbor_names: Sequence[str], candidate_names: Sequence[str],
                    seed: int = 0) -> np.ndarray:
  """Returns the word F1 of each neighbor's name with each candidate, float64 [Q, V].

  With `metrics.recall_at_k` this is the nearest-neighbor baseline of retrieval (transposed for the
  other direction) and of zero-shot naming. Equal F1 values are common, and counting ties against
  a baseline would flatter the model, so they are broken by noise far below any difference in F1.

  Args:
    neighbor_names: Q texts, the names of the nearest train images.
    candidate_names: V texts to choose among.
    seed: of the tie-breaking noise.
  """
  left, right = [name.casefold().split() for name in neighbor_names], [
      name.casefold().split() for name in candidate_names]
  # The second "and" of a name is another item than the first: shared items = shared bag of words.
  columns = {item: i for i, item in enumerate(sorted({
      item for words in left + right for item in _numbered(words)}))}
  a, b = _indicators(left, columns), _indicators(right, columns)
  lengths = a.sum(axis=1)[:, None] + b.sum(axis=1)[None, :]
  f1 = 2 * np.asarray((a @ b.T).todense()) / np.maximum(lengths, 1)
  return f1 + np.random.default_rng(seed).uniform(0, 1e-7, f1.shape)


def nearest_name(neighbor_names: Sequence[str], candidate_names: Sequence[str],
                 seed: int = 0) -> np.ndarray:
  """Returns the index of the candidate closest to each neighbor's name by word F1, int [Q]."""
  return name_similarity(neighbor_names, candidate_names, seed).argmax(axis=1)


def _numbered(words: Sequence[str]) -> list[tuple[str, int]]:
  return [(word, words[:i].count(word)) for i, word in enumerate(words)]


def _indicators(bags: Sequence[Sequence[str]], columns: dict[tuple[str, int], int]
                ) -> scipy.sparse.csr_array:
  row = [i for i, words in enumerate(bags) for _ in words]
  column = [columns[item] for words in bags for item in _numbered(words)]
  return scipy.sparse.csr_array((np.ones(len(row)), (row, column)), shape=(len(bags), len(columns)))


def tfidf_logistic(train_texts: Sequence[np.ndarray], train_labels: np.ndarray,
                   test_texts: Sequence[np.ndarray], limit: int = 20_000, seed: int = 0
                   ) -> np.ndarray:
  """Returns labels [Q] predicted by tf-idf of words and word pairs and a logistic regression.

  Args:
    train_texts: one text column ([N] strings,), or two of them for a task on pairs; then the
      shared words and their cosine are features too, as two linear halves cannot see agreement.
    train_labels: int or string [N].
    test_texts: as many columns [Q].
    limit: at most this many train rows, drawn with `seed`, are fitted.
    seed: of the draw.

  Raises:
    UsageError: not one or two columns, or not as many of each.
  """
  if len(train_texts) not in (1, 2) or len(train_texts) != len(test_texts):
    raise UsageError(f'{len(train_texts)} train and {len(test_texts)} test text columns: there '
                     'must be one of each, or two of each.')
  kept = _subset(len(train_labels), limit, seed)
  train_texts = [np.asarray(column)[kept] for column in train_texts]
  train_labels = np.asarray(train_labels)[kept]
  vectorizer = feature_extraction.text.TfidfVectorizer(
      sublinear_tf=True, ngram_range=(1, 2), token_pattern=r'\w+', max_features=20_000,
      min_df=2 if len(kept) >= 1000 else 1, dtype=np.float32)
  vectorizer.fit(np.concatenate(train_texts))
  train, test = ([vectorizer.transform(column) for column in columns]
                 for columns in (train_texts, test_texts))
  if len(train) == 2:
    train, test = _with_agreement(train), _with_agreement(test)
  return _logistic(scipy.sparse.hstack(train, format='csr'), train_labels,
                   scipy.sparse.hstack(test, format='csr'), inverse_penalty=10.0)


def _with_agreement(halves: list[scipy.sparse.csr_matrix]) -> list[scipy.sparse.csr_matrix]:
  shared = halves[0].multiply(halves[1]).tocsr()
  # Rows of tf-idf have length one, so the sum of the products is the cosine.
  cosine = scipy.sparse.csr_matrix(shared.sum(axis=1))
  return [*halves, shared, cosine]


def frame_logistic(train_videos: np.ndarray, train_labels: np.ndarray, test_videos: np.ndarray,
                   frames: str = 'all', limit: int = 6_000, seed: int = 0) -> np.ndarray:
  """Returns labels [Q] predicted by a logistic regression on the pixels of videos.

  The middle frame shows what can be known without motion; all frames, what can be known from pixels alone.

  Args:
    train_videos: uint8 [N, T, H, W] or [N, T, H, W, 3].
    train_labels: int or string [N].
    test_videos: uint8 [Q, T, ...] with the same trailing axes.
    frames: 'all' or 'middle'.
    limit: at most this many train videos, drawn with `seed`, are fitted.
    seed: of the draw.

  Raises:
    UsageError: `frames` is another word.
  """
  if frames not in ('all', 'middle'):
    raise UsageError(f"frames is {frames!r}; it must be 'all' or 'middle'.")
  kept = _subset(len(train_videos), limit, seed)
  scaler = preprocessing.StandardScaler(with_std=False)
  train = scaler.fit_transform(_frame_features(np.asarray(train_videos)[kept], frames))
  test = scaler.transform(_frame_features(np.asarray(test_videos), frames))
  return _logistic(train, np.asarray(train_labels)[kept], test, inverse_penalty=0.1)


def _frame_features(videos: np.ndarray, frames: str) -> np.ndarray:
  if frames == 'middle':
    videos = videos[:, videos.shape[1] // 2:][:, :1]
  count, length, height, width = videos.shape[:4]
  step = max(1, min(height, width) // _FRAME_SIDE)
  tiles = videos[:, :, :height // step * step, :width // step * step].reshape(
      count, length, height // step, step, width // step, step, -1)
  return (tiles.mean(axis=(3, 5), dtype=np.float32) / 255).reshape(count, -1)


def _logistic(train: np.ndarray | scipy.sparse.csr_matrix, labels: np.ndarray,
              test: np.ndarray | scipy.sparse.csr_matrix, inverse_penalty: float) -> np.ndarray:
  if len(np.unique(labels)) == 1:
    return np.repeat(np.asarray(labels)[:1], test.shape[0])  # nothing to fit
  model = linear_model.LogisticRegression(C=inverse_penalty, max_iter=_ITERATIONS)
  with warnings.catch_warnings():
    # Iterations are bounded on purpose.
    warnings.simplefilter('ignore', exceptions.ConvergenceWarning)
    return model.fit(train, labels).predict(test)


def _subset(count: int, limit: int, seed: int) -> np.ndarray:
  if count <= limit:
    return np.arange(count)
  return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))
