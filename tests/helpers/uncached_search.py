"""Caption search without caches: every word takes a whole two-stream forward pass. Slow and simple.

`model.decoding` is tested against it.
"""

from collections.abc import Callable

import numpy as np

LogProbs = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def search(
    log_probs: LogProbs, batch: int, *, beam_size: int, max_len: int, eot: int,
    length_penalty: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
  """Return the most likely hypotheses of each image, kept by a beam search.

  Args:
    log_probs: (images int [R], words int32 [R, n], t) → log-probabilities [R, V] of word t of image `images[r]` after
      the words before it; words from t on are padding. R is always batch · beam_size.
    batch: B. beam_size: k. max_len: n. eot: id that ends a caption.
    length_penalty: finally, a hypothesis of w words before `eot` is ranked by its sum over (w + 1)^length_penalty.

  Returns:
    (tokens int32 [B, k, n], log-probabilities f32 [B, k, n], 0 after `eot`), best first.
  """
  beams = [[((), ())] for _ in range(batch)]  # per image: (words, log-probabilities) of each hypothesis
  for t in range(max_len):
    hypotheses = [(image, hypothesis) for image, beam in enumerate(beams) for hypothesis in beam]
    # Before the first word there is one hypothesis per image; the other rows are padding, so that no shape changes.
    images, words = np.zeros(batch * beam_size, np.int32), np.zeros((batch * beam_size, max_len), np.int32)
    for i, (image, (tokens, _)) in enumerate(hypotheses):
      images[i], words[i, :t] = image, tokens
    candidates = [[] for _ in range(batch)]
    for (image, hypothesis), log_p in zip(hypotheses, np.asarray(log_probs(images, words, t))):
      candidates[image] += _extensions(hypothesis, log_p, beam_size, eot)
    beams = [sorted(c, key=lambda h: -sum(h[1]))[:beam_size] for c in candidates]
  score = lambda h: sum(h[1]) / (sum(w != eot for w in h[0]) + 1) ** length_penalty
  beams = [sorted(beam, key=score, reverse=True) for beam in beams]
  tokens, log_p = ([[h[part] for h in beam] for beam in beams] for part in (0, 1))
  return np.array(tokens, np.int32), np.array(log_p, np.float32)


def _extensions(hypothesis, log_p: np.ndarray, beam_size: int, eot: int):
  """A hypothesis with each of its likeliest next words; after `eot` comes `eot` with log-probability 0."""
  tokens, values = hypothesis
  if eot in tokens:
    return [((*tokens, eot), (*values, 0.0))]
  best = np.argsort(-log_p, kind='stable')[:beam_size]
  return [((*tokens, int(v)), (*values, float(log_p[v]))) for v in best]
