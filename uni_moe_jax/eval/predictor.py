"""The model as evaluators use it: jitted functions for features, target sets and captions.

On a mesh every batch shard computes its examples. All processes make the same calls. Results stay on the devices, where
the next batch can be queued before they are read.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from uni_moe_jax.config.plan import Plan, SetSpec, TaskSpec
from uni_moe_jax.data.batches.assemble import Data
from uni_moe_jax.data.batches.target_sets import TargetSet
from uni_moe_jax.data.text.token_rows import encode_texts, pad_tokens
from uni_moe_jax.data.text.tokenizer import Tokenizer
from uni_moe_jax.eval.batches import Fields
from uni_moe_jax.model import decoding, heads
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.sequences import InputSequence
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.moe import precision
from uni_moe_jax.parallel import sharding
from uni_moe_jax.tasks.task_types import TaskType

INPUTS = ('id', 'pixels', 'text', 'text_valid', 'position')  # fields of a batch that are not targets
_ROWS_AT_ONCE = 4096  # words or names of a target set that are encoded together


class Ranked(NamedTuple):
  """What is kept of the scores of V targets, for each readout of an example: arrays [B, R]."""
  best: jax.Array  # int32, the target with the highest score; of equals the first
  rank: jax.Array  # int32, of the label, 1 is best; ties and NaNs count against the model
  score: jax.Array  # f32, of the label
  is_alone: jax.Array  # bool, whether every other target has a lower score than `best`; never if one is NaN


class Predictor:
  """A trained model as functions of evaluation batches. Target sets are encoded once and kept.

  Fields of a batch are numpy or global arrays [B, …]; every device has the whole result, unless said otherwise.
  """

  def __init__(self, model: UniPerceiver, params, sets: dict[str, tuple[SetSpec, TargetSet]], tokenizer: Tokenizer):
    """model, params: on the model's mesh. sets: every target set in use, by name."""
    self._model, self._params, self._sets, self._tokenizer = model, params, sets, tokenizer
    self._features: dict[str, jax.Array] = {}
    self._decoders: dict[TaskType, decoding.Decoder] = {}

  @classmethod
  def of(cls, model: UniPerceiver, params, plan: Plan, data: Data) -> 'Predictor':
    """A predictor with every target set of a plan."""
    specs = (*plan.sets, *plan.probe_sets)
    return cls(model, params, {s.name: (s, data.target_sets[s.name]) for s in specs}, data.tokenizer)

  @property
  def mesh(self) -> Mesh | None:
    """None: one device."""
    return self._model.mesh

  def inputs(self, task_type: TaskType, fields: Fields) -> jax.Array:
    """Features [B, R, D] of the readout of a task type's input, not normalized."""
    # Labels and paired texts are left out, so that each task type compiles once.
    fields = {k: v for k, v in fields.items() if k in INPUTS}
    return encode(self._model, self._params, InputSequence.of_inputs(task_type, fields))

  def pairs(self, task_type: TaskType, fields: Fields) -> jax.Array:
    """Features [B, D] of the paired texts, not normalized."""
    wanted = {k: fields[k] for k in ('id', 'target', 'target_valid')}
    return encode(self._model, self._params, InputSequence.of_pairs(task_type, wanted))[:, 0]

  def texts(self, task: TaskSpec, texts: list[str]) -> jax.Array:
    """Features [N, D] of texts as the target side of a retrieval task encodes them, not normalized."""
    rows, valid = pad_tokens(encode_texts(texts, self._tokenizer, task.max_len), task.max_len, self._tokenizer.pad)
    return self.pairs(
        task.type, {'id': np.arange(len(texts), dtype=np.uint32), 'target': rows, 'target_valid': valid})

  def target_set(self, name: str) -> jax.Array:
    """Normalized features [V, D] of a target set, on every device; the mean over synonyms."""
    if name not in self._features:
      spec, target = self._sets[name]
      rows = np.concatenate([_without_padding(np.asarray(encode(self._model, self._params, s))[:, 0], s)
                             for s in set_sequences(spec, target, self._tokenizer.eot)])
      if target.buckets and 'count' in target.buckets[0]:
        rows = _mean_of_synonyms(rows, np.concatenate([b['count'] for b in target.buckets]))
      rows = normalize(rows)
      rows = rows if spec.is_vocabulary else rows[target.order]
      mesh = self._model.mesh
      self._features[name] = rows if mesh is None else sharding.on_every_device(rows, mesh)
    return self._features[name]

  def log_probabilities(self, features: np.ndarray | jax.Array, task: TaskSpec) -> jax.Array:
    """log p over a task's target set: features of its inputs [B, R, D] → [B, R, V] f32."""
    return self._log_p(features, task, replicate=True)

  def ranked(self, views: list[jax.Array], task: TaskSpec, labels: np.ndarray | jax.Array) -> Ranked:
    """Ranks of labels int [B, R] by log p over a task's target set; the log p stay where they are computed.

    views: features of the inputs [B, R, D]; those of several views are ranked by the mean of their p. B is a multiple
      of the batch shards, and so is the result sharded.
    """
    scores = [self._log_p(features, task, replicate=False) for features in views]
    return rank(scores[0] if len(scores) == 1 else mean_log_probability(scores), labels)

  def _log_p(self, features: np.ndarray | jax.Array, task: TaskSpec, replicate: bool) -> jax.Array:
    targets = self.target_set(task.target_set)
    return _log_p(self._model, self._params, features, targets, task.temperature, task.linear_head, replicate)

  @staticmethod
  def similarities(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosines of features [B, D] and [C, D]: [B, C]."""
    return np.asarray(heads.logits(left, right, np.float32(1)))

  def captions(
      self, task: TaskSpec, pixels: np.ndarray, beam_size: int = 1, length_penalty: float = 0.0,
      max_len: int = 0, reranker: TaskSpec | None = None) -> list[str]:
    """Captions of images or videos [B, T, H, W, C] by a captioning task; other arguments as in `decoding`.

    Args:
      max_len: of a caption, in tokens; 0: the task's.
      reranker: a retrieval task. Of the captions of a beam the one with the largest sum of its score and its scaled
        similarity to the image is returned: both are log-probabilities, up to a constant of the image. None: the one
        with the largest score.
    """
    options = dict(temperature=task.temperature, spe=self._tokenizer.spe, eot=self._tokenizer.eot,
                   max_len=max_len or task.max_len, beam_size=beam_size, length_penalty=length_penalty)
    tokens, scores = map(np.asarray, _captions(
        tuple(options.items()), self._decoder(task.type), pixels, self.target_set(task.target_set)))
    if reranker is None:
      return [self._tokenizer.decode(row) for row in tokens[:, 0].tolist()]
    captions = [[self._tokenizer.decode(row) for row in beam] for beam in tokens.tolist()]
    best = np.argmax(scores + self._log_similarities(reranker, pixels, captions), axis=1)
    return [beam[i] for beam, i in zip(captions, best, strict=True)]

  def _log_similarities(
      self, task: TaskSpec, pixels: np.ndarray | jax.Array, captions: list[list[str]]) -> np.ndarray:
    """Scaled similarities [B, k] of images and their k captions, by a retrieval task."""
    B, k = len(captions), len(captions[0])
    images = self.inputs(task.type, {'id': np.arange(B, dtype=np.uint32), 'pixels': pixels})[:, 0]
    paired = self.texts(task, list(itertools.chain(*captions))).reshape(B, k, -1)
    scale = self._model.apply({'params': self._params}, task.temperature, method='scale')
    return np.asarray(scale * jnp.einsum(
        'bd,bkd->bk', normalize(images), normalize(paired), precision=precision.EXACT))

  def _decoder(self, task_type: TaskType) -> decoding.Decoder:
    if task_type not in self._decoders:
      self._decoders[task_type] = decoding.Decoder.of(self._model, self._params, task_type)
    return self._decoders[task_type]


def set_sequences(spec: SetSpec, target: TargetSet, eot: int) -> tuple[InputSequence, ...]:
  """The sequences of a target set, each some of the names of one length, or a part of a vocabulary.

  Those of one length have equal shapes, with padding at the end of the last one, and so one program.
  """
  if spec.is_vocabulary:
    words = np.array_split(np.arange(target.size, dtype=np.int32), -(-target.size // _ROWS_AT_ONCE))
    return tuple(InputSequence.of_words(spec.name, spec.condition, ids, eot) for ids in words)
  parts, sizes = [], []
  for bucket in target.buckets:
    names = _names(bucket)
    n = len(names['text'])
    size = -(-n // -(-n // _ROWS_AT_ONCE))
    parts += [{k: x[start:start + size] for k, x in names.items()} for start in range(0, n, size)]
    sizes += [size] * (len(parts) - len(sizes))
  sequences = InputSequence.of_buckets(spec.name, spec.condition, tuple(parts), target.order, spec.label_prompts)
  return tuple(s.pad_batch(size) for s, size in zip(sequences, sizes, strict=True))


def _names(bucket: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """{'text', 'valid' [N, S]} of every name of a bucket's entries, one after the other."""
  if 'count' not in bucket:
    return bucket
  is_name = np.arange(bucket['text'].shape[1]) < bucket['count'][:, None]
  return {k: bucket[k][is_name] for k in ('text', 'valid')}


def _without_padding(rows: np.ndarray, sequence: InputSequence) -> np.ndarray:
  return rows if sequence.text_valid is None else rows[np.asarray(sequence.text_valid).any(axis=1)]


def _mean_of_synonyms(rows: np.ndarray, count: np.ndarray) -> np.ndarray:
  """Features [N, D] of the names of n entries, the first of which has count[0] → [n, D]: means of normalized ones."""
  return np.add.reduceat(np.asarray(normalize(rows)), np.cumsum(count) - count) / count[:, None].astype(rows.dtype)


@functools.partial(jax.jit, static_argnums=0)
def encode(model: UniPerceiver, params, sequence) -> jax.Array:
  """Features [B, R, D] f32 of a sequence's readout, not normalized."""
  def run(m):
    return m.features(m.encode(sequence.pad_batch(m.shards)).hidden)
  with precision.of_evaluation(model.spec.dtype):
    features = model.apply({'params': params}, method=run)
  return sharding.replicate(features, model.mesh)[:sequence.ids.shape[0]]


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _log_p(
    model: UniPerceiver, params, features, targets, temperature: str, head: bool, replicate: bool) -> jax.Array:
  scale = model.apply({'params': params}, temperature, method='scale')
  features = sharding.shard_batch(features, model.mesh)
  logits = heads.logits(features, targets, scale)
  if head:
    logits = model.apply({'params': params}, features, logits, method='with_head')
  return (sharding.replicate if replicate else sharding.shard_batch)(jax.nn.log_softmax(logits), model.mesh)


@jax.jit
def mean_log_probability(log_p: list[jax.Array]) -> jax.Array:
  """The logarithm of the mean p of several log p [B, R, V] of views, also where every p is 0 in float32."""
  return jax.nn.logsumexp(jnp.stack(log_p), axis=0) - math.log(len(log_p))


# Jitted separately from functions that compute scores: if XLA fused them, equal scores could be rounded differently.
@jax.jit
def rank(scores: jax.Array, labels: jax.Array) -> Ranked:
  """Ranks of labels int [B, R] by scores f32 [B, R, V]."""
  is_label = jnp.arange(scores.shape[-1]).reshape(1, 1, -1) == labels[..., None]
  score = jnp.sum(jnp.where(is_label, scores, 0), axis=-1, keepdims=True)  # one number and zeros
  not_lower = ~is_label & ~(scores < score)  # as in `metrics.best_positive_rank`
  highest = (~(scores < scores.max(-1, keepdims=True))).sum(-1, dtype=jnp.int32)  # all where one is NaN
  return Ranked(jnp.argmax(scores, -1).astype(jnp.int32), 1 + not_lower.sum(-1, dtype=jnp.int32), score[..., 0],
                highest == 1)


@functools.partial(jax.jit, static_argnums=0)
def _captions(
    options: tuple, decoder: decoding.Decoder, pixels, words) -> tuple[jax.Array, jax.Array]:
  """Tokens int32 [B, k, n] and scores f32 [B, k] of the captions of a beam, best first."""
  B, model = pixels.shape[0], decoder.step_model
  # Repetitions of the last image fill up the batch shards: they end when it ends.
  pixels = jnp.pad(pixels, ((0, -B % model.shards), *((0, 0),) * 4), mode='edge')
  with precision.of_evaluation(model.spec.dtype):
    captions = decoding.beam_search(decoder, pixels, words, **dict(options))
  return tuple(sharding.replicate(x, model.mesh)[:B] for x in (captions.tokens, captions.scores))
