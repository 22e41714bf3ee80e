"""BLEU-4, ROUGE-L and CIDEr-D of captions, as the COCO caption toolkit counts them, without Java.

Texts are split by `treebank.words`, as there. The numbers are the toolkit's but for a BLEU-4 of 0, see `bleu4`, and for
texts without words: it takes the number of bigrams for the length of a caption, which is always one less than the
number of words, but not for those.
"""

from __future__ import annotations

import collections
import itertools
import math
import types
from collections.abc import Sequence

import numpy as np

from uni_moe_jax.eval import metrics, treebank

_BETA = 1.2  # of ROUGE-L: recall counts β² times as much as precision
_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0  # words: by how much a caption may be too long or too short before CIDEr-D fades


def bleu4(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
  """Returns corpus BLEU-4 in [0, 1] (Papineni et al., 2002), against the length of the closest reference.

  Where no 4-gram matches it is 0; the toolkit, which adds 1e-15 to the matches and 1e-9 to the n-grams, returns less
  than 0.0002 there, or at most 0.032 if no prediction has four words. Arguments and errors as in `rouge_l`.
  """
  import sacrebleu  # Costs time to load, and only captioning needs it.

  pairs = metrics.with_references(predictions, references)
  # sacrebleu wants one list per reference number; None fills up examples that have fewer.
  streams = itertools.zip_longest(*([_joined(one) for one in several] for _, several in pairs))
  return sacrebleu.corpus_bleu(
      [_joined(prediction) for prediction, _ in pairs], [list(s) for s in streams], smooth_method='none',
      tokenize='none').score / 100


def _joined(text: str) -> str:
  return ' '.join(treebank.words(text))


def rouge_l(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> np.ndarray:
  """Returns the ROUGE-L in [0, 1] (Lin, 2004) of each example with β = 1.2: float64 [N].

  P and R are the longest common subsequence over the words of the prediction and of the reference, each maximized over
  the references on its own (as in the COCO toolkit); the score is (1 + β²) P R / (R + β² P).

  Args:
    predictions: N texts.
    references: for each one text, or several.

  Raises:
    UsageError: see `metrics.with_references`.
  """
  from rouge_score import rouge_scorer  # Costs time to load, and only captioning needs it.

  scorer = rouge_scorer.RougeScorer(['rougeL'], tokenizer=types.SimpleNamespace(tokenize=treebank.words))

  def score(prediction: str, several: Sequence[str]) -> float:
    scores = [scorer.score(reference, prediction)['rougeL'] for reference in several]
    P, R = max(s.precision for s in scores), max(s.recall for s in scores)
    return (1 + _BETA ** 2) * P * R / (R + _BETA ** 2 * P) if P and R else 0.0

  return metrics.each_score(score, predictions, references)


def cider_d(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> np.ndarray:
  """Returns the CIDEr-D in [0, 10] of each example: float64 [N].

  Vedantam et al., CVPR 2015, section 4 and variant D of section 7. For n = 1…4, a text is the vector of its n-grams'
  counts times log(N / number of examples with the n-gram in a reference). A pair scores the cosine, with each of the
  prediction's entries clipped at the reference's, times exp(-(difference in words)² / (2 · 6²)); the result is 10 times
  the mean over n and references. This corpus decides which words are rare: the score of one example alone is 0, and
  scores of corpora of different sizes are not comparable. Arguments and errors as in `rouge_l`.
  """
  pairs = [(_counts(prediction), list(map(_counts, several)))
           for prediction, several in metrics.with_references(predictions, references)]
  documents = collections.Counter(gram for _, several in pairs for gram in set().union(*several))
  return np.array([np.mean([_similarity(prediction, one, documents, len(pairs)) for one in several])
                   for prediction, several in pairs])


def _counts(text: str) -> collections.Counter:
  """How often each n-gram of 1 to 4 words occurs; an n-gram is a tuple."""
  words = treebank.words(text)
  return collections.Counter(tuple(words[i:i + n]) for n in range(1, _LONGEST + 1) for i in range(len(words) - n + 1))


def _similarity(
    prediction: collections.Counter, reference: collections.Counter, documents: collections.Counter, N: int) -> float:
  """CIDEr-D of one text against one reference; documents: examples, of N, that have each n-gram in a reference."""
  def vector(counts: collections.Counter, n: int) -> dict[tuple[str, ...], float]:
    # An n-gram of no reference is as rare as one of a single example.
    return {g: c * math.log(N / max(1, documents[g])) for g, c in counts.items() if len(g) == n}

  def length(counts: collections.Counter) -> int:
    return sum(c for g, c in counts.items() if len(g) == 1)

  total = 0.0
  for n in range(1, _LONGEST + 1):
    p, r = vector(prediction, n), vector(reference, n)
    norm = math.hypot(*p.values()) * math.hypot(*r.values())
    if norm:
      total += sum(min(x, r.get(g, 0.0)) * r.get(g, 0.0) for g, x in p.items()) / norm
  fade = math.exp(-(length(prediction) - length(reference)) ** 2 / (2 * _SIGMA ** 2))
  return 10 * fade * total / _LONGEST
