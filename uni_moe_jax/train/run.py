"""From a config to a run that can step: plan, data, mesh, model, optimizer, state."""

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from uni_moe_jax.config import schema, validate
from uni_moe_jax.config.plan import Plan, make_plan
from uni_moe_jax.data.batches.assemble import Data
from uni_moe_jax.data.batches.mixtures import UNBATCHED_FIELDS, Batch, BatchLayout, Mixture
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.io import storage
from uni_moe_jax.kernels import attention as attention_kernels
from uni_moe_jax.kernels import gmm, projection
from uni_moe_jax.model import flops
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.model.uni_perceiver import UniPerceiver, boxed_params, init_params
from uni_moe_jax.parallel import multihost, sharding
from uni_moe_jax.train import optimizer, warm_start
from uni_moe_jax.train import workdir as workdir_lib
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.forward import StepSpec, TargetSets
from uni_moe_jax.train.step import Step, TrainState, forward_flops, init_state
from uni_moe_jax.train.used_params import expert_sublayer, unit_axes
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.tree_paths import by_path, path_of


@dataclasses.dataclass(frozen=True)
class Run:
  """A run ready to start."""
  config: ml_collections.ConfigDict
  plan: Plan
  data: Data
  mesh: Mesh
  spec: StepSpec  # its plan has every task
  shapes: TrainState
  shardings: TrainState

  def init(self) -> TrainState:
    """A fresh state. It is created sharded, so that no device ever has all of it."""
    fresh = lambda key: init_state(self.spec, init_params(self.spec.model, key))
    return jax.jit(fresh, out_shardings=self.shardings)(jax.random.key(self.config.seed))

  def state_from(self, params: Any) -> TrainState:
    """The state before the first step with given parameters."""
    return jax.jit(functools.partial(init_state, self.spec), out_shardings=self.shardings)(params)

  def abstract_state(self) -> TrainState:
    """Shapes and shardings of the state, as a checkpoint restores it."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.shapes, self.shardings)

  def mixture(self) -> Mixture:
    """Training batches of this process."""
    c = self.config
    layout = BatchLayout(c.train.grad_accum_steps, self.spec.model.shards, sharding.local_shards(self.mesh))
    examples = {t.name: self.data.examples(t, training=True) for t in self.plan.tasks}
    return Mixture(self.plan, examples, c.seed, c.train.mixture, c.model.max_num_frames, layout)

  def step_fn(self, task: str | None = None) -> Step:
    """The jitted step of the whole mixture, or of a step with one task."""
    deterministic = self.config.train.deterministic
    return Step(self._step_spec(task), self.config.seed, self.shardings, sharding.replicated(self.mesh), deterministic)

  def step_flops(self, task: str | None, batch: Batch, target_sets: TargetSets) -> int:
    """FLOPs of the products of a step as in `step_fn`, without those that rematerialization repeats."""
    return flops.TRAIN * forward_flops(self._step_spec(task), self.shapes.params, batch, target_sets)

  def _step_spec(self, task: str | None) -> StepSpec:
    return self.spec if task is None else dataclasses.replace(self.spec, plan=self.plan.only(task))

  @property
  def resumes_exactly(self) -> bool:
    """Whether a resumed run ends bit for bit as one that was not stopped, on the same devices."""
    return sharding.platform(self.mesh) != 'gpu' or self.config.train.deterministic

  @property
  def rounds_products(self) -> bool:
    """Whether training rounds operands of products to bfloat16, see `config.train.cpu_bfloat16`."""
    return projection.choose(self.mesh, self.spec.cpu_bfloat16) == projection.ROUNDED

  def put_batch(self, batch: Batch) -> dict[str, dict[str, jax.Array]]:
    """Puts a host batch on the mesh; every process contributes its own shards."""
    axis = 0 if self.config.train.grad_accum_steps == 1 else 1
    sharded, replicated = sharding.batch_sharding(self.mesh, axis), sharding.replicated(self.mesh)

    def put(name, value):
      if name in UNBATCHED_FIELDS:
        return jax.make_array_from_process_local_data(replicated, value, value.shape)
      shape = (*value.shape[:axis], self.spec.model.shards, *value.shape[axis + 1:])
      return jax.make_array_from_process_local_data(sharded, value, shape)

    return {group: {k: put(k, v) for k, v in fields.items()} for group, fields in batch.items()}

  def predictor(self, params: Any) -> Predictor:
    """A predictor with these parameters and every target set."""
    return Predictor.of(self.spec.model, params, self.plan, self.data)

  def target_sets(self) -> TargetSets:
    """Target sets on the devices."""
    return sharding.on_every_device(target_set_arrays(self.data, self.plan), self.mesh)

  @property
  def class_digests(self) -> dict[str, str]:
    """See `warm_start.class_digests`."""
    names = {name: target.names for name, target in self.data.target_sets.items()}
    return warm_start.class_digests(self.config, self.data.entry_keys, names)

  def parameter_counts(self) -> dict[str, int]:
    """{'total', 'active'}: of E experts, K are active for a token, by merging or by dispatch."""
    spec, params = self.spec.model.spec, by_path(self.shapes.params)
    active = {path: leaf.size // spec.num_experts * spec.top_k if expert_sublayer(spec, path) else leaf.size
              for path, leaf in params.items()}
    return {'total': sum(leaf.size for leaf in params.values()), 'active': sum(active.values())}


def _model_spec(config: ml_collections.ConfigDict, plan: Plan, data: Data) -> ModelSpec:
  prefix = None
  if config.model.readout_token != '<spe>':
    ids = data.tokenizer.encode(config.model.readout_token)
    if len(ids) != 1:
      raise UsageError(f'config.model.readout_token={config.model.readout_token!r} is {len(ids)} tokens; give a word '
                       "that is one token, or '<spe>'.")
    prefix = ids[0]
  return ModelSpec.from_config(
      plan.config, vocab_size=data.tokenizer.size, spe_id=data.tokenizer.spe, prefix_word=prefix,
      temperatures=plan.temperatures, router_tasks=plan.router_tasks,
      head=sum(data.target_sets[t.target_set].size for t in (*plan.tasks, *plan.probes) if t.linear_head),
      label_prompts=tuple((s.name, data.target_sets[s.name].size) for s in plan.sets if s.label_prompts))


def target_set_arrays(data: Data, plan: Plan) -> TargetSets:
  """Target sets as host arrays."""
  sets = ((s.name, data.target_sets[s.name]) for s in plan.sets)
  return {name: {'buckets': s.buckets, 'order': s.order} for name, s in sets}


def find_step(
    config: ml_collections.ConfigDict, plan: Plan, checkpoints: Checkpoints, workdir: str | os.PathLike[str],
    best: bool) -> int:
  """The step of the parameters to read; best: that with the best `train.best_metric` instead of the newest.

  Of a plan without training, which is evaluated zero-shot, it is that of the run in `train.init`.

  Raises:
    UsageError: there is no such checkpoint.
  """
  source, missing = workdir if plan.tasks else config.train.init, 'checkpoint yet; train it first'
  if not best:
    step = checkpoints.latest() if plan.tasks else workdir_lib.saved_step(source)
  else:
    missing = 'best checkpoint; train it with --config.train.best_metric=loss/total, for example'
    with (contextlib.nullcontext(checkpoints) if plan.tasks else
          Checkpoints(source, None, workdir_lib.load_config(source).train.best_metric)) as opened:
      step = opened.best()
  if step is None:
    raise UsageError(f'workdir {source} has no {missing}.')
  return step


def read_params(
    run: Run, checkpoints: Checkpoints, step: int | None = None, averaged: bool = True) -> tuple[Any, int]:
  """(parameters, step) of a checkpoint, default the newest that can be read; averaged ones if the run keeps them.

  A run that trains no task has no checkpoints and uses the parameters that it starts from.
  """
  if not run.plan.tasks:
    return read_init(run, step)
  params = checkpoints.restore_params(step, run.abstract_state().params, averaged=averaged)
  return params, checkpoints.latest() if step is None else step  # only known now: a damaged one is not read


def read_init(run: Run, step: int | None = None) -> tuple[Any, int]:
  """(parameters, step) of the run in `config.train.init`, on the devices of this run; prints which ones are fresh.

  step: of the checkpoint; default: the newest.

  Raises:
    UsageError: that run has no such checkpoint, or the models do not fit, see `warm_start.compare_models`.
  """
  init = run.config.train.init
  with Checkpoints(init, max_to_keep=None) as checkpoints:
    if checkpoints.latest() is None:
      raise UsageError(f'config.train.init={init!r} has no checkpoint yet; train it first.')
    latest = checkpoints.latest() if step is None else step
    multihost.check_same_init(init, workdir_lib.model_fingerprint(init, '', latest))
    # A frozen position table is that of its image size and scale.
    old_config = workdir_lib.load_config(init)
    model, old = run.config.model, old_config.model
    moved = (model.image_size, model.posemb_scale) != (old.image_size, old.posemb_scale)
    old_shapes = checkpoints.param_shapes(step)
    computed = warm_start.of_other_classes(
        warm_start.classes(run.config, run.class_digests, run.shapes.params),
        warm_start.classes(old_config, workdir_lib.class_digests(init), old_shapes))
    if computed and not run.plan.tasks:
      raise UsageError(f'config.train.init={init!r}: {sorted(computed)[0]} of that run is for other classes than those '
                       'of this run, which trains nothing; give the target set the same classes, or train.')
    if model.posemb == old.posemb == 'frozen' and moved:
      computed.add('embed/spatial')
    added, dropped = warm_start.compare_models(run.shapes.params, old_shapes, init, computed)

    def select(params, fresh):
      return {path: x for path, x in flatten_dict(params).items() if ('/'.join(path) in added) == fresh}

    shared = unflatten_dict(select(run.abstract_state().params, fresh=False))
    params = flatten_dict(checkpoints.restore_params(step, shared, partial=True))
    step = checkpoints.latest() if step is None else step
  if added:  # compiling takes seconds: only if needed
    make = jax.jit(lambda key: select(init_params(run.spec.model, key), fresh=True),
                   out_shardings=select(run.shardings.params, fresh=True))
    params |= make(jax.random.key(run.config.seed))
  print(f'starts from {init}; fresh: {", ".join(added) or "nothing"}; dropped: {", ".join(dropped) or "nothing"}',
        flush=True)
  return unflatten_dict(params), step


def initial_state(run: Run) -> TrainState:
  """The state before the first step, with fresh parameters or those of `config.train.init`."""
  return run.state_from(read_init(run)[0]) if run.config.train.init else run.init()


def _check_router(config: ml_collections.ConfigDict, plan: Plan, old: ml_collections.ConfigDict) -> None:
  """Raises UsageError unless a task router has the same names as in the run to start from."""
  if not config.moe.router == old.moe.router == 'task':
    return
  known, names = make_plan(old).router_tasks, plan.router_tasks
  if new := [name for name in names if name not in known]:
    raise UsageError(f"config.moe.router='task': {config.train.init!r} has no embedding for {', '.join(new)}; it has "
                     f"{', '.join(known)}. Give the task type one of these as router_task, or start from a run with "
                     'another router.')
  if names != known:
    raise UsageError(f'config.task_types: the task router of {config.train.init!r} has embeddings for '
                     f"{', '.join(known)}; declare that run's task types, in its order.")


def build(
    config: ml_collections.ConfigDict, devices=None, data: Data | None = None,
    workdir: str | os.PathLike[str] | None = None, trains: bool = True) -> Run:
  """Checks a config and builds its run.

  Args:
    config: of the run.
    devices: of its mesh; default: all.
    data: of the run; default: what the config names.
    workdir: of the run. If it has a checkpoint, the run in `config.train.init`, which may have moved since, is not
      read: the tokenizer is the copy in `workdir`.
    trains: whether its training batches are used, which the mesh must then divide; those of evaluation need not divide.

  Raises:
    UsageError: a field is wrong or data is missing; see `make_plan` and `Data`.
  """
  plan = make_plan(config)
  config = schema.apply_choices(config)
  # A run that trains nothing has its parameters from the other one each time.
  has_started = workdir is not None and plan.tasks and workdir_lib.saved_step(workdir) is not None
  is_new = not has_started and (workdir is None or not (storage.path(workdir) / workdir_lib.CONFIG_FILE).exists())
  if config.train.init and not has_started:
    _check_router(config, plan, workdir_lib.load_config(config.train.init))
  mesh = sharding.make_mesh({axis: config.mesh[axis] for axis in sharding.AXES}, devices)
  _check_layout(config, plan, mesh.shape, trains)
  check_kernels(config, mesh.devices.flat[0])
  shards = sharding.batch_shards(mesh.shape)
  if data is None:
    data = Data(config, plan, workdir_lib.tokenizer_copy(workdir) if has_started else None, is_new)
  model = UniPerceiver(_model_spec(config, plan, data), shards, mesh if mesh.size > 1 else None)
  boxed = jax.eval_shape(functools.partial(boxed_params, model), jax.random.key(0))
  params = nn.unbox(boxed)
  is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)
  axis_names = {path_of(path): x.names if is_box(x) else () for path, x in
                jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)}
  made = optimizer.make_optimizer(
      config, params, functools.partial(unit_axes, model.spec),
      functools.partial(optimizer.layers_above, model.spec.stack), axis_names, sharding.on_one_cpu(mesh))
  weights = {name: config.moe[f'{name}_loss_weight'] for name in ('balance', 'importance', 'z')}
  spec = StepSpec(
      model=model, plan=plan, optimizer=made, grad_accum_steps=config.train.grad_accum_steps,
      ema_decay=config.train.ema_decay, eot=data.tokenizer.eot,
      contrastive_reduction=config.train.contrastive_reduction, mask_duplicate_texts=config.train.mask_duplicate_texts,
      negatives=config.train.negatives, unused_params=config.optim.unused_params,
      frozen=optimizer.frozen_paths(made.groups),
      auxiliary=tuple((name, weight) for name, weight in weights.items() if weight),
      cpu_bfloat16=config.train.cpu_bfloat16 and config.model.dtype == 'float32')
  shapes = jax.eval_shape(functools.partial(init_state, spec), params)
  shardings = _state_shardings(spec, shapes, sharding.param_shardings(boxed, mesh, config.mesh.fsdp), mesh)
  return Run(config, plan, data, mesh, spec, shapes, shardings)


def _check_layout(config: ml_collections.ConfigDict, plan: Plan, mesh: Mapping[str, int], trains: bool) -> None:
  """Raises UsageError if a mesh of these sizes does not divide the model, or the training batches, of a run."""
  validate.check_mesh(plan.config, mesh)
  if not trains:
    return
  shards = sharding.batch_shards(mesh)
  plan.check_batches(shards, config.train.grad_accum_steps)


def _unfitting_kernels(config: ml_collections.ConfigDict, device: jax.Device) -> dict[str, tuple[str, str]]:
  """Fields with a kernel of other devices → (what is wrong, a value that fits). On a CPU all but cuDNN's work."""
  platform, capability = device.platform, sharding.compute_capability(device)
  is_older = capability is not None and capability < sharding.AMPERE
  newer = f'GPUs of compute capability {sharding.AMPERE} or more, and this run has {capability}'
  kernels = {'model.attention_impl': attention_kernels.DEVICES, 'moe.gmm': gmm.DEVICES}
  unfitting = {}
  for field, devices in kernels.items():
    fitting = devices.get(value := config[field])
    if fitting not in (None, platform) and (platform != 'cpu' or value == attention_kernels.CUDNN):
      unfitting[field] = (
          f'is a kernel for {fitting.upper()}s, and this run has devices of type {platform!r}', 'auto')
    elif fitting == 'gpu' and is_older:
      unfitting[field] = f'is a kernel for {newer}', 'auto'
  # XLA does not compile the products of bfloat16 that `jax.nn.dot_product_attention` requires.
  if is_older and config.model.dtype == 'bfloat16':
    unfitting['model.dtype'] = f'is for {newer}', 'float32'
  return unfitting


def check_kernels(config: ml_collections.ConfigDict, device: jax.Device) -> None:
  """Raises UsageError for a kernel, or a type of products, of other devices.

  On another type it would be interpreted, which gives the same results, orders of magnitude more slowly; on older GPUs
  it does not compile.
  """
  for field, (problem, fitting) in _unfitting_kernels(config, device).items():
    raise UsageError(f'config.{field}={config[field]!r} {problem}; set it to {fitting!r}.')


def with_fitting_kernels(config: ml_collections.ConfigDict, device: jax.Device) -> ml_collections.ConfigDict:
  """A config of which `check_kernels` refuses nothing: the parameters of a run serve on every type of device."""
  fields = _unfitting_kernels(config, device)
  if 'model.dtype' in fields:
    print("note: config.model.dtype='bfloat16' {}; products are float32.".format(fields['model.dtype'][0]),
          file=sys.stderr, flush=True)
  if fields:
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({field: fitting for field, (_, fitting) in fields.items()})
  return config


def build_to_read(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str], devices: Sequence[jax.Device] | None = None,
    trains: bool = True) -> Run:
  """`build` of a saved run whose parameters alone are read, with a note if its data has changed.

  devices: of its mesh; default: all of them or, with a note, one if the mesh does not fit.
  """
  plan = make_plan(config)
  if devices is None:
    devices = jax.devices()
    if jax.process_count() == 1:
      try:
        mesh = sharding.mesh_shape({axis: config.mesh[axis] for axis in sharding.AXES}, len(devices))
        _check_layout(config, plan, mesh, trains)
      except UsageError:
        print(f'note: config.mesh of {workdir} does not fit here (devices: {len(devices)}); one device is used.',
              file=sys.stderr, flush=True)
        config, devices = on_one_device(config), devices[:1]
  run = build(with_fitting_kernels(config, devices[0]), devices, workdir=workdir, trains=trains)
  workdir_lib.note_other_data(workdir, run.data.fingerprint)
  return run


def on_one_device(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A copy of a config with a mesh of one device."""
  config = config.copy_and_resolve_references()
  config.update(mesh=dict(replica=1, data=-1, expert=1, model=1, fsdp=False))
  return config


def _state_shardings(spec: StepSpec, shapes: TrainState, params: Any, mesh: Mesh) -> TrainState:
  """Shardings of a train state: moments and averages as their parameters, all else replicated."""
  replicated = sharding.replicated(mesh)
  # A frozen parameter has a node without leaves in place of moments.
  opt_state = optax.tree.map_params(
      spec.optimizer.tx, lambda moment, s: moment if isinstance(moment, optax.MaskedNode) else s, shapes.opt_state,
      params, transform_non_params=lambda _: replicated, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
  ema_params = params if spec.ema_decay else None
  return TrainState(replicated, params, opt_state, ema_params, nonfinite_streak=replicated, skipped_steps=replicated)
