"""Checkpoints: Orbax, atomic, verified before they are read; the newest k are kept, and the best."""

import contextlib
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from uni_moe_jax.train import manifest
from uni_moe_jax.train.workdir import CHECKPOINTS, DAMAGED, saved_steps
from uni_moe_jax.utils import errors, heap
from uni_moe_jax.utils.errors import RunError, UsageError

_NONE, _ALL_DAMAGED = -1, -2  # in place of a step: there is no checkpoint; there is none that is whole


class Checkpoints:
  """Save and restore of a train state (any pytree of arrays) in `workdir/checkpoints`; a context manager.

  A checkpoint of which a file is missing, cut off or altered is passed over for the one before it, and that is said.
  """

  def __init__(self, workdir: str | os.PathLike[str], max_to_keep: int | None, best_metric: str = ''):
    """max_to_keep: newest checkpoints that stay when others are saved; None: for reading only, nothing is saved, moved or deleted.
    best_metric: the checkpoint with the lowest value of this metric stays, too; '' is none.

    Raises RunError where there are checkpoints and none is whole.
    """
    self._workdir, self._folder = workdir, pathlib.Path(workdir).absolute() / CHECKPOINTS
    # The newest step that was whole when this was opened; later ones were saved by this process.
    self._opened = self._agreed(max_to_keep is not None)
    self._own, self._pending = set(), None
    self._best, self._metrics = best_metric, {step: manifest.metrics(self._folder / str(step)) for step in saved_steps(workdir)}
    self._manager = ocp.CheckpointManager(
        self._folder, item_handlers=ocp.StandardCheckpointHandler(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=_Retention(max_to_keep, self._best_of), create=max_to_keep is not None, cleanup_tmp_directories=max_to_keep is not None,
            enable_async_checkpointing=True, async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            # Orbax's own metadata of a step are not read before the step is verified.
            lightweight_initialize=True))

  def latest(self) -> int | None:
    """The newest step that is saved and whole."""
    return max(self.steps(), default=None)

  def best(self) -> int | None:
    """The step with the lowest value of the metric `best`; None where no checkpoint has it."""
    return self._best_of(self.steps())

  def steps(self) -> list[int]:
    """Every saved step, in order; without those that are newer than the newest whole one."""
    return [s for s in sorted(self._manager.all_steps()) if s in self._own or self._opened is not None and s <= self._opened]

  def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
    """Starts an asynchronous save; a step that is already saved is left alone. Raises RunError where the last save failed.

    Args:
      step: of the state.
      state: a pytree of arrays.
      metrics: that are known of it, by name.
    """
    self.finish()
    if step in self.steps():
      return
    self._own.add(step)
    self._metrics[step] = {k: v for k, v in (metrics or {}).items() if math.isfinite(v)}
    self._pending = step
    with self._explained():
      self._manager.save(step, args=ocp.args.StandardSave(state), custom_metadata=manifest.MARK)

  def check(self) -> None:
    """Raises RunError if a save has failed since the last look. Does not wait."""
    if self._pending is not None and not self._manager.is_saving_in_progress():
      self.finish()

  def finish(self) -> None:
    """Waits until a save under way is on disk. Raises RunError if it failed."""
    with self._explained():
      self._manager.wait_until_finished()
    if self._pending is not None:
      heap.give_back()  # arrays of a save lie between those of steps
    self._pending = None

  def restore(self, like: Any, step: int | None = None) -> Any:
    """Restores a step (the newest by default) onto the shardings of `like`, a tree of shapes or arrays.

    Raises:
      RunError: the step that is asked for is damaged. UsageError: it holds another model than `like`.
    """
    step = self._verified(step)
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    self._check_fits(step, shapes)
    return self._manager.restore(step, args=ocp.args.StandardRestore(shapes))

  def restore_params(self, step: int | None = None) -> Any:
    """The parameters of a step (the newest by default), averaged ones where they were kept, on the host.

    Raises RunError where the step that is asked for is damaged.
    """
    state = self.restore_host(step)
    return state['ema_params'] or state['params']

  def restore_host(self, step: int | None = None) -> Any:
    """All of a step (the newest by default), on the host, as dictionaries and lists. Raises RunError where it is damaged."""
    step = self._verified(step)
    saved = self._manager.item_metadata(step)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), saved.tree)
    return jax.device_get(self._manager.restore(step, args=ocp.args.StandardRestore(like)))

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind, *_) -> None:
    """Waits for saves under way."""
    try:
      self.finish()
    except RunError:
      if kind is None:  # another error is on its way already
        raise
    finally:
      self._manager.close()

  def _agreed(self, clean: bool) -> int | None:
    """The newest whole step, found by the first process and told to the others."""
    found = _newest_whole(self._workdir, self._folder, clean) if jax.process_index() == 0 else _NONE
    if jax.process_count() > 1:
      found = int(multihost_utils.broadcast_one_to_all(found))
    if found == _ALL_DAMAGED:
      raise RunError(
          f'every checkpoint in {self._folder} is damaged (see above), so that nothing of this run can be trusted. Copy one that '
          f'is whole back, or delete {self._folder} to train from the start.')
    return None if found == _NONE else found

  def _verified(self, step: int | None) -> int:
    """The step that is meant, on disk. Raises RunError where it is damaged."""
    self.finish()
    step = self.latest() if step is None else step
    if step != self._opened and step not in self._own and (wrong := manifest.damage(self._folder / str(step))):
      raise RunError(f'the checkpoint of step {step} in {self._workdir} is damaged: {wrong}; ask another step.')
    return step

  def _check_fits(self, step: int, like: Any) -> None:
    """Raises UsageError with the arrays that a checkpoint and `like` do not share."""
    saved, wanted = _arrays(self._manager.item_metadata(step).tree), _arrays(like)
    wrong = [f'{name}: {saved.get(name, "absent")} → {wanted.get(name, "absent")}'
             for name in sorted({*saved, *wanted}) if saved.get(name) != wanted.get(name)]
    if wrong:
      more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
      raise UsageError(
          f'the checkpoint of step {step} in {self._workdir} holds other arrays than this model ({"; ".join(wrong[:3])}{more}): '
          'another version of this package wrote it, or its config was changed by hand. Go on with the version that wrote it, '
          'or start a new run from its parameters with config.train.init.')

  def _best_of(self, steps: Sequence[int]) -> int | None:
    """Of equal values the later one."""
    known = [s for s in steps if self._best and self._best in self._metrics.get(s, {})]
    return min(known, key=lambda s: (self._metrics[s][self._best], -s), default=None)

  def _seal(self) -> None:
    """Is called by Orbax in its thread, in one process, when everything is written and before the step gets its name."""
    self._manager.check_for_errors()  # also waits for its metadata to be written
    final = self._folder / str(self._pending)
    manifest.write(final.with_name(final.name + ocp.path.atomicity.TMP_DIR_SUFFIX), final, self._metrics[self._pending])

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    """Turns an error of the disk in a save into a RunError that says what is safe."""
    try:
      yield
    except Exception as e:
      if not isinstance(e, OSError) and not errors.disk_is_full(e):
        raise
      step, self._pending = self._pending, None
      # Orbax has struck old steps off its list already, but deletes them only after a save that succeeds.
      kept = max(saved_steps(self._workdir), default=None)
      safe = 'nothing was saved before it' if kept is None else f'that of step {kept} is safe'
      full = errors.disk_is_full(e)
      why = 'the disk is full' if full else str(e)
      what = 'Make room' if full else 'Look whether its disk can be reached and who may write there'
      raise RunError(
          f'the checkpoint of step {step} could not be written: {why} ({errors.free_space(self._folder)}); {safe}. {what}, '
          'then the same command continues.') from e


class _Retention:
  """Orbax's interface for which steps stay: the newest k and the best; k None: all."""

  def __init__(self, keep: int | None, best_of):
    self._keep, self._best_of = keep, best_of

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    steps = [c.step for c in checkpoints]
    stay = {self._best_of(steps), *(steps if self._keep is None else sorted(steps)[-self._keep:])}
    return [s in stay for s in steps]


def _newest_whole(workdir: str | os.PathLike[str], folder: pathlib.Path, clean: bool) -> int:
  """The newest whole step, _NONE or _ALL_DAMAGED; says which are not. clean: those go out of the way of the next save."""
  steps = saved_steps(workdir)
  for i, step in reversed(list(enumerate(steps))):
    wrong = manifest.damage(folder / str(step))
    if not wrong:
      if not manifest.is_sealed(folder / str(step)):
        print(f'note: the checkpoint of step {step} in {workdir} has no checksums (an earlier version wrote it); it is read as it is.',
              file=sys.stderr, flush=True)
      if clean:
        for damaged in steps[i + 1:]:
          _move_away(workdir, folder, damaged)
      return step
    before = f'falling back to the one before, of step {steps[i - 1]}' if i else 'there is none before it'
    print(f'warning: the checkpoint of step {step} in {workdir} is damaged: {wrong}; {before}.', file=sys.stderr, flush=True)
  return _ALL_DAMAGED if steps else _NONE


def _move_away(workdir: str | os.PathLike[str], folder: pathlib.Path, step: int) -> None:
  place = pathlib.Path(workdir) / DAMAGED / str(step)
  shutil.rmtree(place, ignore_errors=True)
  place.parent.mkdir(exist_ok=True)
  (folder / str(step)).rename(place)
  print(f'warning: it was moved to {place}; delete that folder when you have looked at it.', file=sys.stderr, flush=True)


def _arrays(tree: Any) -> dict[str, str]:
  """'float32[8, 3]' by path, in a tree of shapes or in Orbax's description of one."""
  found = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    if hasattr(leaf, 'shape'):
      name = '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)
      found[name] = f'{leaf.dtype}{list(leaf.shape)}'
  return found
