"""The forward pass of a step: from a batch and target sets to features and losses of the tasks."""

import dataclasses
import math
import zlib
from typing import Any

import flax
import jax
import jax.numpy as jnp

from uni_moe_jax.config.plan import Plan, TaskSpec
from uni_moe_jax.model import heads
from uni_moe_jax.model.encoder import Collected
from uni_moe_jax.model.sequences import InputSequence, flat_fields, flatten, map_joined, take_rows
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.parallel import sharding
from uni_moe_jax.train import losses
from uni_moe_jax.train.losses import SampledVocabulary, Tally
from uni_moe_jax.train.optimizer import Optimizer
from uni_moe_jax.train.router_metrics import LossWeights

Batch = dict[str, dict[str, jax.Array]]  # {group: {field: array}}, see `data.pipeline.mixtures.Mixture`
# {set: {'buckets': ({'text', 'valid'}, …), 'order': int32 [V]}}, see `data.pipeline.target_sets.TargetSet`
TargetSets = dict[str, dict[str, Any]]
Sampled = dict[str, SampledVocabulary]


@dataclasses.dataclass(frozen=True)
class StepSpec:
  """Static arguments of the step; see also the fields of config.train and config.optim with the same names."""
  model: UniPerceiver
  plan: Plan
  optimizer: Optimizer
  grad_accum_steps: int  # number of micro-steps
  ema_decay: float  # 0: no averaged parameters
  eot: int  # token id that ends every text
  contrastive_reduction: str = 'mean'
  mask_duplicate_texts: bool = True
  negatives: str | int = 'global'
  unused_params: str = 'update'
  frozen: frozenset[str] = frozenset()  # paths of parameters that do not train
  auxiliary: LossWeights = ()  # without those of weight 0
  cpu_bfloat16: bool = False

  @property
  def numbers(self) -> dict[str, Any]:
    """Numbers that a compiled step takes as arguments instead of containing them."""
    return {'optimizer': self.optimizer.numbers, 'ema_decay': self.ema_decay,
            'loss_weights': tuple(t.loss_weight for t in self.plan.tasks),
            'auxiliary_weights': tuple(weight for _, weight in self.auxiliary)}

  def with_numbers(self, numbers: dict[str, Any]) -> 'StepSpec':
    """The step with other numbers of the same structure."""
    weights = zip(self.plan.tasks, numbers['loss_weights'], strict=True)
    names = (name for name, _ in self.auxiliary)
    return dataclasses.replace(
        self, optimizer=dataclasses.replace(self.optimizer, numbers=numbers['optimizer']),
        plan=dataclasses.replace(self.plan, tasks=tuple(dataclasses.replace(t, loss_weight=w) for t, w in weights)),
        ema_decay=numbers['ema_decay'], auxiliary=tuple(zip(names, numbers['auxiliary_weights'], strict=True)))

  @property
  def task_slices(self) -> dict[str, slice]:
    """{task: its rows in a shard of its group's (micro-)batch}."""
    return self.plan.task_slices(self.grad_accum_steps * self.model.shards)


@flax.struct.dataclass
class StepInputs:
  """What one step encodes. Hidden states and features have the same structure."""
  inputs: dict[str, Any]  # {group: input side of the group's batch}
  pairs: dict[str, Any]  # {group: paired texts}, for groups whose targets are the texts of the batch itself
  target_sets: dict[str, Any]  # {set: a tuple with one sequence per length bucket}


def sample_synonyms(target_sets: TargetSets, key: jax.Array) -> TargetSets:
  """Draws a synonym of every entry: {'text' [n, Y, S], 'valid', 'count' [n]} → {'text' [n, S], 'valid'}.

  The key is the step's, so that all micro-steps and devices draw the same.
  """
  def sample(name, i, bucket):
    if 'count' not in bucket:
      return bucket
    salted = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), i)
    u = jax.random.uniform(salted, bucket['count'].shape)
    index = jnp.minimum((u * bucket['count']).astype(jnp.int32), bucket['count'] - 1)[:, None, None]
    return {k: jnp.take_along_axis(bucket[k], index, axis=1)[:, 0] for k in ('text', 'valid')}

  return {name: {**s, 'buckets': tuple(sample(name, i, b) for i, b in enumerate(s['buckets']))}
          for name, s in target_sets.items()}


def sample_vocabularies(spec: StepSpec, batch: Batch, key: jax.Array) -> Sampled:
  """{set: labels of all micro-steps and a uniform sample of other words}, for sampled softmaxes."""
  sampled, vocab_size = {}, spec.model.spec.vocab_size
  for s in (s for s in spec.plan.sets if s.softmax == 'sampled'):
    is_label = jnp.zeros((vocab_size,), bool)
    for fields in (batch[t.group] for t in spec.plan.tasks if t.target_set == s.name):
      # Labels of the group's other tasks may be among them: one more label is a word with correction 0.
      is_label = is_label.at[fields['label']].max(fields['weight'] > 0)
    sampled[s.name] = losses.sample_vocabulary(key, is_label, min(s.num_sampled, vocab_size))
  return sampled


def step_inputs(spec: StepSpec, batch: Batch, target_sets: TargetSets, sampled: Sampled) -> StepInputs:
  """The sequences of a step; an empty `batch` or `target_sets` gives those of the other alone."""
  inputs, pairs, sets = {}, {}, {}
  for group, tasks in spec.plan.groups.items():
    if group in batch:
      task_type, fields = tasks[0].type, flat_fields(batch[group])
      inputs[group] = InputSequence.of_inputs(task_type, fields)
      if task_type.target == 'pair':
        pairs[group] = InputSequence.of_pairs(task_type, fields)
  for s in (s for s in spec.plan.sets if s.name in target_sets):
    if s.is_vocabulary:
      ids = sampled[s.name].ids if s.name in sampled else jnp.arange(spec.model.spec.vocab_size, dtype=jnp.int32)
      sets[s.name] = (InputSequence.of_words(s.name, s.condition, ids, spec.eot),)
    else:
      arrays = target_sets[s.name]
      sets[s.name] = InputSequence.of_buckets(s.name, s.condition, arrays['buckets'], arrays['order'], s.label_prompts)
  return StepInputs(inputs, pairs, sets)


def forward(
    spec: StepSpec, params: Any, batch: Batch, target_sets: TargetSets, sampled: Sampled, key: jax.Array | None
) -> tuple[StepInputs, Collected]:
  """Encodes a batch and target sets in one pass; either may be empty.

  Returns:
    (features, what the encoder collected). Features are float32 and not normalized: inputs {group: [B, R, D]},
    pairs {group: [B, D]}, target_sets {set: [V, D], on every device}.
  """
  sequences = step_inputs(spec, batch, target_sets, sampled)

  def encode(model):
    is_leaf = lambda x: isinstance(x, InputSequence)
    padded = jax.tree.map(lambda s: s.pad_batch(model.shards), sequences, is_leaf=is_leaf)
    encoded = model.encode(padded, key=key)
    hidden, structure = jax.tree.flatten(encoded.hidden)
    return structure.unflatten(map_joined(model.features, hidden, model.shards)), encoded.collected

  model = spec.model.clone(spec=dataclasses.replace(spec.model.spec, cpu_bfloat16=spec.cpu_bfloat16))
  features, collected = model.apply({'params': params}, method=encode)
  sets = {}
  for name, buckets in features.target_sets.items():
    # Each device has encoded its share of the entries; all devices score against all of them.
    rows = jnp.concatenate([sharding.replicate(f[:, 0], spec.model.mesh)[:sequence.ids.shape[0]]
                            for f, sequence in zip(buckets, sequences.target_sets[name], strict=True)])
    sets[name] = rows[target_sets[name]['order']] if target_sets[name]['buckets'] else rows  # vocabularies are in order
  return features.replace(pairs={g: f[:, 0] for g, f in features.pairs.items()}, target_sets=sets), collected


def _task_rows(spec: StepSpec, task: TaskSpec, x: jax.Array) -> jax.Array:
  return take_rows(x, spec.task_slices[task.name], spec.model.shards)


def task_fields(spec: StepSpec, batch: Batch, task: TaskSpec) -> dict[str, jax.Array]:
  """A task's part of a (micro-)batch: {'label' [B, M], 'weight' [B, M]} or {'text_id' [B], 'weight' [B, 1]}."""
  fields = batch[task.group]
  return {k: _task_rows(spec, task, flatten(fields[k])) for k in ('label', 'weight', 'text_id') if k in fields}


def _targets(task: TaskSpec, fields: dict[str, jax.Array], sampled: Sampled) -> tuple[jax.Array, jax.Array]:
  """(labels, weights) against the features of the task's set; labels that were not sampled get weight 0."""
  label, weight = fields['label'], fields['weight']
  if task.target_set in sampled:
    vocabulary = sampled[task.target_set]
    label = vocabulary.index[label]
    is_sampled = label < vocabulary.ids.shape[0]
    label, weight = jnp.where(is_sampled, label, 0), weight * is_sampled
  return label, weight


def weight_sums(spec: StepSpec, batch: Batch, sampled: Sampled) -> dict[str, jax.Array]:
  """{task: Σ weight over the global batch, micro-steps included}: what the task's loss is divided by."""
  sums = {}
  for t in spec.plan.tasks:
    def weight_of(micro, t=t):
      fields = task_fields(spec, micro, t)
      return (_targets(t, fields, sampled)[1] if t.target_set else fields['weight']).sum()
    total = weight_of(batch) if spec.grad_accum_steps == 1 else jax.vmap(weight_of)(batch).sum()
    sums[t.name] = jnp.maximum(total, 1e-6)
  return sums


def _tally(spec: StepSpec, params: Any, task: TaskSpec, batch: Batch, features: StepInputs, sampled: Sampled) -> Tally:
  """Sums over one task's rows of the batch."""
  fields, inputs = task_fields(spec, batch, task), _task_rows(spec, task, features.inputs[task.group])
  scale = spec.model.apply({'params': params}, task.temperature, method='scale')
  if task.type.target == 'pair':
    # Every device scores its inputs against the texts of the global batch; no device has all of the [B, B] logits.
    pairs = sharding.replicate(_task_rows(spec, task, features.pairs[task.group]), spec.model.mesh)
    logits = sharding.shard_batch(heads.logits(inputs[:, 0], pairs, scale), spec.model.mesh)
    text_ids = fields['text_id'] if spec.mask_duplicate_texts else None
    weights = fields['weight'][:, 0]
    block = 0 if spec.negatives == 'global' else spec.negatives
    return losses.contrastive(logits, text_ids, weights, task.label_smoothing, spec.contrastive_reduction, block)
  logits = heads.logits(inputs, features.target_sets[task.target_set], scale)
  if task.linear_head:
    logits = spec.model.apply({'params': params}, inputs, logits, method='with_head')
  correction = sampled[task.target_set].correction if task.target_set in sampled else None
  return losses.cross_entropy(logits, *_targets(task, fields, sampled), task.label_smoothing, correction)


def task_losses(
    spec: StepSpec, params: Any, batch: Batch, features: StepInputs, sampled: Sampled, sums: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, Tally]]:
  """(Σ_task weight · loss, {task: tally / `sums` of the task})."""
  total, tallies = 0.0, {}
  for t in spec.plan.tasks:
    tally = _tally(spec, params, t, batch, features, sampled)
    tallies[t.name] = jax.tree.map(lambda x, n=sums[t.name]: x / n, tally)
    total = total + t.loss_weight * tallies[t.name].loss
  return total, tallies


def num_tokens(spec: StepSpec, batch: Batch, target_sets: TargetSets, sampled: Sampled) -> int:
  """Number of tokens that `forward` encodes, padding included."""
  inputs = step_inputs(spec, batch, target_sets, sampled)
  sequences = jax.tree.leaves(inputs, is_leaf=lambda x: isinstance(x, InputSequence))
  num_frames = sum(math.prod(s.pixels.shape[:2]) for s in sequences if s.pixels is not None)
  return sum(s.text.size for s in sequences if s.text is not None) + num_frames * spec.model.spec.patches
