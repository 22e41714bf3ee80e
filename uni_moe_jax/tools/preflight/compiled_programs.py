"""The training step and the evaluation of a run, compiled for absent devices."""

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

EVALUATION = ('evaluation',)
# A program of a run: the training step of all tasks (None) or of one task (its name), or EVALUATION.
Which = str | None | tuple[str]
# Bytes of program code per fusion: the maximum that was measured on models of width 768 and more.
_BYTES_PER_FUSION = 0.11 * 2**20
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes per device while a program runs.

  Attributes:
    params, optimizer: of the train state (averaged parameters count as optimizer).
    inputs: the other arguments: batch, target sets, padding.
    results: results that do not reuse the memory of an argument.
    temporaries: activations, gradients and other intermediate arrays.
    code: the program; for a TPU an estimate from its number of fusions.
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
    name: for the report. examples: of one call, over all devices.
    memory: None if the compiler refused the program because it is too large.
    needs: bytes per device that the compiler reports, or None. cost: of one device; None without a program.
    seconds: of tracing, lowering and compiling; for a TPU up to libtpu's plan, see `libtpu_plan`.
  """
  name: str
  examples: int
  memory: Memory | None
  needs: float | None
  cost: cost.Cost | None
  seconds: float

  def fits(self, memory: float | None) -> bool:
    """Return whether a device of `memory` bytes can run the program; None: unlimited."""
    return self.memory is not None and (memory is None or self.memory.total <= memory)


def prepare(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> Run:
  """Build a run on devices that may be absent, and on declared instead of real data.

  Raises:
    UsageError: see `train.run.build` and `DeclaredData`.
  """
  plan = make_plan(config)
  if config.train.init:
    raise UsageError(f"config.train.init={config.train.init!r}: preflight cannot start from another run; set it to '', "
                     'which leaves the step as it is.')
  plan.check_trains()
  return train_run.build(config, devices, DeclaredData(plan.config, plan))


def state_bytes(run: Run) -> tuple[float, float]:
  """Return the bytes per device of (parameters, optimizer with averaged parameters), without a compile."""
  def count(shapes, shardings):
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return float(sum(np.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in leaves))
  params = count(run.shapes.params, run.shardings.params)
  return params, count(run.shapes, run.shardings) - params


def training_steps(run: Run) -> list[str | None]:
  """Return the steps to compile: of all tasks, or of the task with most tokens of each task type."""
  if run.config.train.mixture == 'all_tasks':
    return [None]
  tasks = sorted(run.plan.tasks, key=lambda t: _num_tokens(run, t))
  return [t.name for t in {t.type.name: t for t in tasks}.values()]  # the last one of a type has most tokens


def lowered(run: Run, which: Which) -> jax.stages.Lowered:
  """Lower a program of a run."""
  if which != EVALUATION:
    return run.step_fn(which).lower(run.abstract_state(), batch_shapes(run, _tasks(run, which)), target_set_shapes(run))
  replicated = sharding.replicated(run.mesh)
  sequence = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated), evaluated(run)[-1])
  return predictor.encode.lower(run.spec.model, run.abstract_state().params, sequence)


def compile_program(run: Run, which: Which, topology: Topology | None = None) -> Program:
  """Compile a program of a run; for TPUs up to libtpu's plan.

  Args:
    run: see `prepare`. which: program. topology: of the run's devices; None: devices of this process.
  """
  started = time.perf_counter()
  params, optimizer = state_bytes(run)
  if which == EVALUATION:
    name, examples, _ = evaluated(run)
    name, optimizer = f'{EVALUATION[0]}, {name}', 0.0
  else:
    name, examples = f'train step, {which}' if which else 'train step', sum(t.batch_size for t in _tasks(run, which))
  try:
    if topology is not None and topology.is_tpu:
      plan = libtpu_plan.plan_program(run.config, which, topology)
    else:
      plan = libtpu_plan.plan_of(lowered(run, which).compile())
  except (jax.errors.JaxRuntimeError, libtpu_plan.ProgramTooLarge) as error:
    if not is_too_large(error):
      raise
    return Program(name, examples, None, _reported_bytes(str(error)), None, time.perf_counter() - started)
  module = hlo.parse(plan.text)
  fusions = sum(op.opcode == 'fusion' for c in module.computations.values() for op in c.ops.values())
  memory = Memory(
      params=params, optimizer=optimizer, inputs=plan.arguments - params - optimizer, results=plan.results,
      temporaries=plan.temporaries, code=_BYTES_PER_FUSION * fusions if plan.code is None else plan.code)
  return Program(name, examples, memory, memory.total, cost.of_module(module), time.perf_counter() - started)


def is_too_large(error: Exception) -> bool:
  """Return whether a compiler refused a program because it exceeds the device memory."""
  return 'RESOURCE_EXHAUSTED' in str(error)


def evaluated(run: Run) -> tuple[str, int, Any]:
  """Return (name, examples, shapes) of the sequence with most tokens that evaluators encode at once.

  It is the inputs of a batch, or texts of a target set. Without evaluators, training batches are taken.
  """
  tasks = [dataclasses.replace(e.task, batch_size=e.batch_size) for e in run.plan.evaluations] or run.plan.tasks
  task = max(tasks, key=lambda t: _num_tokens(run, t))
  fields = {k: jax.ShapeDtypeStruct((task.batch_size, *shape), dtype)
            for k, (shape, dtype) in _field_shapes(run, task, training=False).items() if k in predictor.INPUTS}
  inputs = jax.eval_shape(lambda f: batching.input_sequence(task.type, f), fields)
  encoded = [(_num_tokens(run, task), task.type.name, task.batch_size, inputs)]
  specs = {s.name: s for s in (*run.plan.sets, *run.plan.probe_sets)}
  for name in sorted({t.target_set for t in tasks if t.target_set}):
    texts = lambda: predictor.set_sequences(specs[name], run.data.target_sets[name], run.data.tokenizer.eot)
    for sequence in jax.eval_shape(texts):
      entries, length = sequence.text.shape
      encoded.append((entries * (1 + length), f'target set {name}', entries, sequence))
  return max(encoded, key=lambda e: e[0])[1:]


def batch_shapes(run: Run, tasks: Sequence[TaskSpec]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """Return shapes and shardings of `Run.put_batch`: {group: {field: [accum,] shards, b, …}}."""
  accum, shards = run.config.train.grad_accum_steps, run.spec.model.shards
  axis = 0 if accum == 1 else 1
  lead = (accum,) * axis
  split = sharding.batch_sharding(run.mesh, axis)
  groups: dict[str, list[TaskSpec]] = {}
  for t in tasks:
    groups.setdefault(t.group, []).append(t)
  batch = {}
  for group, members in groups.items():
    size = sum(t.batch_size for t in members) // (accum * shards)
    fields = {k: jax.ShapeDtypeStruct((*lead, shards, size, *shape), dtype, sharding=split)
              for k, (shape, dtype) in _field_shapes(run, members[0], training=True).items()}
    if 'pixels' in fields:
      [name] = UNBATCHED_FIELDS
      fields[name] = jax.ShapeDtypeStruct(lead, np.int32, sharding=sharding.replicated(run.mesh))
    batch[group] = fields
  return batch


def target_set_shapes(run: Run):
  """Return shapes and shardings of the target sets as `Run.target_sets` places them."""
  replicated = sharding.replicated(run.mesh)
  arrays = train_run.target_set_arrays(run.data, run.plan)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), arrays)


def _tasks(run: Run, task: str | None) -> Sequence[TaskSpec]:
  return run.plan.tasks if task is None else run.plan.only(task).tasks


def _field_shapes(run: Run, task: TaskSpec, training: bool) -> Mapping[str, tuple[tuple[int, ...], np.dtype]]:
  """Return {field: (shape of one example, dtype)} by tracing the input pipeline."""
  make = run.data.examples(task, training=training).make
  traced = tf.function(make).get_concrete_function(tf.TensorSpec([2], tf.int64), tf.TensorSpec([2], tf.uint64))
  fields = {k: (tuple(v.shape[1:]), np.dtype(v.dtype.as_numpy_dtype)) for k, v in traced.structured_outputs.items()}
  if training and task.mixes or task.type.readout == 'slot' and task.max_predictions:  # two classes, or several answers
    fields |= {k: ((2 if task.mixes else task.max_predictions,), fields[k][1]) for k in ('label', 'weight')}
  return {**fields, 'id': ((), np.dtype(np.uint32))}


def _num_tokens(run: Run, task: TaskSpec) -> int:
  """Count the tokens of the inputs and paired texts of a batch: a measure of a task's work."""
  fields, spec = _field_shapes(run, task, training=True), run.spec.model.spec
  frames = fields['pixels'][0][0] if 'pixels' in fields else 0
  words = sum(fields[k][0][0] for k in ('text', 'target') if k in fields)
  return task.batch_size * (1 + frames * spec.patches + words)


def _reported_bytes(message: str) -> float | None:
  """Parse the needed bytes: '… temporaries (52.01G) exceeds …', 'Used 20.1G of 15.75G hbm …'."""
  match = re.search(r'(?:temporaries \(|Used )([\d.]+)([KMGT]?)', message)
  return float(match[1]) * _UNITS[match[2]] if match else None
