"""The training step and the evaluation of a run, compiled for absent devices, and a cache of them with a deadline."""

import dataclasses
import pathlib
import pickle
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import tensorflow as tf

from uni_moe_jax.config.plan import Evaluation, TaskSpec, make_plan
from uni_moe_jax.data.batches.declared_data import DeclaredData
from uni_moe_jax.data.batches.mixtures import UNBATCHED_FIELDS
from uni_moe_jax.eval import predictor
from uni_moe_jax.model import sequences
from uni_moe_jax.parallel import sharding
from uni_moe_jax.preflight import cost, hlo, libtpu_plan
from uni_moe_jax.preflight import topology as topology_lib
from uni_moe_jax.preflight.topology import Topology
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train.run import Run
from uni_moe_jax.utils.errors import UsageError

Config = ml_collections.ConfigDict
EVALUATION = ('evaluation',)
# A program of a run: the training step of all tasks (None) or of one task (its name), or EVALUATION.
Which = str | None | tuple[str]
# Bytes of program code per fusion: the maximum that was measured on models of width 768 and more.
_BYTES_PER_FUSION = 0.11 * 2**20
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes per device while a program runs."""
  params: float
  optimizer: float  # and averaged parameters
  inputs: float  # the other arguments: batch, target sets, padding
  results: float  # that do not reuse the memory of an argument
  temporaries: float  # activations, gradients and other intermediate arrays
  code: float  # for a TPU an estimate from the number of fusions

  @property
  def total(self) -> float:
    return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program."""
  name: str  # for the report
  examples: int  # of one call, over all devices
  memory: Memory | None  # None: the compiler refused the program because it is too large
  needs: float | None  # bytes per device; None if the compiler did not report them
  cost: cost.Cost | None  # of one device; None without a program
  seconds: float  # of tracing, lowering and compiling; for a TPU up to libtpu's plan

  def fits(self, memory: float) -> bool:
    """Return whether a device of `memory` bytes can run the program."""
    return self.memory is not None and self.memory.total <= memory


def prepare(config: Config, devices: Sequence[Any]) -> Run:
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
  """Return the steps to compile: of all tasks, or of the task with most tokens of each task type.

  The texts of target sets count, too: thousands of names can be most of a step.
  """
  if run.config.train.mixture == 'all_tasks':
    return [None]
  tasks = sorted(run.plan.tasks, key=lambda t: _num_tokens(run, t) + _num_set_tokens(run, t))
  return [t.name for t in {t.type.name: t for t in tasks}.values()]  # the last one of a type has most tokens


def lowered(run: Run, which: Which) -> jax.stages.Lowered:
  """Lower a program of a run."""
  state = run.abstract_state()
  if which == EVALUATION:
    return predictor.encode.lower(run.spec.model, state.params, evaluated(run)[-1])
  return run.step_fn(which).lower(state, batch_shapes(run, _tasks(run, which)), target_set_shapes(run))


def compile_program(run: Run, which: Which, topology: Topology | None = None) -> Program:
  """Compile a program of a run; for TPUs up to libtpu's plan. topology: None: devices of this process."""
  started = time.perf_counter()
  params, optimizer = state_bytes(run)
  arguments = params
  if which == EVALUATION:
    name, examples, _ = evaluated(run)
    name = f'{EVALUATION[0]}, {name}'
    if not _is_during_training(run):  # otherwise the state of training stays on the devices
      optimizer = 0.0
  else:
    arguments += optimizer
    name, examples = f'train step, {which}' if which else 'train step', sum(t.batch_size for t in _tasks(run, which))
  try:
    if topology is not None and topology.is_tpu:
      text, sizes = libtpu_plan.plan_program(run.config, which, topology)
    else:
      text, sizes = libtpu_plan.plan_of(lowered(run, which).compile())
  except jax.errors.JaxRuntimeError as error:
    if not libtpu_plan.is_too_large(error):
      raise
    return Program(name, examples, None, _reported_bytes(str(error)), None, time.perf_counter() - started)
  module = hlo.parse(text)
  fusions = sum(op.opcode == 'fusion' for c in module.computations.values() for op in c.ops.values())
  inputs = sizes.pop('arguments') - arguments
  memory = Memory(params, optimizer, inputs, **{'code': _BYTES_PER_FUSION * fusions, **sizes})
  return Program(name, examples, memory, memory.total, cost.of_module(module), time.perf_counter() - started)


def evaluated(run: Run) -> tuple[str, int, Any]:
  """Return (name, examples, shapes) of the sequence with most tokens that evaluators encode at once.

  It is the inputs of a batch, split over the batch shards, or texts of a target set, which every device has. Without
  evaluators, training batches are taken.
  """
  return _largest(run, run.plan.evaluations)[1:]


def _is_during_training(run: Run) -> bool:
  """Return whether the sequence of `evaluated` is one of the evaluations while the run trains."""
  during = [e for e in run.plan.evaluations if e.during_training] if run.config.train.evaluate_every else []
  return bool(during) and _largest(run, during)[0] == _largest(run, run.plan.evaluations)[0]


def _largest(run: Run, evaluations: Sequence[Evaluation]) -> tuple[int, str, int, Any]:
  """Return (tokens, name, examples, shapes) of what `evaluated` looks for."""
  tasks = [dataclasses.replace(e.task, batch_size=e.batch_size) for e in evaluations] or run.plan.tasks
  task = max(tasks, key=lambda t: _num_tokens(run, t))
  rows = -(-task.batch_size // run.spec.model.shards) * run.spec.model.shards  # as `eval.batches` fills up a batch
  fields = {k: jax.ShapeDtypeStruct((rows, *shape), dtype)
            for k, (shape, dtype) in _field_shapes(run, task, training=False).items() if k in predictor.INPUTS}
  inputs = jax.eval_shape(lambda f: sequences.InputSequence.of_inputs(task.type, f), fields)
  encoded = [(_num_tokens(run, task), task.type.name, rows, _split(run, inputs))]
  specs = {s.name: s for s in (*run.plan.sets, *run.plan.probe_sets)}
  for name in sorted({t.target_set for t in tasks if t.target_set}):
    texts = lambda: predictor.set_sequences(specs[name], run.data.target_sets[name], run.data.tokenizer.eot)
    for sequence in jax.eval_shape(texts):
      entries, length = sequence.text.shape
      encoded.append((entries * (1 + length), f'target set {name}', entries, _replicated(run, sequence)))
  return max(encoded, key=lambda e: e[0])


def batch_shapes(run: Run, tasks: Sequence[TaskSpec]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """Return shapes and shardings of `Run.put_batch`: {group: {field: [accum,] shards, b, …}}."""
  accum, shards = run.config.train.grad_accum_steps, run.spec.model.shards
  lead = () if accum == 1 else (accum,)
  split = sharding.batch_sharding(run.mesh, len(lead))
  batch = {}
  for group in dict.fromkeys(t.group for t in tasks):
    members = [t for t in tasks if t.group == group]
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
  return _replicated(run, train_run.target_set_arrays(run.data, run.plan))


def _replicated(run: Run, arrays):
  replicated = sharding.replicated(run.mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), arrays)


def _split(run: Run, arrays):
  """Arrays [B, …] over the batch shards; scalars are everywhere."""
  rows, replicated = sharding.batch_sharding(run.mesh, 0), sharding.replicated(run.mesh)
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows if x.shape else replicated), arrays)


def _tasks(run: Run, task: str | None) -> Sequence[TaskSpec]:
  return run.plan.tasks if task is None else run.plan.only(task).tasks


def _field_shapes(run: Run, task: TaskSpec, training: bool) -> Mapping[str, tuple[tuple[int, ...], np.dtype]]:
  """Return {field: (shape of one example, dtype)} by tracing the input pipeline."""
  make = run.data.examples(task, training=training).make
  signature = tf.TensorSpec([2], tf.int64), tf.TensorSpec([2], tf.uint64)
  traced = tf.function(make, autograph=False).get_concrete_function(*signature)
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


def _num_set_tokens(run: Run, task: TaskSpec) -> int:
  """Count the tokens of the target sets that a training step of one task encodes."""
  def of_set(s):
    arrays = run.data.target_sets[s.name]
    words = min(s.num_sampled, arrays.size) if s.softmax == 'sampled' else arrays.size
    texts = [b['text'].shape for b in arrays.buckets] or [(words, 2)]  # a word and its end
    return sum(shape[0] * (1 + shape[-1]) for shape in texts)
  return sum(map(of_set, run.plan.only(task.name).sets))


def _reported_bytes(message: str) -> float | None:
  """Parse the needed bytes: '… temporaries (52.01G) exceeds …', 'Used 20.1G of 15.75G hbm …'."""
  match = re.search(r'(?:temporaries \(|Used )([\d.]+)([KMGT]?)', message)
  return float(match[1]) * _UNITS[match[2]] if match else None


class Compiler:
  """Compiles programs of configs, each once, and predicts whether there is time for more."""

  def __init__(self, topology: Topology | None, devices: Sequence[Any], report: Callable[[str], None], deadline: float):
    """report: receives a line for each compile. deadline: of `has_time`, by `time.monotonic`."""
    self._topology, self._devices, self._report, self._deadline = topology, devices, report, deadline
    self._runs: dict[str, Run] = {}
    self._programs: dict[tuple[Which, str], Program] = {}
    self._seconds: dict[Which, float] = {}
    self.out_of_time = False  # `has_time` returned False once

  def run(self, config: Config) -> Run:
    """See `prepare`."""
    key = _key(config)
    if key not in self._runs:
      self._runs = {key: prepare(config, self._devices)}  # the latest alone: a run is large
    return self._runs[key]

  def program(self, config: Config, which: Which, note: str = '') -> Program:
    """Compile a program of a config once. note: appended to the reported line."""
    relevant = config.copy_and_resolve_references()
    if which != EVALUATION:
      relevant.evaluators = {}
    key = which, _key(relevant)
    if key not in self._programs:
      name = 'evaluation' if which == EVALUATION else 'the training step' + (f' of {which}' if which else '')
      self._report(f'compiling {name}{note}')
      self._programs[key] = compile_program(self.run(config), which, self._topology)
      self._seconds[which] = self._programs[key].seconds
    return self._programs[key]

  def has_time(self, programs: Sequence[Which]) -> bool:
    """Return whether compiles of these programs, as long as their last ones, end before the deadline."""
    seconds = sum(self._seconds[which] for which in programs)
    self.out_of_time = self.out_of_time or time.monotonic() + seconds > self._deadline
    return not self.out_of_time

  def mesh(self, config: Config) -> dict[str, int]:
    """Size per axis."""
    return sharding.mesh_shape({axis: config.mesh[axis] for axis in sharding.AXES}, len(self._devices))

  def state_bytes(self, config: Config) -> float:
    """Bytes of the train state per device, without a compile."""
    return sum(state_bytes(self.run(config)))


def _key(config: Config) -> str:
  return config.to_json_best_effort(sort_keys=True)


def _compile_in_subprocess(folder: pathlib.Path) -> None:
  """Compile the program that standard input names; XLA dumps its plan into the folder, see `libtpu_plan`."""
  config, which, name = pickle.load(sys.stdin.buffer)
  run = prepare(Config(config), topology_lib.devices(topology_lib.parse(name)))
  options = {'xla_dump_to': str(folder), 'xla_dump_hlo_as_text': True}
  try:
    lowered(run, which).compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    if not libtpu_plan.is_too_large(error):
      raise
    (folder / libtpu_plan.TOO_LARGE).write_text(str(error))


if __name__ == '__main__':
  _compile_in_subprocess(pathlib.Path(sys.argv[1]))
