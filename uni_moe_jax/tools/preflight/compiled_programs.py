"""The real programs of a run, compiled for devices that are not there: its training step and its evaluation."""

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import tensorflow as tf

from uni_moe_jax.config.plan import TaskSpec, make_plan
from uni_moe_jax.data.pipeline.declared_data import DeclaredData
from uni_moe_jax.data.pipeline.mixtures import UNBATCHED_FIELDS
from uni_moe_jax.eval import predictor
from uni_moe_jax.model import batching
from uni_moe_jax.parallel import sharding
from uni_moe_jax.tools.preflight import cost, hlo, libtpu_plan
from uni_moe_jax.tools.preflight.topology import Topology
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train.run import Run
from uni_moe_jax.utils.errors import UsageError

# Which program: of a training step, None or the task of a sampled mixture; or this one.
EVALUATION = ('evaluation',)
Which = str | None | tuple[str]
# Bytes of program for each of its fusions: the most that was seen of models of 768 channels and more.
_OF_A_FUSION = 0.11 * 2**20
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device while a program runs.

  Attributes:
    params, optimizer: of the train state (averaged parameters count as the optimizer's).
    inputs: the rest of what goes in: batch, target sets, what padding adds.
    results: what comes out and does not take the place of something that went in.
    temporaries: activations, gradients and all else that lives inside. code: the program; of a TPU an estimate, see `_OF_A_FUSION`.
  """
  params: float
  optimizer: float
  inputs: float
  results: float
  temporaries: float
  code: float

  @property
  def total(self) -> float:
    return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    name: 'train step', or what is evaluated.
    examples: over all devices, that one call serves.
    memory: None where the compiler gave up because the program is too large.
    needs: bytes that it says it needs, or None. cost: of one device, None where there is no program.
    seconds: tracing, lowering and compiling; for a TPU up to its plan, see `planned`.
  """
  name: str
  examples: int
  memory: Memory | None
  needs: float | None
  cost: cost.Cost | None
  seconds: float

  def fits(self, memory: float | None) -> bool:
    """Whether a device of so many bytes can run it; None: any can."""
    return self.memory is not None and (memory is None or self.memory.total <= memory)


def prepare(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> Run:
  """The run of a config on devices that may not be there, and on data that is not there.

  Raises:
    UsageError: see `setup.build` and `DeclaredData`.
  """
  plan = make_plan(config)
  if config.train.init:
    raise UsageError(f'config.train.init={config.train.init!r}: preflight looks at runs that start fresh; set it to \'\', the '
                     'step is the same.')
  plan.check_trains()
  return train_run.build(config, devices, DeclaredData(config, plan))


def state_bytes(run: Run) -> tuple[float, float]:
  """(parameters, optimizer) of one device, averaged parameters with the optimizer's; computed, not compiled."""
  def of(shapes, shardings):
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return float(sum(np.prod(where.shard_shape(s.shape)) * s.dtype.itemsize for s, where in leaves))
  params, all_of_it = of(run.shapes.params, run.shardings.params), of(run.shapes, run.shardings)
  return params, all_of_it - params


def train_step(run: Run, task: str | None, where: Topology | None = None) -> Program:
  """The training step of the whole mixture, or of one task.

  Args:
    run: see `prepare`. task: of a 'one_task' mixture; None: all of them. where: TPUs; None: what this process has.
  """
  name = 'train step' if task is None else f'train step, {task}'
  return _program(name, sum(t.batch_size for t in _trained(run, task)), run, task, where, *state_bytes(run))


def lowered(run: Run, which: Which) -> jax.stages.Lowered:
  """A training step or the evaluation before it is compiled; see `train_step`, `evaluation`."""
  if which != EVALUATION:
    return run.step_fn(which).lower(run.abstract_state(), batch_shapes(run, _trained(run, which)), set_shapes(run))
  whole = sharding.replicated(run.mesh)
  sequence = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), evaluated(run)[-1])
  return predictor.encode.lower(run.spec.model, run.abstract_state().params, sequence)


def _trained(run: Run, task: str | None) -> Sequence[TaskSpec]:
  return run.plan.tasks if task is None else run.plan.only(task).tasks


def steps(run: Run) -> list[str | None]:
  """What one program each is compiled for: None of a mixed step; of a sampled mixture, per kind, the task with most tokens."""
  if run.config.train.mixture == 'all_tasks':
    return [None]
  heaviest: dict[str, TaskSpec] = {}
  for t in sorted(run.plan.tasks, key=lambda t: _tokens(run, t)):
    heaviest[t.type.name] = t
  return [t.name for t in heaviest.values()]


def evaluation(run: Run, where: Topology | None = None) -> Program:
  """Features of what evaluation encodes at once, see `evaluated`; `where` as in `train_step`."""
  name, examples, _ = evaluated(run)
  return _program(f'evaluation, {name}', examples, run, EVALUATION, where, state_bytes(run)[0], 0.0)


def evaluated(run: Run) -> tuple[str, int, Any]:
  """(what, how many rows, the shapes of the sequence) of what evaluators encode at once and has most tokens: the inputs of a
  batch, or texts of a target set. A run without evaluators is asked the tasks that it trains, in their batches."""
  asked = [dataclasses.replace(e.task, batch_size=e.batch_size) for e in run.plan.evaluations] or run.plan.tasks
  task = max(asked, key=lambda t: _tokens(run, t))
  fields = {k: jax.ShapeDtypeStruct((task.batch_size, *shape), dtype)
            for k, (shape, dtype) in _fields(run, task, training=False).items() if k in predictor.INPUTS}
  of_inputs = jax.eval_shape(lambda f: batching.input_sequence(task.type, f), fields)
  found = [(_tokens(run, task), task.type.name, task.batch_size, of_inputs)]
  specs = {s.name: s for s in (*run.plan.sets, *run.plan.probe_sets)}
  for name in sorted({t.target_set for t in asked if t.target_set}):
    texts = lambda: predictor.set_sequences(specs[name], run.data.sets[name], run.data.tokenizer.eot)
    for sequence in jax.eval_shape(texts):
      rows, length = sequence.text.shape
      found.append((rows * (1 + length), f'target set {name}', rows, sequence))
  _, what, rows, sequence = max(found, key=lambda one: one[0])
  return what, rows, sequence


def batch_shapes(run: Run, tasks: Sequence[TaskSpec]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """Shapes and shardings of a batch, as `Run.put` places it: {group: {field: [accum,] shards, b, …}}."""
  accum, shards = run.config.train.grad_accum_steps, run.spec.model.shards
  axis = 0 if accum == 1 else 1
  groups: dict[str, list[TaskSpec]] = {}
  for t in tasks:
    groups.setdefault(t.group, []).append(t)
  batch = {}
  for group, members in groups.items():
    lead = (accum,) * axis
    rows = sum(t.batch_size for t in members) // (accum * shards)
    fields = {k: jax.ShapeDtypeStruct((*lead, shards, rows, *shape), dtype, sharding=sharding.batch_sharding(run.mesh, axis))
              for k, (shape, dtype) in _fields(run, members[0], training=True).items()}
    if 'pixels' in fields:
      [name] = UNBATCHED_FIELDS
      fields[name] = jax.ShapeDtypeStruct(lead, np.int32, sharding=sharding.replicated(run.mesh))
    batch[group] = fields
  return batch


def _fields(run: Run, task: TaskSpec, training: bool) -> Mapping[str, tuple[tuple[int, ...], np.dtype]]:
  """{field: (shape of one example, dtype)}: traced, never computed."""
  make = run.data.examples(task, training=training).make
  traced = tf.function(make).get_concrete_function(tf.TensorSpec([2], tf.int64), tf.TensorSpec([2], tf.uint64))
  found = {k: (tuple(v.shape[1:]), np.dtype(v.dtype.as_numpy_dtype)) for k, v in traced.structured_outputs.items()}
  if training and task.mixes or task.type.readout == 'slot' and task.max_predictions:  # two classes, or several answers
    found |= {k: ((2 if task.mixes else task.max_predictions,), found[k][1]) for k in ('label', 'weight')}
  return {**found, 'id': ((), np.dtype(np.uint32))}


def _tokens(run: Run, task: TaskSpec) -> int:
  """A measure of a task's work: how many tokens its inputs and paired texts have."""
  fields, spec = _fields(run, task, training=True), run.spec.model.spec
  frames = fields['pixels'][0][0] if 'pixels' in fields else 0
  words = sum(fields[k][0][0] for k in ('text', 'target') if k in fields)
  return task.batch_size * (1 + frames * spec.patches + words)


def set_shapes(run: Run):
  """Shapes and shardings of the target sets, as `Run.sets` places them."""
  whole = sharding.replicated(run.mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), train_run.target_set_arrays(run.data, run.plan))


def _program(
    name: str, examples: int, run: Run, which: Which, where: Topology | None, params: float, optimizer: float) -> Program:
  started = time.perf_counter()
  try:
    if where is not None and where.is_tpu:
      plan = libtpu_plan.plan(run.config, which, where)
    else:
      plan = libtpu_plan.of_compiled(lowered(run, which).compile())
  except (jax.errors.JaxRuntimeError, libtpu_plan.Refused) as error:
    if not is_too_large(error):
      raise
    return Program(name, examples, None, _needs(str(error)), None, time.perf_counter() - started)
  module = hlo.parse(plan.text)
  memory = Memory(
      params=params, optimizer=optimizer, inputs=plan.arguments - params - optimizer, results=plan.results,
      temporaries=plan.temporaries, code=_OF_A_FUSION * _fusions(module) if plan.code is None else plan.code)
  return Program(name, examples, memory, memory.total, cost.of_module(module), time.perf_counter() - started)


def is_too_large(error: Exception) -> bool:
  """Whether a compiler refused a program because no device has so much memory."""
  return 'RESOURCE_EXHAUSTED' in str(error)


def _fusions(module: hlo.Module) -> int:
  return sum(op.opcode == 'fusion' for c in module.computations.values() for op in c.ops.values())


def _needs(message: str) -> float | None:
  """Bytes that a compiler says it needs: '… temporaries (52.01G) exceeds …', 'Used 20.1G of 15.75G hbm …'."""
  found = re.search(r'(?:temporaries \(|Used )([\d.]+)([KMGT]?)', message)
  return float(found[1]) * _UNITS[found[2]] if found else None
