"""From a config to a run that can step: plan, data, mesh, model, optimizer, state."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from uni_moe_jax.config import validate
from uni_moe_jax.config.plan import Plan, make_plan
from uni_moe_jax.data.assemble import Data
from uni_moe_jax.data.pipeline.mixtures import UNBATCHED_FIELDS, Batch, BatchLayout, Mixture
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.model.initialization import boxed_params, init_params
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.parallel import sharding
from uni_moe_jax.tasks import task_types
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.train import optimizer, warm_start, workdir
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.step import Sets, StepSpec, TrainState, init_state, train_step
from uni_moe_jax.train.used_params import expert_part, unit_axes
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.tree_paths import by_path


@dataclasses.dataclass(frozen=True)
class Run:
  """A run ready to start.

  Attributes:
    config, plan, data: what is trained on what.
    mesh: of devices. spec: static arguments of the step (its plan holds every task).
    rules: optimizer rule of every parameter.
    shapes, shardings: of the train state.
  """
  config: ml_collections.ConfigDict
  plan: Plan
  data: Data
  mesh: Mesh
  spec: StepSpec
  rules: Any
  shapes: TrainState
  shardings: TrainState

  def init(self) -> TrainState:
    """A fresh state, made sharded: no device ever holds all of it."""
    def fresh(key):
      return init_state(self.spec, init_params(self.spec.model, key))
    return jax.jit(fresh, out_shardings=self.shardings)(jax.random.key(self.config.seed))

  def state_from(self, params: Any) -> TrainState:
    """The state before the first step of given parameters."""
    return jax.jit(functools.partial(init_state, self.spec), out_shardings=self.shardings)(params)

  def abstract_state(self) -> TrainState:
    """Shapes and shardings of the state: what a checkpoint is restored onto."""
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), self.shapes, self.shardings)

  def mixture(self) -> Mixture:
    """Training batches of this process."""
    c = self.config
    layout = BatchLayout(c.train.grad_accum_steps, self.spec.model.shards, sharding.local_shards(self.mesh))
    examples = {t.name: self.data.examples(t, training=True) for t in self.plan.tasks}
    return Mixture(self.plan, examples, c.seed, c.train.mixture, c.model.max_num_frames, layout)

  def step_fn(self, task: str | None = None) -> 'Step':
    """The jitted step of the whole mixture, or of a step that holds one task."""
    spec = self.spec if task is None else dataclasses.replace(self.spec, plan=self.plan.only(task))

    def step(state, batch, sets, key):
      return train_step(state, batch, sets, jax.random.wrap_key_data(key), spec=spec)

    key = np.asarray(jax.random.key_data(jax.random.key(self.config.seed)))
    return Step(jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None)), key, sharding.replicated(self.mesh))

  def put_batch(self, batch: Batch) -> dict[str, dict[str, jax.Array]]:
    """Places a host batch on the mesh: every process gives its own shards."""
    axis = 0 if self.config.train.grad_accum_steps == 1 else 1
    split, whole = sharding.batch_sharding(self.mesh, axis), sharding.replicated(self.mesh)

    def place(name, value):
      if name in UNBATCHED_FIELDS:
        return jax.make_array_from_process_local_data(whole, value, value.shape)
      shape = (*value.shape[:axis], self.spec.model.shards, *value.shape[axis + 1:])
      return jax.make_array_from_process_local_data(split, value, shape)

    return {group: {k: place(k, v) for k, v in fields.items()} for group, fields in batch.items()}

  def target_sets(self) -> Sets:
    """Target sets on the devices."""
    return put_target_sets(self.data, self.plan, self.mesh)

  def parameter_counts(self) -> dict[str, int]:
    """{'total', 'active'}: of E experts, K serve a token: its kernels are merged from theirs, or it goes to them."""
    total = used = 0
    for path, leaf in by_path(self.shapes.params).items():
      total += leaf.size
      kept = leaf.size
      if expert_part(self.spec.model.spec, path) is not None:
        kept = leaf.size // self.spec.model.spec.num_experts * self.spec.model.spec.top_k
      used += kept
    return {'total': total, 'active': used}


class Step:
  """A run's jitted step: (state, batch, sets) → (state, metrics). The seed goes in as data, and is in no compiled program."""

  def __init__(self, jitted: Any, key: np.ndarray, where: NamedSharding):
    """key: its data, uint32 [2]. where: its place on the mesh, which it takes before the first step."""
    self._jitted, self._key, self._where = jitted, key, where

  def __call__(self, state: TrainState, batch: Batch, sets: Sets) -> tuple[TrainState, dict[str, jax.Array]]:
    return self._jitted(state, batch, sets, self._placed)

  @functools.cached_property
  def _placed(self) -> jax.Array:
    return jax.device_put(self._key, self._where)

  def lower(self, state: TrainState, batch: Batch, sets: Sets) -> Any:
    """As of a jitted function; the arguments may be shapes, on devices that are not there."""
    key = jax.ShapeDtypeStruct(self._key.shape, self._key.dtype, sharding=self._where)
    return self._jitted.lower(state, batch, sets, key)


def model_spec(config: ml_collections.ConfigDict, plan: Plan, data: Data) -> ModelSpec:
  """The model of a run."""
  prefix = None
  if config.model.readout_token != '<spe>':
    ids = data.tokenizer.encode(config.model.readout_token)
    if len(ids) != 1:
      raise UsageError(f'config.model.readout_token={config.model.readout_token!r} is {len(ids)} tokens; it must be one word, or \'<spe>\'.')
    prefix = ids[0]
  return ModelSpec.from_config(
      config, vocab_size=data.tokenizer.size, spe_id=data.tokenizer.spe, prefix_word=prefix,
      temperatures=plan.temperatures, router_tasks=router_tasks(plan),
      head=sum(data.target_sets[t.target_set].size for t in (*plan.tasks, *plan.probes) if t.linear_head),
      label_prompts=tuple((s.name, data.target_sets[s.name].size) for s in plan.sets if s.label_prompts))


def router_tasks(plan: Plan) -> tuple[str, ...]:
  """Names of the task router's table: the built-in ones, then those of the config's own kinds and their families."""
  own = [k.router_task for k in plan.task_types] + [k.target for k in plan.task_types if k.target != 'pair']
  own += [s.condition.task for s in (*plan.sets, *plan.probe_sets)]
  return tuple(dict.fromkeys([*task_types.router_tasks(), *own]))


def put_target_sets(data: Data, plan: Plan, mesh: Mesh) -> Sets:
  """Target sets as device arrays, as the step takes them."""
  return jax.device_put(target_set_arrays(data, plan), sharding.replicated(mesh))


def target_set_arrays(data: Data, plan: Plan) -> dict[str, dict[str, Any]]:
  """Target sets as host arrays: {name: {'buckets': ({'text', 'valid'}, …), 'order': int32 [V]}}."""
  return {s.name: {'buckets': data.target_sets[s.name].buckets, 'order': data.target_sets[s.name].order} for s in plan.sets}


def conditions(plan: Plan) -> tuple[Condition, ...]:
  """Conditions that a plan's arrays have: its kinds' segments, paired texts and target sets, probes included."""
  found = []
  for t in (*plan.tasks, *plan.probes):
    found += [*t.type.conditions, *([t.type.pair_condition] if t.type.target == 'pair' else [])]
  return tuple(dict.fromkeys(found + [s.condition for s in (*plan.sets, *plan.probe_sets)]))


def predictor(run: Run, checkpoints: Checkpoints, step: int | None = None) -> tuple[Predictor, Any]:
  """(predictor, parameters) of a checkpoint, the newest by default: the averaged parameters where the run keeps them.

  A run that trains nothing has none: it is what it starts from.
  """
  if run.plan.tasks:
    state = checkpoints.restore(run.abstract_state(), step)
    params = state.params if state.ema_params is None else state.ema_params
  else:
    params = jax.device_put(load_init_params(run), run.shardings.params)
  sets = {s.name: (s, run.data.target_sets[s.name]) for s in (*run.plan.sets, *run.plan.probe_sets, *run.plan.answer_sets)}
  return Predictor(run.spec.model, params, sets, run.data.tokenizer), params


def load_init_params(run: Run) -> Any:
  """Parameters that start from those of the run in `config.train.init`; says what starts fresh.

  Raises:
    UsageError: nothing was trained there, or the models do not fit, see `warm_start.merge_params`.
  """
  init = run.config.train.init
  with Checkpoints(init, max_to_keep=None) as checkpoints:
    if checkpoints.latest() is None:
      raise UsageError(f'config.train.init={init!r} has no checkpoint yet; train it first.')
    old = checkpoints.restore_params()
  params, added, left = warm_start.merge_params(run.shapes.params, old, init)
  if added:  # only then are fresh ones worth their seconds
    params, _, _ = warm_start.merge_params(init_params(run.spec.model, jax.random.key(run.config.seed)), old, init)
  print(f'starts from {init}; fresh: {", ".join(added) or "nothing"}; left behind: {", ".join(left) or "nothing"}', flush=True)
  return params


def initial_state(run: Run) -> TrainState:
  """The state that training starts from: fresh parameters, or those of another run. Raises what `load_init_params` raises."""
  return run.state_from(load_init_params(run)) if run.config.train.init else run.init()


def _check_router(config: ml_collections.ConfigDict, plan: Plan, old: ml_collections.ConfigDict) -> None:
  """Raises UsageError unless a task router has the names that the run to start from has learnt, and no other."""
  if config.moe.router != 'task' or old.moe.router != 'task':
    return
  learnt, asked = router_tasks(make_plan(old)), router_tasks(plan)
  if new := [name for name in asked if name not in learnt]:
    raise UsageError(f"config.moe.router='task': {config.train.init!r} has no embedding for {', '.join(new)}; it has "
                     f"{', '.join(learnt)}. Give the kind one of these as router_task, or start from a run with another "
                     'router.')
  if asked != learnt:
    raise UsageError(f'config.task_types: the task router of {config.train.init!r} has embeddings for {", ".join(learnt)}; declare '
                     "that run's kinds, in its order.")


def build(config: ml_collections.ConfigDict, devices=None, data: Data | None = None) -> Run:
  """Checks a config and builds its run.

  Args:
    config: see `config.base`.
    devices: that the mesh is made of; all of them by default.
    data: what the run reads; by default what the config names.

  Raises:
    UsageError, MissingFileError: a field that is wrong, data that is not there; see `make_plan` and `Data`.
  """
  plan = make_plan(config)
  if config.train.init:
    _check_router(config, plan, workdir.load_config(config.train.init))
  mesh_fields = {axis: config.mesh[axis] for axis in sharding.AXES}
  mesh = sharding.make_mesh(mesh_fields, devices)
  validate.check_mesh(config, mesh.shape)
  shards = sharding.batch_shards(mesh)
  plan.check_batches(shards, config.train.grad_accum_steps)
  if config.train.interference_every:
    plan.check_halves(shards, config.train.grad_accum_steps)
  data = Data(config, plan) if data is None else data
  model = UniPerceiver(model_spec(config, plan, data), shards, mesh if mesh.size > 1 else None)
  boxed = jax.eval_shape(functools.partial(boxed_params, model), jax.random.key(0))
  params = nn.unbox(boxed)
  tx, rate, rules = optimizer.make_optimizer(
      config, params, functools.partial(unit_axes, model.spec), functools.partial(optimizer.layers_above, model.spec.stack))
  spec = StepSpec(model=model, plan=plan, tx=tx, rate=rate, grad_accum_steps=config.train.grad_accum_steps,
                  ema_decay=config.train.ema_decay, eot=data.tokenizer.eot, vocab_size=data.tokenizer.size,
                  contrastive_reduction=config.train.contrastive_reduction, mask_duplicate_texts=config.train.mask_duplicate_texts,
                  unused_params=config.optim.unused_params, frozen=optimizer.frozen_paths(rules),
                  auxiliary=tuple((n, config.moe[f'{n}_loss_weight']) for n in ('balance', 'importance', 'z') if config.moe[f'{n}_loss_weight']))
  shapes = jax.eval_shape(functools.partial(init_state, spec), params)
  shardings = state_shardings(spec, shapes, sharding.param_shardings(boxed, mesh, config.mesh.fsdp), mesh)
  return Run(config, plan, data, mesh, spec, rules, shapes, shardings)


def state_shardings(spec: StepSpec, shapes: TrainState, params: Any, mesh: Mesh) -> TrainState:
  """Shardings of a train state: moments and averages lie as their parameters do, the rest everywhere."""
  whole: NamedSharding = sharding.replicated(mesh)
  # A frozen parameter has no moments: a node without leaves stands in their place.
  opt_state = optax.tree.map_params(
      spec.tx, lambda moment, s: moment if isinstance(moment, optax.MaskedNode) else s, shapes.opt_state, params,
      transform_non_params=lambda _: whole, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
  return TrainState(step=whole, params=params, opt_state=opt_state, ema_params=params if spec.ema_decay else None, nonfinite_streak=whole,
                    skipped_steps=whole)
