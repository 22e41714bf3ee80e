"""The training step: a pure function of state, batch and target sets.

One pass over the layers encodes the batches of all task types together with all target sets. With gradient
accumulation, target sets are encoded once for all micro-steps.
"""

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from uni_moe_jax.model import flops
from uni_moe_jax.model.encoder import Collected
from uni_moe_jax.parallel import sharding
from uni_moe_jax.train import forward, router_metrics, used_params
from uni_moe_jax.train.forward import Batch, Sampled, StepSpec, TargetSets
from uni_moe_jax.train.losses import Tally
from uni_moe_jax.utils.tree_paths import path_of


@flax.struct.dataclass
class TrainState:
  """Everything that a checkpoint stores. Counters are int32."""
  step: jax.Array  # steps taken, skipped ones included
  params: Any
  opt_state: Any
  ema_params: Any  # exponential moving average of the parameters, or None
  nonfinite_streak: jax.Array  # consecutive steps up to this one whose loss or gradient was not finite
  skipped_steps: jax.Array  # all such steps


@flax.struct.dataclass
class StepOutput:
  """What a step, or a part of it, computes."""
  loss: jax.Array  # f32 scalar, weighted losses of the tasks plus auxiliary losses of the routers
  tallies: dict[str, Tally]  # by task, divided by the task's weight in the global batch
  metrics: dict[str, jax.Array]  # scalars
  used_experts: used_params.UsedExperts
  grads: Any = None  # of the loss with respect to the parameters


def init_state(spec: StepSpec, params: Any) -> TrainState:
  """The state before the first step. Call it under jit: a donated state must not share buffers."""
  ema_params = jax.tree.map(jnp.copy, params) if spec.ema_decay else None
  step, streak, skipped = (jnp.zeros((), jnp.int32) for _ in range(3))
  return TrainState(step, params, spec.optimizer.tx.init(params), ema_params, streak, skipped)


def _router_output(spec: StepSpec, collected: Collected, share: float) -> StepOutput:
  """Auxiliary losses and metrics of the routers of one encoding, times its share of the step."""
  metrics = jax.tree.map(lambda x: share * x, router_metrics.metrics(collected))
  loss = share * router_metrics.auxiliary_loss(spec.auxiliary, collected)
  if spec.auxiliary:
    metrics['router/auxiliary_loss'] = loss
  return StepOutput(loss, {}, metrics, used_params.used_experts(collected))


def _output(
    spec: StepSpec, params: Any, batch: Batch, target_sets: TargetSets, sampled: Sampled, sums: dict[str, jax.Array],
    key: jax.Array, set_features: dict[str, jax.Array] | None = None, share: float = 1.0
) -> tuple[jax.Array, StepOutput]:
  """(loss, output) of a (micro-)batch. set_features: of target sets that are already encoded."""
  features, collected = forward.forward(spec, params, batch, target_sets, sampled, key)
  if set_features is not None:
    features = features.replace(target_sets=set_features)
  loss, tallies = forward.task_losses(spec, params, batch, features, sampled, sums)
  output = _router_output(spec, collected, share)
  output = output.replace(loss=loss + output.loss, tallies=tallies)
  return output.loss, output


def gradients(spec: StepSpec, params: Any, batch: Batch, target_sets: TargetSets, key: jax.Array) -> StepOutput:
  """Loss, gradients and metrics of one step."""
  sampled, target_sets = forward.sample_vocabularies(spec, batch, key), forward.sample_synonyms(target_sets, key)
  sums = forward.weight_sums(spec, batch, sampled)
  if spec.grad_accum_steps == 1:
    grads, output = jax.grad(lambda p: _output(spec, p, batch, target_sets, sampled, sums, key), has_aux=True)(params)
  else:
    grads, output = _accumulated(spec, params, batch, target_sets, sampled, sums, key)
  dropped = {'sampled_softmax/dropped_labels': sum(s.dropped for s in sampled.values())} if sampled else {}
  return output.replace(grads=grads, metrics={**output.metrics, **dropped})


def forward_flops(spec: StepSpec, params: Any, batch: Batch, target_sets: TargetSets) -> int:
  """FLOPs of the forward pass of a step; arguments may be shapes."""
  key, sums = jax.random.key(0), {t.name: np.float32(1) for t in spec.plan.tasks}
  micro = batch if spec.grad_accum_steps == 1 else jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)

  def encode(params, micro, target_sets, of_sets=False):
    sampled, target_sets = forward.sample_vocabularies(spec, micro, key), forward.sample_synonyms(target_sets, key)
    if of_sets:
      return forward.forward(spec, params, {}, target_sets, sampled, key)[0]
    return _output(spec, params, micro, target_sets, sampled, sums, key)[0]

  total = flops.count(encode, params, micro, target_sets)
  if spec.grad_accum_steps == 1 or not target_sets:
    return spec.grad_accum_steps * total
  once = flops.count(functools.partial(encode, of_sets=True), params, micro, target_sets)
  return spec.grad_accum_steps * (total - once) + once


def _accumulated(
    spec: StepSpec, params: Any, batch: Batch, target_sets: TargetSets, sampled: Sampled, sums: dict[str, jax.Array],
    key: jax.Array) -> tuple[Any, StepOutput]:
  """(gradients, output) over micro-steps; target sets are encoded once.

  The micro-steps add up their gradients with respect to the parameters and to the features of the target sets. One
  backward pass through the encoding of the sets then turns the latter into gradients of the parameters. Auxiliary
  losses and metrics of the routers are means over the encodings, each weighted by its number of tokens.
  """
  micro_batch = jax.tree.map(lambda x: x[0], batch)
  micro_tokens = forward.num_tokens(spec, micro_batch, {}, sampled)
  share = micro_tokens / (spec.grad_accum_steps * micro_tokens + forward.num_tokens(spec, {}, target_sets, sampled))

  def encode_sets(params):
    features, collected = forward.forward(spec, params, {}, target_sets, sampled, key)
    output = _router_output(spec, collected, 1 - spec.grad_accum_steps * share)
    return (features.target_sets, output.loss), output

  def micro_step(micro):
    def loss(params, set_features):
      return _output(spec, params, micro, {}, sampled, sums, key, set_features, share)
    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, set_features)

  set_features = {}
  if spec.plan.sets:
    (set_features, set_loss), pull_back, of_sets = jax.vjp(encode_sets, params, has_aux=True)
  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(micro_step, micro_batch))
  ((grads, set_grads), output), _ = jax.lax.scan(
      lambda total, micro: (jax.tree.map(jnp.add, total, micro_step(micro)), None), zeros, batch)
  if spec.plan.sets:
    grads = jax.tree.map(jnp.add, grads, pull_back((set_grads, jnp.ones_like(set_loss)))[0])
    output = jax.tree.map(jnp.add, output.replace(tallies={}), of_sets).replace(tallies=output.tallies)
  return grads, output


def train_step(
    state: TrainState, batch: Batch, target_sets: TargetSets, key: jax.Array, *, spec: StepSpec
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer step.

  Returns:
    (state, metrics): scalars 'loss/total' (the weighted sum of the tasks), 'loss/<task>', 'accuracy/<task>',
    'grad_norm', 'learning_rate', …. A step whose loss or gradient is not finite changes only the counters.
  """
  output = gradients(spec, state.params, batch, target_sets, jax.random.fold_in(key, state.step))
  # A frozen parameter has gradient zero: it does not count in the norm, and XLA computes no gradient for it.
  grads = jax.tree_util.tree_map_with_path(
      lambda path, g: jnp.zeros_like(g) if path_of(path) in spec.frozen else g, output.grads)
  grad_norm = optax.tree.norm(grads)
  is_finite = jnp.isfinite(output.loss) & jnp.isfinite(grad_norm)
  # A choice by number, not a branch: around one, XLA copies the state.
  params, opt_state, ema_params = jax.tree.map(
      lambda new, old: jnp.where(is_finite, new, old), _update(spec, state, grads, grad_norm, output.used_experts),
      (state.params, state.opt_state, state.ema_params))
  skipped = (~is_finite).astype(jnp.int32)
  new_state = TrainState(state.step + 1, params, opt_state, ema_params, (state.nonfinite_streak + 1) * skipped,
                         state.skipped_steps + skipped)
  metrics = {
      'loss/total': sum(t.loss_weight * output.tallies[t.name].loss for t in spec.plan.tasks), 'grad_norm': grad_norm,
      'learning_rate': spec.optimizer.learning_rate(state.step - state.skipped_steps),
      'nonfinite_streak': new_state.nonfinite_streak, 'skipped_steps': new_state.skipped_steps, **output.metrics}
  for name, tally in output.tallies.items():
    metrics |= {f'loss/{name}': tally.loss, f'accuracy/{name}': tally.hits}
  return new_state, metrics


def _update(
    spec: StepSpec, state: TrainState, grads: Any, grad_norm: jax.Array, used_experts: used_params.UsedExperts
) -> tuple[Any, Any, Any]:
  """(parameters, optimizer state, averaged parameters) after a step."""
  extra = {'grad_norm': grad_norm}
  if spec.unused_params != 'update':
    extra['used'] = used_params.used_mask(
        spec.model.spec, state.params, used_experts, used_params.contents(spec.plan),
        tuple(t.temperature for t in spec.plan.tasks))
  updates, opt_state = spec.optimizer.tx.update(grads, state.opt_state, state.params, **extra)
  params = optax.apply_updates(state.params, updates)
  ema_params = state.ema_params
  if ema_params is not None:
    # Of a frozen parameter the difference is 0, where a weighted sum of two equal numbers would be rounded.
    ema_params = jax.tree.map(lambda e, p: e + (1 - spec.ema_decay) * (p - e), ema_params, params)
  return params, opt_state, ema_params


class Step:
  """The jitted step of a run: (state, batch, target sets) → (state, metrics). Donates the buffers of the state.

  The key of the run and the numbers of its spec are arguments of the program: runs that differ in no more share it.
  """

  def __init__(
      self, spec: StepSpec, seed: int, shardings: TrainState, replicated: NamedSharding, deterministic: bool):
    """shardings: of the state. replicated: of key and numbers, which go to the mesh before the first step.

    deterministic: the same arguments give the same bits in every process, on GPUs too.
    """
    def step(state, batch, target_sets, key, numbers):
      key = jax.random.wrap_key_data(key)
      return train_step(state, batch, target_sets, key, spec=spec.with_numbers(numbers))

    # Options of the program: XLA_FLAGS would have to be set before JAX starts, and hold for all programs.
    deterministic = deterministic and sharding.platform(replicated.mesh) == 'gpu'
    options = {'xla_gpu_deterministic_ops': True} if deterministic else {}
    self._jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
    self._key, self._numbers = np.asarray(jax.random.key_data(jax.random.key(seed))), spec.numbers
    self._replicated = replicated

  def __call__(
      self, state: TrainState, batch: Batch, target_sets: TargetSets) -> tuple[TrainState, dict[str, jax.Array]]:
    return self._jitted(state, batch, target_sets, *self._on_devices)

  @property
  def _arguments(self) -> tuple[np.ndarray, Any]:
    return self._key, jax.tree.map(np.float32, self._numbers)

  @functools.cached_property
  def _on_devices(self) -> tuple[jax.Array, Any]:
    return jax.device_put(self._arguments, self._replicated)

  def lower(self, state: TrainState, batch: Batch, target_sets: TargetSets) -> Any:
    """Lowers the step, as a jitted function does; arguments may be shapes on devices that do not exist."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._replicated), self._arguments)
    return self._jitted.lower(state, batch, target_sets, *shapes)
