"""Losses over similarity logits, and the sampled softmax. Everything is float32.

A loss returns weighted sums, never a mean. Each task is divided by its weight in the global batch, micro-steps
included, so that no mean of means arises.
"""

import flax
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Tally:
  """Sums over a batch, f32 scalars: weighted loss, weighted hits of the most likely target."""
  loss: jax.Array
  hits: jax.Array


def cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array, smoothing: float = 0.0,
    correction: jax.Array | None = None) -> Tally:
  """Weighted cross-entropy against integer targets.

  Args:
    logits: [B, R, V] f32; R is M, or 1 when every label of an example reads the same row (mixed labels: the soft-target
      loss Σ_m w_m · ce(label_m) of mixup and of soft targets).
    labels: int32 [B, M].
    weights: f32 [B, M]; 0 = not counted.
    smoothing: ε of (1 - ε) · nll + ε · mean over V of -log p.
    correction: f32 [V] of a sampled softmax, see `SampledVocabulary`. The sum of the probabilities and the mean of
      smoothing are then estimates of those over the whole vocabulary.
  """
  likeliest = jnp.argmax(logits, axis=-1)
  if correction is not None:
    correction = correction[None, None]
    logits = logits + correction
  # log p would be logits - top - log_total; it is never stored, because it is as large as the logits.
  top, log_total = _log_total(logits)
  # A sum instead of an index, whose gradient would be another array of the size of the logits.
  is_label = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, None] == labels[..., None]
  shifted = logits - top[..., None]
  nll = log_total - jnp.where(is_label, shifted, 0).sum(-1)
  if smoothing:
    # A sampled word represents exp(correction) words.
    mean = shifted.mean(-1) if correction is None else ((shifted - correction) * jax.nn.softmax(correction)).sum(-1)
    nll = (1 - smoothing) * nll - smoothing * (mean - log_total)
  hits = (likeliest == labels).astype(jnp.float32)
  return Tally((weights * nll).sum(), (weights * hits).sum())


@jax.custom_vjp
def _log_total(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(m, log Σ exp(logits - m)) over the last axis, m the maximum, which counts as a constant."""
  top = logits.max(-1)
  return top, jnp.log(jnp.exp(logits - top[..., None]).sum(-1))


def _log_total_forward(logits):
  top, log_total = _log_total(logits)
  return (top, log_total), (logits, top, log_total)


def _log_total_backward(saved, d):
  """The probabilities again from the logits: to save them would write as much as the logits."""
  logits, top, log_total = saved
  return (d[1][..., None] * jnp.exp(logits - top[..., None] - log_total[..., None]),)


_log_total.defvjp(_log_total_forward, _log_total_backward)


def contrastive(
    logits: jax.Array, text_ids: jax.Array | None, weights: jax.Array, smoothing: float = 0.0,
    reduction: str = 'mean', block: int = 0) -> Tally:
  """InfoNCE in both directions; the other examples of the batch, or of the same block, are the negatives.

  Args:
    logits: [B, B] f32, similarity of input i and text j; the pairs are i = j.
    text_ids: int32 [B]; examples with the same text are not negatives of each other. None: they are (published).
    weights: f32 [B].
    smoothing: as in `cross_entropy`, over the allowed targets.
    reduction: 'mean' of the two directions, or 'sum' (published).
    block: number of consecutive examples that are negatives of each other; 0: all.
  """
  n = logits.shape[0]
  own = jnp.eye(n, dtype=bool)
  masked = jnp.zeros((n, n), bool) if text_ids is None else (text_ids[:, None] == text_ids[None, :]) & ~own
  if block:
    rank = jnp.arange(n) // block
    masked |= rank[:, None] != rank[None, :]
  logits = jnp.where(masked, -jnp.inf, logits)
  allowed = jnp.where(masked, 0.0, 1.0)
  allowed = allowed / allowed.sum(-1, keepdims=True)

  def one_direction(logits):
    log_p = jax.nn.log_softmax(logits)
    # A sum instead of an index: no row moves between devices where rows are sharded.
    nll = -jnp.where(own, log_p, 0.0).sum(-1)
    if smoothing:
      # 0 · (-inf) is NaN in value and gradient: replace masked entries before they are multiplied.
      nll = (1 - smoothing) * nll - smoothing * (allowed * jnp.where(masked, 0.0, log_p)).sum(-1)
    return nll

  nll = one_direction(logits) + one_direction(logits.T)  # `masked` is symmetric
  nll = nll * (0.5 if reduction == 'mean' else 1.0)
  hits = (jnp.argmax(logits, axis=-1) == jnp.arange(n)).astype(jnp.float32)
  return Tally((weights * nll).sum(), (weights * hits).sum())


@flax.struct.dataclass
class SampledVocabulary:
  """Part of the vocabulary that represents all of it in one step.

  The correction is -log of the probability that a word was sampled, 0 for labels: Σ_v exp(logit_v + c_v) is an unbiased
  estimate of the full partition function.
  """
  ids: jax.Array  # int32 [K], distinct words
  index: jax.Array  # int32 [V], position of a word in `ids`; K if it is absent
  correction: jax.Array  # f32 [K]
  dropped: jax.Array  # f32 scalar, labels for which K was too small; they get weight 0


def sample_vocabulary(key: jax.Array, is_label: jax.Array, size: int) -> SampledVocabulary:
  """All labels of a step and a uniform sample, without replacement, of the other words.

  is_label: bool [V], words that are a label with positive weight in any micro-step. size: K ≤ V.
  """
  V = is_label.shape[0]
  order = jax.random.uniform(key, (V,)) + 2.0 * is_label  # of more labels than K each is as likely to be dropped
  _, ids = jax.lax.top_k(order, size)
  index = jnp.full((V,), size, jnp.int32).at[ids].set(jnp.arange(size, dtype=jnp.int32))
  labels = is_label.sum()
  others = jnp.maximum(V - labels, 1)
  drawn = jnp.clip(size - labels, 1, others)
  correction = jnp.where(is_label[ids], 0.0, jnp.log(others / drawn))
  return SampledVocabulary(ids, index, correction, jnp.maximum(labels - size, 0).astype(jnp.float32))
