"""Checkpoints: Orbax, atomic, the newest k kept."""

import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

_FOLDER = 'checkpoints'


def saved_step(workdir: str | os.PathLike[str]) -> int | None:
  """The newest saved step of a work directory, which need not exist; touches nothing."""
  steps = [int(p.name) for p in (pathlib.Path(workdir) / _FOLDER).glob('*') if p.name.isdigit()]
  return max(steps, default=None)


class Checkpoints:
  """Save and restore of a train state (any pytree of arrays) in `workdir/checkpoints`; a context manager."""

  def __init__(self, workdir: str | os.PathLike[str], keep: int | None):
    """keep: newest checkpoints that stay when others are saved; None: all."""
    directory = pathlib.Path(workdir).absolute() / _FOLDER
    self._manager = ocp.CheckpointManager(
        directory, item_handlers=ocp.StandardCheckpointHandler(),
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True))

  def latest(self) -> int | None:
    """The newest saved step."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Every saved step, in order."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any) -> None:
    """Starts an asynchronous save; a step that is already saved is left alone."""
    if step != self._manager.latest_step():
      self._manager.save(step, args=ocp.args.StandardSave(state))

  def restore(self, like: Any, step: int | None = None) -> Any:
    """Restores a step (the newest by default) onto the shardings of `like`, a tree of shapes or arrays."""
    step = self.latest() if step is None else step
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return self._manager.restore(step, args=ocp.args.StandardRestore(shapes))

  def restore_params(self, step: int | None = None) -> Any:
    """The parameters of a step (the newest by default), averaged ones where they were kept, on the host."""
    step = self.latest() if step is None else step
    saved = self._manager.item_metadata(step)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), saved.tree)
    state = self._manager.restore(step, args=ocp.args.StandardRestore(like))
    return jax.device_get(state['ema'] or state['params'])

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_) -> None:
    """Waits for saves under way."""
    self._manager.wait_until_finished()
    self._manager.close()
