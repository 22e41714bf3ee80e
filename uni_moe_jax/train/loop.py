"""The training loop: steps, logs, checkpoints, signals.

Exit codes: 0 finished, 75 stopped by a signal and resumable, 1 stopped because losses were not finite, or a phase hung.
"""

import contextlib
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from uni_moe_jax.parallel import distributed
from uni_moe_jax.parallel.multihost import (
  AnyProcess,
  broadcast_from_primary,
  check_same_data,
  ends_with_the_others,
  total,
)
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.hang_detection import BATCH, SAVE, START, STEP, HangDetector
from uni_moe_jax.train.metrics_log import MetricsLog
from uni_moe_jax.train.run import Run, build, conditions, initial_state
from uni_moe_jax.train.workdir import RUN_FILE, check_versions, claim_workdir, copy_tokenizer, lock, saved_step
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.exit_codes import ERROR, FINISHED, PREEMPTED
from uni_moe_jax.utils.files import write_json


class Stop:
  """Turns SIGINT and SIGTERM into a request to stop after the running step; a second one ends the process at once."""

  def __init__(self):
    self.requested = False

  def __enter__(self) -> 'Stop':
    self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
    return self

  def __exit__(self, *_) -> None:
    for s, handler in self._old.items():
      signal.signal(s, handler)

  def _ask(self, number, _) -> None:
    if self.requested:
      os._exit(PREEMPTED)
    self.requested = True
    print(f'\n{signal.Signals(number).name}: stopping after this step and saving (again: at once, without).',
          file=sys.stderr, flush=True)


def describe(run: Run) -> str:
  """What is about to be trained, for the log."""
  counts, router = run.parameter_counts(), run.config.moe.router
  names = run.spec.model.spec.router_input_names(conditions(run.plan))
  sizes = ', '.join(f'{name} {t.size}' for name, t in run.data.target_sets.items())
  return (f'parameters: {counts["total"]:,} total, {counts["active"]:,} used per token\n'
          f'router: {router}; {len(names)} condition rows: {", ".join(names)}\n'
          f'tasks: {", ".join(f"{t.name} ({t.type.name}, {t.batch_size})" for t in run.plan.tasks)}\n'
          f'target sets: {sizes}\nmesh: {dict(run.mesh.shape)}')


def commit() -> str:
  """Commit of this package's working tree, or 'unknown'."""
  try:
    found = subprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True, text=True, timeout=5,
                           cwd=pathlib.Path(__file__).parent).stdout.strip()
  except (OSError, subprocess.TimeoutExpired):
    found = ''
  return found or 'unknown'


def run_facts(run: Run) -> dict:
  """run.json: what a reader of the results needs to know."""
  return {'config': json.loads(run.config.to_json_best_effort()), 'parameters': run.parameter_counts(),
          'rows': [str(c) for c in conditions(run.plan)], 'seed': run.config.seed, 'commit': commit(),
          'command': ' '.join(['python', *sys.argv])}


# (step about to be taken, its parameters, its batch, target sets) → scalars to log with that step.
StepHook = Callable[[int, Any, Any, Any], dict[str, jax.Array]]


def train(config, workdir: str, devices=None, hooks: Sequence[Callable[[Run], StepHook | None]] = ()) -> int:
  """Trains to `config.train.steps`, from the newest checkpoint of `workdir` if there is one, on all devices by default.

  Args:
    config: of the run.
    workdir: its folder.
    devices: to train on; None: all.
    hooks: called with the run before the first step; each returns a `StepHook`, or None if the config turns it off.

  Returns:
    An exit code. Raises what `setup.build`, `claim_workdir`, `check_versions`, `copy_tokenizer` and `Checkpoints` raise, and
    UsageError where another process trains in `workdir`.
  """
  started = time.perf_counter()
  with Stop() as stop, HangDetector(config.train.hang_timeout) as watchdog, contextlib.ExitStack() as ending:
    with watchdog.phase(START), ends_with_the_others():
      run = build(config, devices)
      run.plan.check_trains()
      check_same_data(run.data.inputs_fingerprint)
      claim_workdir(workdir, config, run.data.fingerprint, distributed.is_primary(), run.data.inputs_fingerprint)
      if not broadcast_from_primary(not distributed.is_primary() or lock(workdir, ending)):
        raise UsageError(f'another process trains in {workdir}: wait until it has ended, or give another --workdir.')
      check_versions(workdir)
      copy_tokenizer(workdir, run.data.tokenizer_file, distributed.is_primary())
      if distributed.is_primary():
        write_json(pathlib.Path(workdir, RUN_FILE), run_facts(run))
      print(describe(run), flush=True)
      checkpoints = Checkpoints(workdir, config.train.max_to_keep, config.train.best_metric)
    ending.push(functools.partial(_close, checkpoints, watchdog))
    with ends_with_the_others():
      return _loop(run, workdir, checkpoints, stop, watchdog, started, hooks)


def _close(checkpoints: Checkpoints, watchdog: HangDetector, *error) -> None:
  """Saves under way can wait for the disk, and for other processes."""
  with watchdog.phase(SAVE), ends_with_the_others():
    checkpoints.__exit__(*error)


def compile_steps(config, workdir: str, devices=None) -> int:
  """Compiles the steps of a run, so that they lie in JAX's compilation cache, and trains nothing.

  A process that has compiled keeps a heap in pieces. On CPU its steps take half as long again as those of a process that
  finds them compiled: a run of many steps gains by being two processes.
  """
  started = time.perf_counter()
  if (saved_step(workdir) or 0) >= config.train.steps:
    print(f'{workdir} is finished: nothing to compile.')
    return FINISHED
  run = build(config, devices)
  sets, batches = run.target_sets(), run.mixture().iterate(0, config.train.steps)
  wanted = {t.name for t in run.plan.tasks} if config.train.mixture == 'one_task' else {None}
  for task, batch in batches:
    if task in wanted:
      run.step_fn(task).lower(run.abstract_state(), run.put_batch(batch), sets).compile()
      wanted.remove(task)
    if not wanted:
      break
  print(f'compiled after {time.perf_counter() - started:.0f} s', flush=True)
  return FINISHED


def _loop(run: Run, workdir: str, checkpoints: Checkpoints, stop: Stop, watchdog: HangDetector, started: float, hooks) -> int:
  c, last = run.config, run.config.train.steps
  saved = checkpoints.latest()
  first = saved or 0
  if first >= last:
    print(f'{workdir} is finished: {first} of {last} steps.')
    return FINISHED
  with watchdog.phase(START):
    log = MetricsLog(workdir, first, last, distributed.is_primary())
    active = [hook for make in hooks if (hook := make(run))]
    if saved is not None:  # step 0: somebody put parameters there, launch/convert.py for example
      state = checkpoints.restore(run.abstract_state())
      print(f'resumed from step {first}', flush=True)
    else:
      state = initial_state(run)
    sets, steps = run.target_sets(), {}
    mixture = run.mixture()
    batches = mixture.iterate(first, last)
  print(f'ready after {time.perf_counter() - started:.0f} s; the first step compiles', flush=True)

  stops = AnyProcess(run.mesh)
  with log:
    done, pending = first, None  # metrics of the step that is running: read once the next one is queued
    means = {}  # of the log at the step that is done, if there is one
    for step in range(first, last):
      with watchdog.phase(STEP, step):
        if stops(stop.requested):
          break
      with watchdog.phase(SAVE, step):
        checkpoints.check()
      with watchdog.phase(START if step == first else BATCH, step + 1):  # the first one opens the files
        task, batch = next(batches)
      compiling = task not in steps
      if compiling:
        steps[task] = run.step_fn(task)
      with watchdog.phase(START, step + 1):  # it compiles, too
        placed = run.put_batch(batch)
        # Before the step, which takes the buffers of the state.
        measured = {k: v for hook in active for k, v in hook(step, state.params, placed, sets).items()}
      # A step that is compiled may take long.
      with watchdog.phase(START if compiling else STEP, step + 1):
        state, metrics = steps[task](state, placed, sets)
        if compiling:
          jax.block_until_ready(metrics)
      if step == first:
        print(f'first step after {time.perf_counter() - started:.0f} s', flush=True)
      done = step + 1
      with watchdog.phase(STEP, step):
        if pending is not None and not _take(log, pending, c, step):
          return ERROR
      pending = {**metrics, **measured}
      if done % c.train.log_every == 0 or done == last:
        with watchdog.phase(STEP, done):
          if bad := total(mixture.corrupt_examples()):  # of files, in all processes, since they began
            pending['corrupt_examples'] = bad
          if not _take(log, pending, c, done):
            return ERROR
        with watchdog.phase(SAVE, done):
          pending, means = None, log.write(done)
      else:
        means = {}
      if done % c.train.checkpoint_every == 0 and done != last:
        with watchdog.phase(SAVE, done):
          checkpoints.save(done, state, means)
    with watchdog.phase(STEP, done):
      done = int(jax.device_get(state.step))
    with watchdog.phase(SAVE, done):
      checkpoints.save(done, state, means)
      checkpoints.finish()
  if done < last:
    print(f'stopped at step {done} of {last}; the same command continues.', flush=True)
    return PREEMPTED
  print(f'trained {last} steps; {time.perf_counter() - started:.0f} s in this process', flush=True)
  return FINISHED


def _take(log: MetricsLog, metrics, c, step: int) -> bool:
  """Reads a step's metrics; False when too many steps in a row were not finite."""
  values = {k: float(v) for k, v in jax.device_get(metrics).items()}
  if values['nonfinite_streak'] >= c.train.max_nonfinite_steps:
    broken = [k for k, v in values.items() if k.startswith('loss/') and not np.isfinite(v)]
    print(f'error: {int(values["nonfinite_streak"])} steps in a row up to step {step} were not finite '
          f'({", ".join(broken) or "the gradient norm"}); parameters are those of step {step - int(values["nonfinite_streak"])}. '
          'Lower config.optim.learning_rate, or look at the data of those tasks.', file=sys.stderr, flush=True)
    return False
  log.add({k: v for k, v in values.items() if np.isfinite(v)})
  return True
