"""The training loop: steps, logs, checkpoints, signals.

Exit codes: 0 finished, 75 stopped by a signal and resumable, 1 losses were not finite or a phase hung.
"""

import contextlib
import functools
import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.cli import output
from uni_moe_jax.data.batches.lookahead import Lookahead
from uni_moe_jax.data.batches.mixtures import Batch, batch_sizes
from uni_moe_jax.io import locks, storage
from uni_moe_jax.io.files import read_json, write_json
from uni_moe_jax.kernels import projection
from uni_moe_jax.parallel import distributed, multihost, peaks
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.compiler_process import CompilerProcess
from uni_moe_jax.train.hang_detection import BATCH, RESTORE, SAVE, START, STEP, HangDetector
from uni_moe_jax.train.metrics_log import MetricsLog
from uni_moe_jax.train.run import Run, build, initial_state
from uni_moe_jax.train.step import TrainState
from uni_moe_jax.train.validation import Validation
from uni_moe_jax.train.workdir import RUN_FILE, check_versions, claim_workdir, copy_tokenizer, is_finished
from uni_moe_jax.utils import signals
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.exit_codes import ERROR, FINISHED, PREEMPTED

_INITIAL_SHARE = 0.1  # of an average, above which a note says so


class Stop:
  """A request to stop after the step, by SIGINT or SIGTERM; one more after `repeat_after` seconds ends the process.

  Not a sooner one: a shutdown signals every process, and those that started this one pass theirs on.
  """
  requested, repeat_after, _since = False, 1.0, 0.0

  def on_signals(self) -> contextlib.AbstractContextManager[None]:
    return signals.handled(self._request, signal.SIGINT, signal.SIGTERM)

  def _request(self, number: int, _) -> None:
    if self.requested:
      if time.monotonic() - self._since > self.repeat_after:
        os._exit(PREEMPTED)
      return
    self.requested, self._since = True, time.monotonic()
    output.write_error(f'\n{signal.Signals(number).name}: stopping after this step and saving (another signal, after a '
                       'second, stops at once, without saving).\n')


def _describe(run: Run) -> str:
  counts, router = run.parameter_counts(), run.config.moe.router
  names = run.spec.model.spec.router_input_names(run.plan.conditions)
  sizes = ', '.join(f'{name} {t.size}' for name, t in run.data.target_sets.items())
  dtype = 'bfloat16 in training (train.cpu_bfloat16)' if run.rounds_products else run.config.model.dtype
  resume = 'exact' if run.resumes_exactly else (
      'up to rounding, since sums on GPUs have no fixed order; config.train.deterministic=True makes it exact')
  return (f'parameters: {counts["total"]:,} total, {counts["active"]:,} active per token\n'
          f'router: {router}; {len(names)} conditions: {", ".join(names)}\n'
          f'tasks: {", ".join(f"{t.name} ({t.type.name}, {t.batch_size})" for t in run.plan.tasks)}\n'
          f'target sets: {sizes}\ndevices: {run.mesh.size} × {run.mesh.devices.flat[0].device_kind}\n'
          f'mesh: {dict(run.mesh.shape)}\nproducts: {dtype}\nresume: {resume}'
          + ''.join(f'\nnote: {note}' for note in notes(run.config)))


def notes(config) -> list[str]:
  """Sentences about numbers of a config that do little in so few steps, which may not be meant."""
  steps, warmup, decay = config.train.steps, config.optim.warmup_steps, config.train.ema_decay
  result = []
  if warmup >= steps > 0:
    result.append(f'config.optim.warmup_steps={warmup} of {steps} steps: the learning rate only rises, to '
                  f'{steps / warmup:.0%} of config.optim.learning_rate.')
  if decay and (share := decay ** steps) > _INITIAL_SHARE:
    result.append(f'config.train.ema_decay={decay}: after {steps:,} steps the averaged parameters, which evaluation '
                  f'uses, still contain {share:.0%} of those that the run started from.')
  return result


def commit() -> str:
  """Git commit of this package's working tree, or 'unknown'."""
  command, folder = ['git', 'rev-parse', 'HEAD'], pathlib.Path(__file__).parents[2]
  if not (folder / '.git').exists():  # an environment may be in a repository of its own
    return 'unknown'
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=5, cwd=folder)
  except (OSError, subprocess.TimeoutExpired):
    return 'unknown'
  return done.stdout.strip() or 'unknown'


def _run_facts(run: Run, file: storage.Path, newest: str) -> dict[str, Any]:
  """Content of run.json, for readers of the results. file: has that of the start before; newest: commit."""
  old = {}
  with contextlib.suppress(ValueError):  # of a damaged one
    old = read_json(file, {})
  commits = [*old.get('earlier_commits', ()), *([old['commit']] if 'commit' in old else [])]
  earlier = [c for c in dict.fromkeys(commits) if c != newest]
  return {**({'earlier_commits': earlier} if earlier else {}),
          'config': json.loads(run.config.to_json_best_effort()), 'parameters': run.parameter_counts(),
          'conditions': [str(c) for c in run.plan.conditions], 'seed': run.config.seed, 'commit': newest,
          'command': cli.command_line()}


def train(
    config, workdir: str, devices=None, compiler: CompilerProcess | None = None,
    allow_version_mismatch: bool = False, stop: Stop | None = None) -> int:
  """Trains to `config.train.steps`, from the newest checkpoint of `workdir` if there is one. Returns an exit code.

  Args:
    config, workdir: of the run.
    devices: of the mesh; default: all.
    compiler: compiles the steps meanwhile, by `compile_steps`; the first step waits for it.
    allow_version_mismatch: whether the run may continue with other package versions, which are then recorded.
    stop: requests to stop; default: on signals.

  Raises:
    UsageError: another process trains in `workdir`, or what `build`, `Validation`, `Data.check_space`, `claim_workdir`,
      `check_versions`, `copy_tokenizer` and `Checkpoints` raise.
  """
  started, stop = time.perf_counter(), stop or Stop()
  with stop.on_signals(), HangDetector(
      config.train.hang_timeout, _buckets(workdir, config.data.dir)) as detector, contextlib.ExitStack() as stack:
    with detector.phase(START), multihost.exit_with_peers():
      run = build(config, devices, workdir=workdir)
      run.plan.check_trains()
      validation = Validation(run, detector.phase)
      inputs, evaluations = run.data.inputs_fingerprint, validation.fingerprints()
      multihost.check_same_data(inputs, evaluations)
      is_primary = distributed.is_primary()
      if is_primary:
        storage.make_folder(storage.path(workdir))
      owner = locks.lock(workdir, stack) if is_primary else None
      if multihost.broadcast_from_primary(owner is not None):
        raise UsageError(f'{owner or "another process"} trains in {workdir}: wait until it has ended, or give another '
                         '--workdir.')
      finished = is_finished(workdir, config.train.steps)
      if not finished:
        run.data.check_space(validation.evaluations)
      check_versions(workdir, allow_version_mismatch, writes=False)
      # After every check: a start that is refused changes nothing.
      claim_workdir(workdir, run.config, run.data.fingerprint, is_primary, inputs, extends=True,
                    evaluations=evaluations, class_digests=run.class_digests)
      if is_primary and allow_version_mismatch:
        check_versions(workdir, allow_version_mismatch)  # which are recorded
      copy_tokenizer(workdir, run.data.tokenizer_file, is_primary)
      file = storage.path(workdir) / RUN_FILE
      if is_primary and not (finished and file.exists()):  # what has trained it
        write_json(file, _run_facts(run, file, commit()))
      print(_describe(run), flush=True)
      checkpoints = Checkpoints(workdir, config.train.max_to_keep, config.train.best_metric, config.train.keep_every,
                                evaluations)
    stack.push(functools.partial(_close, checkpoints, detector))
    with multihost.exit_with_peers():
      return _loop(run, workdir, checkpoints, validation, stop, detector, started, compiler)


def _buckets(workdir: str, data_dir: str) -> dict[str, str]:
  """For `HangDetector`: the buckets that phases of a run wait for."""
  phases = (RESTORE, workdir), (SAVE, workdir), (BATCH, data_dir)
  return {phase: address for phase, address in phases if storage.is_remote(address)}


def _close(checkpoints: Checkpoints, detector: HangDetector, *error) -> None:
  """Closes checkpoints; a pending save may wait for the disk and for other processes."""
  with detector.phase(SAVE), multihost.exit_with_peers():
    checkpoints.__exit__(*error)


def compile_steps(config, workdir: str, devices=None) -> int:
  """Compiles the steps of a run into JAX's compilation cache, and trains nothing; see `CompilerProcess`."""
  started = time.perf_counter()
  if is_finished(workdir, config.train.steps):
    print(f'{workdir} is finished: nothing to compile.')
    return FINISHED
  run = build(config, devices, workdir=workdir)
  target_sets, mixture = run.target_sets(), run.mixture()
  for step in mixture.first_steps(config.train.steps):  # no batch between them: a task may be drawn late, or never
    [(task, batch)] = mixture.iterate(step, step + 1)
    run.step_fn(task).lower(run.abstract_state(), run.put_batch(batch), target_sets).compile()
  print(f'compiled after {time.perf_counter() - started:.0f} s', flush=True)
  return FINISHED


def _loop(
    run: Run, workdir: str, checkpoints: Checkpoints, validation: Validation, stop: Stop, detector: HangDetector,
    started: float, compiler: CompilerProcess | None) -> int:
  saved, last = checkpoints.latest(), run.config.train.steps
  first = saved or 0
  finished = f'{workdir} is finished: {first} of {last} steps.'
  if first >= last and not validation.is_missing(first, workdir):
    print(finished)
    return FINISHED
  if saved is not None:  # may be step 0, which uni-moe convert writes
    with detector.phase(RESTORE, first):
      state = checkpoints.restore(run.abstract_state())
      first = checkpoints.latest()  # an earlier one, if the arrays of that one were altered
      print(f'resumed from step {first}', flush=True)
  with detector.phase(START):
    if saved is None:
      state = initial_state(run)
    log = MetricsLog(workdir, first, last, distributed.is_primary())
    trainer = _Trainer(run, checkpoints, detector, log, validation, compiler)
  is_missing = validation.is_missing(first, workdir)
  print(f'ready after {time.perf_counter() - started:.0f} s; {"another process" if compiler else "the first step"} '
        'compiles', flush=True)
  with log, trainer.batches(first) as batches:
    done = trainer.train(state, first, stop, started, is_missing, batches)
  if done is None:
    return ERROR
  if done < last or trainer.lacks_evaluation:
    where = f'{done} of {last}{" before its evaluation" if done >= last else ""}'
    print(f'stopped at step {where}; the same command continues.', flush=True)
    return PREEMPTED
  print(finished if first >= last else
        f'trained {last} steps; {time.perf_counter() - started:.0f} s in this process', flush=True)
  return FINISHED


class _Trainer:
  """Takes the steps of a run, logs their metrics, evaluates and saves checkpoints; each phase has a time limit."""

  def __init__(
      self, run: Run, checkpoints: Checkpoints, detector: HangDetector, log: MetricsLog, validation: Validation,
      compiler: CompilerProcess | None):
    self.lacks_evaluation = False  # whether a stop was requested before the newest evaluation that was due had ended
    self._compiler = compiler
    self._run, self._checkpoints, self._phase, self._log = run, checkpoints, detector.phase, log
    self._config, self._mixture, self._target_sets = run.config.train, run.mixture(), run.target_sets()
    self._validation = validation
    self._step_fn = functools.cache(run.step_fn)  # by task
    self._peak = self._measure_peak() if compiler is None else None  # its process uses the cores: after it
    self._ideal_seconds: dict[str | None, float] = {}  # by task, of a step's products at the peak of the devices
    self._pending: dict[str, jax.Array] | None = None  # metrics of the running step, read when the next one is queued
    self._means: dict[str, float] = {}  # as logged at the newest step; {} if that step is not logged

  @contextlib.contextmanager
  def batches(self, first: int) -> Iterator[Lookahead]:
    """The batches of the steps from `first` on."""
    batches = Lookahead(self._mixture.iterate(first, self._config.steps), self._place)
    try:
      yield batches
    finally:
      gc.unfreeze()
      with self._phase(BATCH):  # the next batch may be in the making
        batches.close()

  def train(
      self, state: TrainState, first: int, stop: Stop, started: float, is_evaluation_missing: bool,
      batches: Lookahead) -> int | None:
    """Number of steps taken when a stop was requested or all are; None after too many that were not finite.

    is_evaluation_missing: whether the run was stopped before the evaluations that follow step `first`.
    """
    stops, done = multihost.AnyProcess(self._run.mesh), first
    evaluate = functools.partial(self._evaluate, stopped=lambda: stops(stop.requested))
    if is_evaluation_missing:
      evaluate(first, state, of_checkpoint=True)
    for step in range(first, self._config.steps):
      with self._phase(STEP, step):
        if stops(stop.requested):
          break
      with self._phase(SAVE, step):
        self._checkpoints.check()
      is_late = step > first and not batches.is_ready
      if is_late and self._pending is not None:
        with self._phase(STEP, step):  # until it ends, the devices do not wait
          jax.block_until_ready(self._pending)
      waits_since = time.perf_counter()
      with self._phase(START if step == first else BATCH, step + 1):  # the first batch opens files
        task, batch, sizes = batches.take()
      # If the batch is there, this thread waits for others at most, while a step runs.
      input_wait = time.perf_counter() - waits_since if is_late else 0.0
      if step == first and self._compiler is not None:
        with self._phase(START, step + 1):
          self._step_fn(task).lower(state, batch, self._target_sets)  # JAX keeps what it has traced
          self._compiler.wait(lambda: stop.requested)
          self._peak = self._measure_peak()
        if stop.requested:
          break
        self._log.restart_clock()
      state, metrics = self._take(step, task, state, batch)
      self._log.add_work(input_wait=input_wait, ideal_seconds=self._ideal_seconds[task], **sizes)
      if step == first:
        gc.collect()
        gc.freeze()  # a collection that visits all objects stops every thread for half a second
        print(f'first step after {time.perf_counter() - started:.0f} s', flush=True)
      done = step + 1
      if not self._add_metrics(done, metrics):
        return None
      is_saved = done % self._config.checkpoint_every == 0 or done == self._config.steps
      if is_saved:  # first: the next start continues here if the evaluation fails
        self._save(done, state)
      if self._validation.is_due(done):
        self._means |= evaluate(done, state, of_checkpoint=is_saved)
    with self._phase(STEP, done):
      jax.block_until_ready(state.step)
    self._save(done, state)
    with self._phase(SAVE, done):
      self._checkpoints.finish()
    return done

  def _save(self, step: int, state: TrainState) -> None:
    with self._phase(SAVE, step):
      self._log.copy()
      self._checkpoints.save(step, state, self._means)

  def _evaluate(
      self, step: int, state: TrainState, stopped: Callable[[], bool], of_checkpoint: bool) -> dict[str, float]:
    """Evaluates and logs the state after a step; returns the metrics. of_checkpoint: the step is saved already."""
    evaluated = self._validation(step, state, stopped)
    self.lacks_evaluation = evaluated is None
    with self._phase(SAVE, step):
      if evaluated and of_checkpoint:  # before they are logged: what is logged is not evaluated again
        self._checkpoints.add_metrics(step, evaluated)
      self._log.evaluated(step, evaluated or {})
    return evaluated or {}

  def _place(self, item: tuple[str | None, Batch]) -> tuple[str | None, Batch, dict[str, int]]:
    """(task, batch on the devices, its sizes in all processes); runs in another thread."""
    task, batch = item
    return task, self._run.put_batch(batch), batch_sizes(batch, self._mixture.layout)

  def _take(self, step: int, task: str | None, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
    """(state, metrics) after step `step + 1`; donates the buffers of the state."""
    compiles = task not in self._ideal_seconds
    with self._phase(START if compiles else STEP, step + 1):
      state, metrics = self._step_fn(task)(state, batch, self._target_sets)
      if compiles:
        self._ideal_seconds[task] = (
            self._run.step_flops(task, batch, self._target_sets) / self._peak if self._peak else 0.0)
        jax.block_until_ready(metrics)
    return state, metrics

  def _measure_peak(self) -> float | None:
    return peaks.of_mesh(self._run.mesh, projection.matmul_rounded if self._run.rounds_products else jax.numpy.matmul)

  def _add_metrics(self, done: int, metrics: dict[str, Any]) -> bool:
    """Queues the metrics of step `done`; logs means every `log_every` steps. Returns as `_read` does."""
    with self._phase(STEP, done - 1):
      if self._pending is not None and not self._read(done - 1):
        return False
    self._pending, self._means = metrics, {}
    if done % self._config.log_every and done != self._config.steps:
      return True
    with self._phase(STEP, done):
      if corrupt := self._mixture.num_corrupt_examples(multihost.sums_over_processes):  # since the start
        self._pending['corrupt_examples'] = corrupt
      if not self._read(done):
        return False
    with self._phase(SAVE, done):
      self._pending, self._means = None, self._log.write(done)
    return True

  def _read(self, step: int) -> bool:
    """Adds the pending metrics, those of `step`, to the log. False after too many steps in a row were not finite."""
    values = {k: float(v) for k, v in jax.device_get(self._pending).items()}
    streak = int(values['nonfinite_streak'])
    if streak < self._config.max_nonfinite_steps:
      self._log.add({k: v for k, v in values.items() if np.isfinite(v)})
      return True
    names = [k for k, v in values.items() if k.startswith('loss/') and not np.isfinite(v)]
    print(f'error: {streak} steps in a row up to step {step} were not finite '
          f'({", ".join(names) or "the gradient norm"}); the parameters are those of step {step - streak}. Lower '
          'config.optim.learning_rate, or check the data of those tasks.', file=sys.stderr, flush=True)
    return False
