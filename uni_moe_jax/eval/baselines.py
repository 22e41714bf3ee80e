"""Baselines: simple predictors that are computed from the data alone, beside the evaluation.

A baseline sees the same test arrays as the model, and the train arrays, of many a sample, also where a task trains on
few (`shots`, `train_fraction`). Each function returns predictions (or indices, or a similarity) in the form that the
metrics take, so that baseline and model are scored by the same code. All of them are deterministic: the same arrays
give the same numbers on any machine.

Axis letters: N train examples, Q test examples, V targets, T frames.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy.sparse
import threadpoolctl
from sklearn import exceptions, linear_model, preprocessing
from sklearn.feature_extraction import text
from sklearn.metrics import pairwise

from uni_moe_jax.eval import metrics

_ITERATIONS = 100  # of a logistic regression: a baseline must not take longer than the evaluation
_FRAME_SIDE = 16  # frames are averaged down to about this side before the logistic regression


def majority_predictions(train_labels: np.ndarray, count: int) -> np.ndarray:
  """Returns the most frequent train label `count` times, [count]; the smallest of equals."""
  return np.repeat(most_frequent(train_labels, 1), count)


def majority_accuracy(train_labels: np.ndarray, test_labels: np.ndarray, k: int = 1) -> float:
  """Returns the top-k accuracy on test labels [Q] of always answering the k most frequent train labels [N]."""
  return float(np.mean(np.isin(test_labels, most_frequent(train_labels, k))))


def most_frequent(labels: np.ndarray, k: int) -> np.ndarray:
  """Returns the (at most) k most frequent entries of labels [N], the smaller of equals first."""
  values, counts = np.unique(labels, return_counts=True)
  return values[np.argsort(-counts, kind='stable')[:k]]


def unigram(train_counts: np.ndarray, test_tokens: np.ndarray) -> tuple[float, float]:
  """Scores a guesser without context on masked tokens: train frequencies, with add-one smoothing over V.

  Args:
    train_counts: int [V], how often each token occurs in the train split; its answer is the most frequent one.
    test_tokens: int [M] in [0, V), the true tokens at the masked positions.

  Returns:
    (accuracy, perplexity).
  """
  log_p = np.log(train_counts + 1) - math.log(train_counts.sum() + train_counts.size)
  accuracy = float(np.mean(test_tokens == train_counts.argmax()))
  return accuracy, metrics.perplexity(-log_p[test_tokens].sum(), test_tokens.size)


def nearest_neighbor(train_pixels: np.ndarray, test_pixels: np.ndarray) -> np.ndarray:
  """Returns for each test image the index of the closest train image (Euclidean; the first of equals), int [Q].

  Index the train labels or names with it: the neighbor's class is the baseline of classification, its name the
  baseline of captioning, and `name_similarity` of its name the baseline of retrieval.

  Args:
    train_pixels: uint8 [N, ...].
    test_pixels: uint8 [Q, ...] with the same trailing axes.
  """
  flat = lambda images: images.reshape(len(images), -1).astype(np.float32)
  # scikit-learn sums in float64, where squared distances of bytes are exact, so that the result is that of any machine.
  return pairwise.pairwise_distances_argmin(flat(test_pixels), flat(train_pixels))


def per_question(
    predict: Callable[[np.ndarray, np.ndarray], np.ndarray], train_questions: np.ndarray, test_questions: np.ndarray
) -> np.ndarray:
  """Returns predictions [Q] that are made for each question from the train examples with the same question.

  A question that no train example has is answered from all of them.

  Args:
    predict: indices of train examples [n] and of test examples [m] → predictions [m].
    train_questions, test_questions: strings [N] and [Q].
  """
  _, question = np.unique(test_questions, return_inverse=True)
  order, parts = np.argsort(question, kind='stable'), []
  for group in np.split(order, np.flatnonzero(np.diff(question[order])) + 1):
    train = np.flatnonzero(train_questions == test_questions[group[0]])
    parts.append(predict(train if len(train) else np.arange(len(train_questions)), group))
  return np.concatenate(parts)[np.argsort(order)]


def name_similarity(neighbor_names: Sequence[str], candidate_names: Sequence[str]) -> np.ndarray:
  """Returns the word F1 of each neighbor's name with each candidate, float64 [Q, V].

  With `metrics.mutual_ranks` this is the nearest-neighbor baseline of retrieval, and of zero-shot naming. Equal F1
  values are common, and counting ties against a baseline would flatter the model, so they are broken by seeded noise
  far below any difference in F1.
  """
  bags = text.CountVectorizer(analyzer=_numbered_words).fit_transform([*neighbor_names, *candidate_names])
  left, right = bags[:len(neighbor_names)], bags[len(neighbor_names):]
  lengths = np.asarray(left.sum(axis=1) + right.sum(axis=1).T)
  f1 = 2 * (left @ right.T).toarray() / np.maximum(lengths, 1)
  return f1 + np.random.default_rng(0).uniform(0, 1e-7, f1.shape)


def _numbered_words(name: str) -> list[tuple[str, int]]:
  # The second "and" of a name is another item than the first: shared items = shared bag of words.
  words = name.casefold().split()
  return [(word, words[:i].count(word)) for i, word in enumerate(words)]


def tfidf_logistic(
    train_texts: Sequence[np.ndarray], train_labels: np.ndarray, test_texts: Sequence[np.ndarray]) -> np.ndarray:
  """Returns labels [Q] predicted by tf-idf of words and word pairs and a logistic regression.

  Args:
    train_texts: one text column ([N] strings,), or two of them for a task on pairs; then the shared words and their
      cosine are features too, as two linear halves cannot see agreement.
    train_labels: int or string [N].
    test_texts: as many columns [Q].
  """
  vectorizer = text.TfidfVectorizer(
      sublinear_tf=True, ngram_range=(1, 2), token_pattern=r'\w+', max_features=20_000,
      min_df=2 if len(train_labels) >= 1000 else 1, dtype=np.float32)
  vectorizer.fit(np.concatenate(train_texts))

  def features(columns):
    parts = [vectorizer.transform(column) for column in columns]
    if len(parts) == 2:
      shared = parts[0].multiply(parts[1]).tocsr()
      # Rows of tf-idf have length one, so the sum of the products is the cosine.
      parts += [shared, scipy.sparse.csr_matrix(shared.sum(axis=1))]
    return scipy.sparse.hstack(parts, format='csr')

  return _logistic(features(train_texts), np.asarray(train_labels), features(test_texts), inverse_penalty=10.0)


def frame_logistic(
    train_videos: np.ndarray, train_labels: np.ndarray, test_videos: np.ndarray, frames: str) -> np.ndarray:
  """Returns labels [Q] predicted by a logistic regression on the pixels of videos.

  The middle frame shows what can be known without motion; all frames, what can be known from pixels alone.

  Args:
    train_videos: uint8 [N, T, H, W] or [N, T, H, W, 3].
    train_labels: int or string [N].
    test_videos: uint8 [Q, T, ...] with the same trailing axes.
    frames: 'all' or 'middle'.
  """
  scaler = preprocessing.StandardScaler(with_std=False)
  train = scaler.fit_transform(_frame_features(np.asarray(train_videos), frames))
  test = scaler.transform(_frame_features(np.asarray(test_videos), frames))
  return _logistic(train, np.asarray(train_labels), test, inverse_penalty=0.1)


def _frame_features(videos: np.ndarray, frames: str) -> np.ndarray:
  if frames == 'middle':
    videos = videos[:, videos.shape[1] // 2:][:, :1]
  count, length, height, width = videos.shape[:4]
  step = max(1, min(height, width) // _FRAME_SIDE)
  tiles = videos[:, :, :height // step * step, :width // step * step].reshape(
      count, length, height // step, step, width // step, step, -1)
  return (tiles.mean(axis=(3, 5), dtype=np.float32) / 255).reshape(count, -1)


def _logistic(
    train: np.ndarray | scipy.sparse.csr_matrix, labels: np.ndarray, test: np.ndarray | scipy.sparse.csr_matrix,
    inverse_penalty: float) -> np.ndarray:
  if len(np.unique(labels)) == 1:
    return np.repeat(labels[:1], test.shape[0])  # nothing to fit
  model = linear_model.LogisticRegression(C=inverse_penalty, max_iter=_ITERATIONS)
  # The order of a sum, which depends on the number of threads, would show in predictions, since a bounded fit has not
  # converged: in float32 in more of them. Nor is a second thread faster beside another evaluator.
  with bounded_fits(), threadpoolctl.threadpool_limits(1):
    return model.fit(train.astype(np.float64), labels).predict(test)


@contextlib.contextmanager
def bounded_fits() -> Iterator[None]:
  """A context without warnings that a fit reached its last iteration: iterations are bounded on purpose.

  BLAS has one thread in it. Its number of threads and filters of warnings belong to the process, not to a thread, and
  the end of this context, or of a search of neighbors, restores them for all threads. So enter it around threads that
  fit, too.
  """
  with warnings.catch_warnings(), threadpoolctl.threadpool_limits(1, user_api='blas'):
    warnings.simplefilter('ignore', exceptions.ConvergenceWarning)
    yield


def subset(count: int, limit: int, seed: int = 0) -> np.ndarray:
  """Returns range(count), or `limit` of these, drawn with `seed`, in order."""
  if count <= limit:
    return np.arange(count)
  return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))
