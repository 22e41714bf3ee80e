"""Losses over similarity logits, and the sampled vocabulary. Everything float32.

A loss returns sums and weights, never a mean: tasks are normalised by the weight of the whole global batch, micro-steps
included, so that a mean of means never appears.
"""

import flax
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Tally:
  """Sums over a batch: weighted loss, weighted hits of the most likely target, and the weight itself (f32 scalars)."""
  loss: jax.Array
  hits: jax.Array
  weight: jax.Array


def cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array, smoothing: float = 0.0,
    correction: jax.Array | None = None) -> Tally:
  """Weighted cross-entropy against integer targets.

  Args:
    logits: [B, R, V] f32; R is M, or 1 when every label of a sample reads the same row (mixed labels: the soft-target
      loss Σ_m w_m · ce(label_m) of mixup and of soft targets).
    labels: int32 [B, M].
    weights: f32 [B, M]; 0 = not counted.
    smoothing: ε of (1 - ε) · nll + ε · mean over V of -log p.
    correction: f32 [V], see `SampledVocabulary`: the targets are a sample. The sum of the probabilities and the mean of smoothing
      are then estimates of those over all.

  Returns:
    A `Tally`.
  """
  if correction is not None:
    correction = correction[None, None]
    logits = logits + correction
  log_p = jax.nn.log_softmax(logits)
  log_p = jnp.broadcast_to(log_p, labels.shape + log_p.shape[-1:])
  nll = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
  if smoothing:
    # A word that was drawn stands for exp(correction) of them.
    mean = log_p.mean(-1) if correction is None else ((log_p - correction) * jax.nn.softmax(correction)).sum(-1)
    nll = (1 - smoothing) * nll - smoothing * mean
  hits = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
  return Tally((weights * nll).sum(), (weights * hits).sum(), weights.sum())


def contrastive(
    logits: jax.Array, text_ids: jax.Array | None, weights: jax.Array, smoothing: float = 0.0, both: str = 'mean') -> Tally:
  """InfoNCE in both directions; the other samples of the batch are the negatives.

  Args:
    logits: [B, B] f32, similarity of left sample i with right sample j; i belongs to i.
    text_ids: int32 [B]; two rows with the same text are no negatives of each other. None: they are (published).
    weights: f32 [B].
    smoothing: as in `cross_entropy`, over the allowed targets.
    both: 'mean' of the two directions, or 'sum' (published).

  Returns:
    A `Tally`; `hits` counts left → right.
  """
  n = logits.shape[0]
  own = jnp.eye(n, dtype=bool)
  twins = jnp.zeros((n, n), bool)
  if text_ids is not None:
    twins = (text_ids[:, None] == text_ids[None, :]) & ~own
  logits = jnp.where(twins, -jnp.inf, logits)
  allowed = jnp.where(twins, 0.0, 1.0)
  allowed = allowed / allowed.sum(-1, keepdims=True)

  def one_way(logits):
    log_p = jax.nn.log_softmax(logits)
    # By a sum and not by an index: where rows are spread over devices, no row has to move.
    nll = -jnp.where(own, log_p, 0.0).sum(-1)
    if smoothing:
      # 0 · (-inf) would be NaN in value and gradient: masked entries are replaced before they multiply.
      nll = (1 - smoothing) * nll - smoothing * (allowed * jnp.where(twins, 0.0, log_p)).sum(-1)
    return nll

  nll = one_way(logits) + one_way(logits.T)  # `twins` is symmetric
  nll = nll * (0.5 if both == 'mean' else 1.0)
  hits = (jnp.argmax(logits, axis=-1) == jnp.arange(n)).astype(jnp.float32)
  return Tally((weights * nll).sum(), (weights * hits).sum(), weights.sum())


@flax.struct.dataclass
class SampledVocabulary:
  """A part of the vocabulary that stands for all of it in one step.

  Attributes:
    ids: int32 [K] distinct word ids.
    index: int32 [V], position of a word in `ids`; K where it is absent.
    correction: f32 [K], -log of the probability that the word was drawn, 0 for positives: Σ_v exp(logit_v + c_v) is an
      unbiased estimate of the full partition function.
    dropped: f32 scalar, positives that found no room (their picks are not counted).
  """
  ids: jax.Array
  index: jax.Array
  correction: jax.Array
  dropped: jax.Array


def sample_vocabulary(key: jax.Array, is_positive: jax.Array, size: int) -> SampledVocabulary:
  """All positives of a step and a uniform sample, without replacement, of the other words.

  Args:
    key: random key of the step.
    is_positive: bool [V]: words that some pick of the step (of any micro-step) has as its label.
    size: K ≤ V.
  """
  V = is_positive.shape[0]
  order = jnp.where(is_positive, 2.0, jax.random.uniform(key, (V,)))
  _, ids = jax.lax.top_k(order, size)
  index = jnp.full((V,), size, jnp.int32).at[ids].set(jnp.arange(size, dtype=jnp.int32))
  positives = is_positive.sum()
  rest = jnp.maximum(V - positives, 1)
  drawn = jnp.clip(size - positives, 1, rest)
  correction = jnp.where(is_positive[ids], 0.0, jnp.log(rest / drawn))
  return SampledVocabulary(ids, index, correction, jnp.maximum(positives - size, 0).astype(jnp.float32))
