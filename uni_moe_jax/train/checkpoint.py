"""Checkpoints by Orbax: atomic, verified before they are read. The newest are kept, and the best.

A checkpoint is complete when its folder gets its name; where folders cannot be renamed, when its commit file is there.
"""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from uni_moe_jax.io import files, orbax_s3, storage
from uni_moe_jax.parallel import distributed, multihost
from uni_moe_jax.train import checkpoint_choice, manifest
from uni_moe_jax.train.workdir import CHECKPOINTS, DAMAGED, saved_step, saved_steps, unfinished_folders
from uni_moe_jax.utils import errors, heap
from uni_moe_jax.utils.errors import RunError, UsageError
from uni_moe_jax.utils.tree_paths import by_path, describe_arrays

_NONE, _ALL_DAMAGED = -1, -2  # in place of a step
_MODE = ocp.options.AtomicityMode
_READS = 2  # of arrays in a bucket, until they are as they were saved
_ITEM = 'default'  # Orbax's name of the folder of a step's arrays
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # bytes per number → type of its bits


class Checkpoints:
  """Saves and restores a train state (any pytree of arrays) in `workdir/checkpoints`; a context manager.

  A checkpoint with a missing, truncated or altered file is skipped with a warning, and the previous one is used. In a
  bucket, altered arrays may be noticed only when they are read: `latest` is an earlier step after that.
  """

  def __init__(
      self, workdir: str | os.PathLike[str], max_to_keep: int | None, best_metric: str = '', keep_every: int = 0,
      evaluation_data: Mapping[str, str] | None = None):
    """Opens the checkpoints of a work directory.

    Args:
      workdir: folder of the run.
      max_to_keep: number of newest checkpoints to keep; None: read only, nothing is saved, moved or deleted.
      best_metric: also keep the checkpoint with the best value of this metric, see `lower_is_better`; '': none.
      keep_every: also keep those whose step is a multiple of this; 0: none.
      evaluation_data: see `manifest.write`.

    Raises:
      RunError: every checkpoint is damaged.
    """
    self._workdir, self._is_remote, self._writes = workdir, storage.is_remote(workdir), max_to_keep is not None
    self._folder = storage.absolute(workdir) / CHECKPOINTS
    if str(self._folder).startswith('s3:'):
      orbax_s3.support()
    self._in_place = bool(multihost.broadcast_from_primary(
        self._writes and distributed.is_primary() and not self._renames_folders()))
    self._own, self._pending, self._sums, self._damaged = set(), None, {}, {}
    self._opened = self._open()
    self._best_metric, self._evaluation_data = best_metric, evaluation_data or {}
    self._metrics = {step: manifest.metrics(self._folder / str(step)) for step in saved_steps(workdir)}
    self._manager = ocp.CheckpointManager(
        self._folder, item_handlers=ocp.StandardCheckpointHandler(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_choice.Retention(max_to_keep, keep_every, self._best_of),
            create=self._writes and not self._is_remote,
            cleanup_tmp_directories=self._writes and not self._in_place, enable_async_checkpointing=True,
            # Finished checkpoints have a commit file in both modes.
            atomicity_options=ocp.options.AtomicityOptions(
                _MODE.COMMIT_FILE if self._in_place or not self._writes else _MODE.ATOMIC_RENAME),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            # Orbax's own metadata of a step must not be read before the step is verified.
            lightweight_initialize=True))

  def latest(self) -> int | None:
    """The newest intact step."""
    return max(self.steps(), default=None)

  def best(self) -> int | None:
    """The step with the best value of the best metric; None if no checkpoint has it."""
    return self._best_of(self.steps())

  def steps(self) -> list[int]:
    """Saved steps up to the newest intact one, in order."""
    return [s for s in sorted(self._manager.all_steps()) if s in self._own or s <= self._opened]

  def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
    """Starts an asynchronous save, unless the step is saved. Raises RunError if the last save failed.

    metrics: logged with this step, by name.
    """
    self.finish()
    if step in self.steps():
      return
    self._own.add(step)
    self._damaged.pop(step, None)  # of the one that was set aside
    self._metrics[step] = {k: v for k, v in (metrics or {}).items() if math.isfinite(v)}
    self._pending = step
    if self._is_remote:  # objects are not read back to learn whether they arrived as they were sent
      self._sums = array_sums(state)
    with self._report_disk_errors():
      self._manager.save(step, args=ocp.args.StandardSave(state))

  def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds metrics to those of a saved step, as if they had been logged before the save, for which it waits."""
    self.finish()
    if distributed.is_primary():
      manifest.add_metrics(self._folder / str(step), metrics, self._evaluation_data)
    self._metrics[step] = {**self._metrics.get(step, {}), **metrics}

  def check(self) -> None:
    """Raises RunError if a save has failed since the last call, without waiting."""
    if self._pending is not None and not self._manager.is_saving_in_progress():
      self.finish()

  def finish(self) -> None:
    """Waits until a pending save is on disk. Raises RunError if it failed."""
    with self._report_disk_errors():
      self._manager.wait_until_finished()
    if self._pending is not None:
      heap.trim()  # arrays of a save are between those of steps
    self._pending = None

  def restore(self, like: Any, step: int | None = None) -> Any:
    """Restores a step (default: the newest) onto the shardings of `like`, a tree of shapes or arrays.

    Raises:
      RunError: the step is damaged.
      UsageError: it was not saved, or has other arrays than `like`.
    """
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)

    def read(step):
      self._check_fits(step, self._saved_tree(step), shapes)
      return self._read_arrays(step, ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(shapes))

    return self._of_intact(step, read)

  def param_shapes(self, step: int | None = None) -> Any:
    """Shapes of the parameters that `restore_params` reads by default."""
    return self._of_intact(step, self._saved_params)[1]

  def restore_params(
      self, step: int | None = None, like: Any = None, partial: bool = False, averaged: bool = True) -> Any:
    """Parameters of a step (default: the newest), averaged ones if the run keeps them. No other array is read.

    Args:
      step: to restore.
      like: their shapes, with the shardings onto which they are restored; None: all of them, on the host.
      partial: whether the step may have more parameters than `like`.
      averaged: False: those that training updates, also if the run keeps averages.

    Raises:
      RunError: the step is damaged. UsageError: it was not saved, or has other arrays than `like`.
    """
    def read(step):
      name, saved = self._saved_params(step, averaged)
      if like is None:
        item = {name: saved}
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
      else:
        self._check_fits(step, saved, like, partial)
        item = {name: like}
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
      args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
      return self._read_arrays(step, ocp.PyTreeCheckpointHandler(), args)[name]

    return self._of_intact(step, read)

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, error, *_) -> None:
    """Waits for a pending save."""
    try:
      self.finish()
    except RunError:
      if error is None:  # otherwise an earlier error is being raised
        raise
    finally:
      self._manager.close()

  def _renames_folders(self) -> bool:
    """Whether folders can be renamed in the work directory, which it creates; notes where not."""
    if self._is_remote:
      return False
    workdir = self._folder.parent
    workdir.mkdir(parents=True, exist_ok=True)
    renames = files.renames_folders(workdir)
    if not renames:
      print(f'note: folders cannot be renamed in {self._workdir}; a file that is written last completes each '
            'checkpoint.', file=sys.stderr, flush=True)
    return renames

  def _open(self) -> int:
    """The newest intact step as the primary process finds it, or _NONE; later ones are of this process."""
    opened = multihost.broadcast_from_primary(self._newest_intact() if distributed.is_primary() else _NONE)
    if opened == _ALL_DAMAGED:
      raise RunError(
          f'every checkpoint in {self._folder} is damaged (see above), so nothing of this run can be trusted. Copy an '
          f'intact one back, or delete {self._folder} to train from the start.')
    return opened

  def _newest_intact(self, repeats: int = 3) -> int:
    """The newest intact step, _NONE or _ALL_DAMAGED, with warnings; again if the run deletes what a reader verifies.

    Who writes moves damaged ones away, and deletes those that were written in place and not finished.
    """
    for folder in unfinished_folders(self._workdir) if self._writes else ():
      storage.remove_folder(folder)
    steps = saved_steps(self._workdir)
    for i, step in reversed(list(enumerate(steps))):
      damage = self._damaged.get(step) or self._damage(step)
      if not damage:
        for damaged in steps[i + 1:] if self._writes else ():
          self._move_away(damaged)
        return step
      if not self._writes and saved_steps(self._workdir) != steps:  # its run trains on
        if not repeats:
          raise RunError(f'{self._workdir} deletes checkpoints sooner than they are verified; raise train.max_to_keep.')
        return self._newest_intact(repeats - 1)
      fallback = f'falling back to the previous one, of step {steps[i - 1]}' if i else 'there is no earlier one'
      print(f'warning: the checkpoint of step {step} in {self._workdir} is damaged: {damage}; {fallback}.',
            file=sys.stderr, flush=True)
    return _ALL_DAMAGED if steps else _NONE

  def _move_away(self, step: int) -> None:
    target = storage.path(self._workdir) / DAMAGED / str(step)
    storage.move_folder(self._folder / str(step), target)
    print(f'warning: checkpoint {step} was moved to {target}; inspect and delete it.', file=sys.stderr, flush=True)

  def _damage(self, step: int) -> str:
    """See `manifest.damage`; what a bucket has is read again, since bits may have changed on the way."""
    folder = self._folder / str(step)
    return (damage := manifest.damage(folder)) and (manifest.damage(folder) if self._is_remote else damage)

  def _verified(self, step: int | None) -> int:
    """The given or newest step, after pending saves.

    Raises:
      RunError: it is damaged, or was deleted since these checkpoints were opened.
      UsageError: it was not saved.
    """
    self.finish()
    if not (saved := sorted(self._manager.all_steps())):
      raise UsageError(f'{self._workdir} has no checkpoint yet; train it first.')
    if step is not None and step not in saved:
      raise UsageError(
          f'{self._workdir} has no checkpoint of step {step}; it has those of {", ".join(map(str, saved))}.')
    step = self.latest() if step is None else step
    self._check_exists(step)
    if step != self._opened and step not in self._own and (damage := self._damage(step)):
      raise _DamagedError(step, self._workdir, damage)
    return step

  def _check_exists(self, step: int) -> None:
    if not self._writes and not self._is_remote and not (self._folder / str(step)).exists():
      raise RunError(f'the checkpoint of step {step} in {self._workdir} was deleted meanwhile, for example because its '
                     'run trains on and keeps newer ones; repeat the command.')

  def _of_intact(self, step: int | None, read: Callable[[int], Any]) -> Any:
    """What `read` gives for a step; None: for the newest one whose arrays are those that were saved."""
    while True:
      chosen = self._verified(step)
      try:
        return read(chosen)
      except _DamagedError as e:
        if step is not None:
          raise
        self._damaged[chosen] = e.damage
        self._own.discard(chosen)
        self._opened = self._open()
        self._manager.reload()

  def _saved_tree(self, step: int) -> Any:
    """Shapes and types of the arrays of a step."""
    return self._read(step, lambda _: self._manager.item_metadata(step).tree, are_arrays=False)

  def _read_arrays(self, step: int, handler: ocp.CheckpointHandler, args: Any) -> Any:
    """What a handler reads, by itself: in a `Checkpointer` each process would wait for one that fails."""
    with contextlib.closing(handler):
      return self._read(step, lambda folder: handler.restore(folder, args=args))

  def _read(self, step: int, read: Callable[[storage.Path], Any], are_arrays: bool = True) -> Any:
    """What `read` reads of the folder of a step's arrays, again if these are not those that were saved.

    All processes read again if one must; `read` must not wait for another one.

    Raises:
      _DamagedError: they are not the second time, either.
    """
    folder = self._folder / str(step)
    for _ in range(_READS):
      saved, tree, wrong = {}, None, []
      try:
        saved, tree = manifest.array_sums(folder), read(folder / _ITEM)
      except Exception as e:
        is_of_devices = isinstance(e, (MemoryError, jax.errors.JaxRuntimeError))  # they are full, for example
        if not self._is_remote or is_of_devices or storage.explain(e, str(self._workdir)):
          self._check_exists(step)
          raise
        wrong = [f'{type(e).__name__} in decoding them']
      [failed] = multihost.sums_over_processes([bool(wrong)])
      if not failed and saved and are_arrays:
        wrong = [path for path, x in array_sums(tree).items() if int(x) != saved[path]]
        [failed] = multihost.sums_over_processes([bool(wrong)])
      if not failed:
        return tree
      names = errors.first_few(wrong or ['in another process, see its output'])
      print(f'warning: arrays of the checkpoint of step {step} in {self._workdir} differ from what was saved '
            f'({names}).', file=sys.stderr, flush=True)
    raise _DamagedError(step, self._workdir, f'{_READS} reads differ from what was saved ({names})')

  def _saved_params(self, step: int, averaged: bool = True) -> tuple[str, Any]:
    """(field of the state, shapes) of the parameters to use of a step."""
    tree = self._saved_tree(step)
    name = 'ema_params' if averaged and tree.get('ema_params') else 'params'
    return name, tree[name]

  def _check_fits(self, step: int, shapes: Any, like: Any, partial: bool = False) -> None:
    """Raises UsageError with the arrays that differ between saved shapes and `like`. partial: that has all of them."""
    saved, expected = describe_arrays(shapes), describe_arrays(like)
    wrong = [f'{name}: {saved.get(name, "absent")} → {expected.get(name, "absent")}'
             for name in sorted({*expected} if partial else {*saved, *expected})
             if saved.get(name) != expected.get(name)]
    if wrong:
      raise UsageError(
          f'the checkpoint of step {step} in {self._workdir} has other arrays than this model '
          f'({errors.first_few(wrong, separator="; ")}): another version of this package wrote it, or its config was '
          'edited. Continue with the version that wrote it, or start a new run from its parameters with '
          'config.train.init.')

  def _best_of(self, steps: Sequence[int]) -> int | None:
    """The step with the best value; of equal values the later one."""
    return checkpoint_choice.best_of({s: self._metrics.get(s, {}) for s in steps}, self._best_metric)

  def _write_manifest(self) -> None:
    """Called by Orbax in its thread and one process, when all is written, before the step is named or committed."""
    self._manager.check_for_errors()  # also waits until its metadata are written
    final = self._folder / str(self._pending)
    folder = final if self._in_place else final.with_name(final.name + ocp.path.atomicity.TMP_DIR_SUFFIX)
    sums = {path: int(x) for path, x in jax.device_get(self._sums).items()}
    manifest.write(folder, final, self._metrics[self._pending], sums, self._evaluation_data)

  @contextlib.contextmanager
  def _report_disk_errors(self) -> Iterator[None]:
    """Turns an error of the disk during a save into a RunError that states which checkpoint is safe."""
    try:
      yield
    except Exception as e:
      is_full = errors.disk_is_full(e)
      reason = storage.explain(e, str(self._workdir)) if self._is_remote else None
      if not isinstance(e, OSError) and not is_full and reason is None:
        raise
      step, self._pending = self._pending, None
      # Orbax has removed old steps from its list, but deletes them only after a save that succeeds.
      kept = saved_step(self._workdir)
      safe = 'nothing was saved before it' if kept is None else f'that of step {kept} is safe'
      if reason:
        raise RunError(f'the checkpoint of step {step} could not be written; {safe}; {reason}') from e
      space = '' if self._is_remote else f' ({errors.free_space(self._folder)})'
      fix = 'Free some space' if is_full else f'Check whether {self._folder} can be reached, and who may write there'
      raise RunError(
          f'the checkpoint of step {step} could not be written: {"the disk is full" if is_full else e}{space}; {safe}. '
          f'{fix}, then the same command continues.') from e


@jax.jit
def array_sums(tree: Any) -> dict[str, jax.Array]:
  """{path: u32 []}: the bits of each array, as integers times odd weights by position, summed modulo 2**32.

  One changed bit changes the sum: an odd number times a power of two below 2**32 is not 0 modulo 2**32. The order of
  the sum does not matter, so that every mesh and every number of processes gives the same. Digests of objects in a
  bucket say nothing of bits that change on the way there or back; these sums are of the arrays at both ends.
  """
  return {path: _sum(x) for path, x in by_path(tree).items()}


def _sum(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
  weights = jnp.ones(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):  # without a reshape, which would gather an array that is split over devices
    stride = 2 * math.prod(bits.shape[axis + 1:]) % 2**32
    weights += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
  return jnp.sum(bits.astype(jnp.uint32) * weights, dtype=jnp.uint32)


class _DamagedError(RunError):
  """The files of a step, or its arrays in a bucket, are not those that were saved."""

  def __init__(self, step: int, workdir: str | os.PathLike[str], damage: str):
    super().__init__(f'the checkpoint of step {step} in {workdir} is damaged: {damage}; choose another step.')
    self.damage = damage
