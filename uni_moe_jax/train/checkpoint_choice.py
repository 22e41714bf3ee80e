"""Which checkpoint of a run is read. This module imports nothing slow."""

import os
import sys
from collections.abc import Iterator

import ml_collections

from uni_moe_jax.train import manifest
from uni_moe_jax.train.workdir import CHECKPOINTS, saved_step, saved_steps
from uni_moe_jax.utils import storage


def newest_intact(
    workdir: str | os.PathLike[str], config: ml_collections.ConfigDict) -> Iterator[tuple[int, str]]:
  """Step and digest of a run's newest checkpoint and, only if it is damaged, of those before it.

  Each is verified, which reads it, when the next one is requested.

  Args:
    workdir, config: of the run; if it trains nothing, the checkpoints are those of the run in `train.init`.
  """
  folder = _folder(workdir, config)
  for step in reversed(saved_steps(folder.parent)):
    checkpoint = folder / str(step)
    yield step, manifest.fingerprint(checkpoint)
    if not (damage := manifest.damage(checkpoint)):
      return
    print(f'warning: {checkpoint} is damaged: {damage}.', file=sys.stderr, flush=True)


def _folder(workdir: str | os.PathLike[str], config: ml_collections.ConfigDict) -> storage.Path:
  init = config.train.init
  return storage.path(init if init and saved_step(workdir) is None else workdir) / CHECKPOINTS
