"""Caption search without caches: the whole two-stream forward anew for every word. Slow and plain.

What `model.decode` has to equal, in tests, and what it is compared with in speed.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.sequences import Layout
from uni_moe_jax.model.uni_perceiver import Sequence, UniPerceiver
from uni_moe_jax.tasks.task_types import TaskType

LogP = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def search(log_p_of: LogP, batch: int, *, beams: int, length: int, eot: int, penalty: float = 0.0) -> tuple[
    np.ndarray, np.ndarray]:
  """The `beams` likeliest hypotheses of each picture at every step, as lists of (words, log-probabilities).

  Args:
    log_p_of: (pictures int [R], words int32 [R, n], t) → log-probabilities [R, V] of word t of picture `pictures[r]` after
      the words before it; what stands from word t on is filling. R is always batch · beams.
    batch: B. beams: k. length: n. eot: id that ends a caption.
    penalty: in the end, a hypothesis of w words before `eot` is judged by its sum over (w + 1)^penalty.

  Returns:
    (tokens int32 [B, k, n], log-probabilities f32 [B, k, n], 0 after `eot`), best first.
  """
  found = [[((), ())] for _ in range(batch)]
  for t in range(length):
    rows = [(b, words) for b, hypotheses in enumerate(found) for words, _ in hypotheses]
    # Before the first word there is one hypothesis a picture: the other rows are filling, so that no shape changes.
    pictures, words = np.zeros(batch * beams, np.int32), np.zeros((batch * beams, length), np.int32)
    for i, (b, so_far) in enumerate(rows):
      pictures[i], words[i, :t] = b, so_far
    log_p = np.asarray(log_p_of(pictures, words, t))
    candidates = [[] for _ in range(batch)]
    for (b, _), hypothesis, p in zip(rows, (h for f in found for h in f), log_p):
      candidates[b] += _continued(hypothesis, p, beams, eot)
    found = [sorted(c, key=lambda h: -sum(h[1]))[:beams] for c in candidates]
  found = [sorted(f, key=lambda h: -sum(h[1]) / (sum(w != eot for w in h[0]) + 1) ** penalty) for f in found]
  return (np.array([[h[0] for h in f] for f in found], np.int32), np.array([[h[1] for h in f] for f in found], np.float32))


def _continued(hypothesis, log_p: np.ndarray, beams: int, eot: int):
  """A hypothesis with each of its likeliest next words; one that has ended goes on with `eot` at no cost."""
  words, values = hypothesis
  if eot in words:
    return [((*words, eot), (*values, 0.0))]
  best = np.argsort(-log_p, kind='stable')[:beams]
  return [((*words, int(v)), (*values, float(log_p[v]))) for v in best]


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=('temperature', 'spe'))
def next_word(
    model: UniPerceiver, kind: TaskType, params, pixels: jax.Array, vocabulary: jax.Array, words: jax.Array, t: jax.Array, *,
    temperature: str, spe: int) -> jax.Array:
  """log-probabilities [R, V] of word t, by the forward of training on pixels [R, T, H, W, C] and words int32 [R, n].

  Args:
    vocabulary: [V, D] normalised features. t: int32 scalar. temperature: its group. spe: id of queries.
  """
  sequence = Sequence(
      layout=Layout.of_task_type(kind), ids=jnp.arange(words.shape[0], dtype=jnp.uint32), pixels=pixels,
      text=jnp.concatenate([words, jnp.full_like(words, spe)], axis=1))

  def run(m):
    query = jax.lax.dynamic_index_in_dim(m.encode(sequence).hidden, t, axis=1, keepdims=False)
    return m.scale(temperature) * normalize(m.features(query)) @ vocabulary.T
  return jax.nn.log_softmax(model.apply({'params': params}, method=run))
