"""The training step: a pure function of state, batch and target sets.

One pass encodes the batches of all kinds and all target sets together. With accumulation the sets are encoded once, the
micro-steps collect the gradient with respect to their features, and one backward pass carries it through the sets.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from uni_moe_jax.config.plan import Plan, TaskSpec
from uni_moe_jax.model import batching, heads
from uni_moe_jax.model.uni_perceiver import Sequence, UniPerceiver
from uni_moe_jax.parallel import sharding
from uni_moe_jax.train import losses, router_metrics, synonyms
from uni_moe_jax.train.losses import SampledWords, Tally
from uni_moe_jax.train.used_params import touched, used_experts
from uni_moe_jax.utils.tree_paths import path_of

Batch = dict[str, dict[str, jax.Array]]
Sets = dict[str, dict[str, Any]]   # name → {'buckets': ({'text', 'valid'}, …), 'order': int32 [V]}, see `target_sets.TargetSet`
Sampled = dict[str, SampledWords]


@flax.struct.dataclass
class TrainState:
  """Everything that a checkpoint holds.

  Attributes:
    step: int32, steps taken (those that were skipped included).
    params, opt_state: trees. ema: averaged parameters, or None.
    bad: int32, steps in a row whose loss or gradient was not finite. skipped: int32, all of them.
  """
  step: jax.Array
  params: Any
  opt_state: Any
  ema_params: Any
  nonfinite_streak: jax.Array
  skipped_steps: jax.Array


@dataclasses.dataclass(frozen=True)
class StepSpec:
  """Static arguments of the step.

  Attributes:
    model, plan: see their classes. tx, rate: optimizer and its learning rate.
    grad_accum_steps: micro-steps. ema_decay: of averaged parameters, 0 = off.
    eot: id of the last token of every text. vocab_size: V.
    contrastive_reduction, mask_duplicate_texts, unused_params: fields of config.train and config.optim with these names.
    frozen: paths of parameters that do not train.
    auxiliary: (loss of the routers, factor) for every factor that is not 0.
  """
  model: UniPerceiver
  plan: Plan
  tx: optax.GradientTransformation
  rate: Any
  grad_accum_steps: int
  ema_decay: float
  eot: int
  vocab_size: int
  contrastive_reduction: str = 'mean'
  mask_duplicate_texts: bool = True
  unused_params: str = 'update'
  frozen: frozenset[str] = frozenset()
  auxiliary: router_metrics.Factors = ()


def init_state(spec: StepSpec, params: Any) -> TrainState:
  """The state before the first step; to be called under jit, so that no two leaves are one buffer (it is donated)."""
  ema = jax.tree.map(jnp.copy, params) if spec.ema_decay else None
  step, bad, skipped = (jnp.zeros((), jnp.int32) for _ in range(3))
  return TrainState(step, params, spec.tx.init(params), ema, bad, skipped)


def task_fields(spec: StepSpec, batch: Batch, task: TaskSpec) -> dict[str, jax.Array]:
  """One task's part of a (micro-)batch, flat: {'label' [B, M], 'weight' [B, M], 'text_id' [B], …}."""
  start, stop = place(spec, task)
  fields = batching.flat_fields(batch[task.group])
  return {k: fields[k] if k == 'temporal_offset' else batching.task_rows(fields[k], start, stop, spec.model.shards)
          for k in fields if k in ('label', 'weight', 'text_id')}


def place(spec: StepSpec, task: TaskSpec) -> tuple[int, int]:
  """Rows of a task on axis b of its group."""
  start = 0
  for t in spec.plan.groups[task.group]:
    size = t.batch_size // (spec.grad_accum_steps * spec.model.shards)
    if t.name == task.name:
      return start, start + size
    start += size
  raise KeyError(task.name)


def sample_sets(spec: StepSpec, batch: Batch, key: jax.Array) -> Sampled:
  """Sampled words of every set that is scored so: positives of all micro-steps, and a uniform sample."""
  out = {}
  for s in spec.plan.sets:
    if s.softmax == 'sampled':
      positive = jnp.zeros((spec.vocab_size,), bool)
      for t in spec.plan.tasks:
        if t.target_set == s.name:
          fields = batch[t.group]
          # All tasks of the group may be marked: a word more among the positives is still a word with correction 0.
          positive = positive.at[fields['label']].max(fields['weight'] > 0)
      out[s.name] = losses.sample_words(key, positive, min(s.num_sampled, spec.vocab_size))
  return out


def sequences(spec: StepSpec, batch: Batch | None, sets: Sets | None, sampled: Sampled) -> tuple[
    tuple[Sequence, ...], list[tuple[str, str]]]:
  """What a step encodes, and the name of each: ('input' | 'pair', group) or ('set', set)."""
  found, names = [], []
  for group, tasks in spec.plan.groups.items() if batch is not None else ():
    kind, fields = tasks[0].type, batching.flat_fields(batch[group])
    found.append(batching.input_sequence(kind, fields))
    names.append(('input', group))
    if kind.target == 'pair':
      found.append(batching.pair_sequence(kind, fields))
      names.append(('pair', group))
  for s in spec.plan.sets if sets is not None else ():
    if s.is_vocabulary:
      ids = sampled[s.name].ids if s.name in sampled else jnp.arange(spec.vocab_size, dtype=jnp.int32)
      rows = (batching.vocabulary_sequence(s.name, s.condition, ids, spec.eot),)
    else:
      rows = batching.set_sequences(s.name, s.condition, sets[s.name]['buckets'], sets[s.name]['order'], s.label_prompts)
    found += rows
    names += [('set', s.name)] * len(rows)
  return tuple(found), names


def forward(spec: StepSpec, params: Any, batch: Batch | None, sets: Sets | None, sampled: Sampled, key: jax.Array):
  """Encodes batches and target sets in one pass.

  Returns:
    (groups, set_features, collected): groups: {group: (input features [B, R, D], pair features [B, D] or None)};
    set_features: {set: [V, D]}, none of them normalised yet; collected: see `Encoder`.
  """
  encode, names = sequences(spec, batch, sets, sampled)

  def run(model):
    encoded = model.encode(tuple(s.pad_batch(model.shards) for s in encode), key=key)
    return [model.features(r) for r in encoded.hidden], encoded.collected

  features, collected = spec.model.apply({'params': params}, method=run)
  by_name: dict[tuple[str, str], list[jax.Array]] = {}
  for name, f, sequence in zip(names, features, encode, strict=True):
    if name[0] == 'set':  # each device has encoded its rows; all score against all
      f = sharding.replicate(f[:, 0], spec.model.mesh)[:sequence.ids.shape[0]]
    by_name.setdefault(name, []).append(f)
  groups = {g: (by_name['input', g][0], by_name['pair', g][0][:, 0] if ('pair', g) in by_name else None)
            for g in (spec.plan.groups if batch is not None else ())}
  set_features = {}
  for s in spec.plan.sets if sets is not None else ():
    rows = jnp.concatenate(by_name['set', s.name])
    set_features[s.name] = rows if s.is_vocabulary else rows[sets[s.name]['order']]
  return groups, set_features, collected


def _targets(task: TaskSpec, fields: dict[str, jax.Array], sampled: Sampled) -> tuple[jax.Array, jax.Array]:
  """(labels, weights) against the features of the task's set; picks whose word was not sampled count nothing."""
  label, weight = fields['label'], fields['weight']
  if task.target_set in sampled:
    words = sampled[task.target_set]
    label = words.index[label]
    found = label < words.ids.shape[0]
    label, weight = jnp.where(found, label, 0), weight * found
  return label, weight


def norms(spec: StepSpec, batch: Batch, sampled: Sampled) -> dict[str, jax.Array]:
  """Σ weight of every task over the global batch, micro-steps included: what its loss is divided by."""
  out = {}
  for t in spec.plan.tasks:
    def weight_of(micro, t=t):
      fields = task_fields(spec, micro, t)
      return (_targets(t, fields, sampled)[1] if t.target_set else fields['weight']).sum()
    total = weight_of(batch) if spec.grad_accum_steps == 1 else jax.vmap(weight_of)(batch).sum()
    out[t.name] = jnp.maximum(total, 1e-6)
  return out


def score(spec: StepSpec, params: Any, batch: Batch, groups, set_features, sampled: Sampled, norm) -> tuple[
    jax.Array, dict[str, Tally]]:
  """(Σ_task weight · loss, tallies by task, each already divided by the task's norm)."""
  total, tallies = 0.0, {}
  for t in spec.plan.tasks:
    fields = task_fields(spec, batch, t)
    start, stop = place(spec, t)
    features, pair = groups[t.group]
    features = batching.task_rows(features, start, stop, spec.model.shards)
    scale = spec.model.apply({'params': params}, t.temperature, method='scale')
    if t.type.target == 'pair':
      # The pairs of the whole batch, for the inputs that lie here: [B, B] is nowhere whole.
      pairs = sharding.replicate(batching.task_rows(pair, start, stop, spec.model.shards), spec.model.mesh)
      logits = sharding.shard_batch(heads.logits(features[:, 0], pairs, scale), spec.model.mesh)
      text_ids = fields['text_id'] if spec.mask_duplicate_texts else None
      tally = losses.contrastive(logits, text_ids, fields['weight'][:, 0], t.label_smoothing, spec.contrastive_reduction)
    else:
      logits = heads.logits(features, set_features[t.target_set], scale)
      if t.linear_head:
        logits = spec.model.apply({'params': params}, features, logits, method='with_head')
      correction = sampled[t.target_set].correction if t.target_set in sampled else None
      tally = losses.cross_entropy(logits, *_targets(t, fields, sampled), t.label_smoothing, correction)
    tallies[t.name] = jax.tree.map(lambda x, n=norm[t.name]: x / n, tally)
    total = total + t.loss_weight * tallies[t.name].loss
  return total, tallies


def _tokens(spec: StepSpec, found: tuple[Sequence, ...]) -> int:
  """How many tokens sequences have, padding included."""
  count = 0
  for s in found:
    count += 0 if s.text is None else s.text.size
    count += 0 if s.pixels is None else s.pixels.shape[0] * s.pixels.shape[1] * spec.model.spec.patches
  return count


def gradients(spec: StepSpec, params: Any, batch: Batch, sets: Sets, key: jax.Array):
  """(gradient tree, total loss, tallies, extra metrics, chosen experts) of one step.

  Auxiliary losses of routers are those of what is encoded together: with accumulation, of every micro-step and of the target
  sets, averaged by how many tokens each has.
  """
  sampled, sets = sample_sets(spec, batch, key), synonyms.sample_synonyms(sets, key)
  norm = norms(spec, batch, sampled)
  if spec.grad_accum_steps == 1:
    def loss(p):
      groups, set_features, collected = forward(spec, p, batch, sets, sampled, key)
      total, tallies = score(spec, p, batch, groups, set_features, sampled, norm)
      return total + router_metrics.auxiliary(spec.auxiliary, collected), (tallies, collected)
    (total, (tallies, collected)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    chosen, extra = used_experts(collected), router_metrics.metrics(collected)
  else:
    of_sets = _tokens(spec, sequences(spec, None, sets, sampled)[0])
    of_micro = _tokens(spec, sequences(spec, jax.tree.map(lambda x: x[0], batch), None, sampled)[0])
    share = of_micro / (of_sets + spec.grad_accum_steps * of_micro)

    def encode_sets(p):
      _, set_features, collected = forward(spec, p, None, sets, sampled, key)
      auxiliary = (1 - spec.grad_accum_steps * share) * router_metrics.auxiliary(spec.auxiliary, collected)
      return (set_features, auxiliary), collected
    set_features = {}
    if spec.plan.sets:  # pairs alone have none
      (set_features, auxiliary), pull_back, collected = jax.vjp(encode_sets, params, has_aux=True)

    def loss(p, set_features, micro):
      groups, _, collected = forward(spec, p, micro, None, sampled, key)
      total, tallies = score(spec, p, micro, groups, set_features, sampled, norm)
      total = total + share * router_metrics.auxiliary(spec.auxiliary, collected)
      scaled = jax.tree.map(lambda x: share * x, router_metrics.metrics(collected))
      return total, (tallies, used_experts(collected), scaled)

    def one(micro):
      (total, aux), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, set_features, micro)
      return grads, total, aux

    def micro_step(carry, micro):
      return jax.tree.map(jnp.add, carry, one(micro)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, jax.tree.map(lambda x: x[0], batch)))
    ((grads, d_features), total, (tallies, chosen, extra)), _ = jax.lax.scan(micro_step, zeros, batch)
    if spec.plan.sets:
      total = total + auxiliary
      chosen = jax.tree.map(jnp.add, chosen, used_experts(collected))
      extra = jax.tree.map(lambda x, y: x + (1 - spec.grad_accum_steps * share) * y, extra, router_metrics.metrics(collected))
      grads = jax.tree.map(jnp.add, grads, pull_back((d_features, jnp.ones(())))[0])
  if sampled:
    extra['sampled_softmax/dropped_labels'] = sum(s.dropped for s in sampled.values())
  return grads, total, tallies, extra, chosen


def holds(plan: Plan) -> tuple[str, ...]:
  """What a step of the plan holds, in the words of `touched`."""
  found = {s.modality for t in plan.tasks for s in t.type.inputs}
  if plan.sets or any(t.type.target == 'pair' for t in plan.tasks):
    found |= {'text', 'target'}
  if any(t.linear_head for t in plan.tasks):
    found.add('head')
  found |= {f'label_{s.name}' for s in plan.sets if s.label_prompts}
  return tuple(sorted(found))


def train_step(
    state: TrainState, batch: Batch, sets: Sets, key: jax.Array, *, spec: StepSpec) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer step.

  Args:
    state: donated by the caller's jit.
    batch: {group: fields}, see `data.mixtures.Mixture`.
    sets: target sets of the plan.
    key: of the run. It is no part of `spec`: runs that differ in their seed alone share a compiled program.
    spec: static.

  Returns:
    (state, metrics): scalars 'loss/total', 'loss/<task>', 'accuracy/<task>', 'grad_norm', 'learning_rate', …. A step
    whose loss or gradient is not finite changes nothing but the counters.
  """
  key = jax.random.fold_in(key, state.step)
  grads, total, tallies, extra, chosen = gradients(spec, state.params, batch, sets, key)
  # What does not train has no gradient: its norm is not counted, and nothing computes it.
  grads = jax.tree_util.tree_map_with_path(
      lambda path, g: jnp.zeros_like(g) if path_of(path) in spec.frozen else g, grads)
  grad_norm = optax.tree.norm(grads)
  finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)

  def apply(_):
    if spec.unused_params == 'update':
      updates, opt_state = spec.tx.update(grads, state.opt_state, state.params)
    else:
      here = touched(spec.model.spec, state.params, chosen, holds(spec.plan),
                     tuple(t.temperature for t in spec.plan.tasks))
      updates, opt_state = spec.tx.update(grads, state.opt_state, state.params, touched=here)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema_params
    if spec.ema_decay:
      ema = jax.tree.map(lambda e, p: spec.ema_decay * e + (1 - spec.ema_decay) * p, state.ema_params, params)
    return params, opt_state, ema

  params, opt_state, ema = jax.lax.cond(
      finite, apply, lambda _: (state.params, state.opt_state, state.ema_params), None)
  skipped = (~finite).astype(jnp.int32)
  new = TrainState(state.step + 1, params, opt_state, ema, (state.nonfinite_streak + 1) * skipped, state.skipped_steps + skipped)
  metrics = {'loss/total': total, 'grad_norm': grad_norm, 'learning_rate': spec.rate(state.step - state.skipped_steps), 'nonfinite_streak': new.nonfinite_streak,
             'skipped_steps': new.skipped_steps, **extra}
  for name, tally in tallies.items():
    metrics[f'loss/{name}'] = tally.loss
    metrics[f'accuracy/{name}'] = tally.hits
  return new, metrics
