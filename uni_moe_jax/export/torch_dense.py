"""What is left of a merged model in the layout of the published dense model, which has temperature groups of its own names."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.config.schema import PUBLISHED_GROUPS, PUBLISHED_TEMPERATURES
from uni_moe_jax.export import torch_layout
from uni_moe_jax.export.programs import Asked
from uni_moe_jax.export.torch_layout import LayoutError
from uni_moe_jax.model.spec import ModelSpec, router_input_name
from uni_moe_jax.moe import routers

_SCALE = 'log_scale_'  # path of a group's parameter, before its name


def state(spec: ModelSpec, params: Any, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
  """The published layout's arrays of a dense model that serves some tasks: of its temperature groups only theirs go along, and
  no kernel of the changes between frames, for pictures have none.

  Raises:
    LayoutError: more than one condition is left, or the layout has no place for a parameter that the tasks need.
  """
  if spec.router != routers.DENSE:
    many = f'{len(spec.kernels)} conditions ({", ".join(router_input_name(row) for row, _ in spec.kernels)})' if spec.kernels else (
        f'a {spec.router} router')
    raise LayoutError(
        f'--torch: the published dense layout holds one kernel per projection, and this export has {many}; choose tasks of one '
        'condition with --tasks, and --fixed_sets. `launch/convert.py --output` writes the layout with experts.')
  clips = [a.task.name for a in asked if a.frames > 1]
  if spec.frame_differences and clips:
    raise LayoutError(f'--torch: the published layout has no place for config.model.frame_differences, and task {clips[0]!r} sees '
                      'clips; choose tasks of pictures with --tasks.')
  groups = _groups(spec, params, [a.task for a in asked])
  renamed = params | {_SCALE + theirs: params[_SCALE + ours] for theirs, ours in groups.items()}
  return torch_layout.to_torch(renamed, dataclasses.replace(spec, temperature_groups=tuple(groups), frame_differences=False))[0]


def _groups(spec: ModelSpec, params: Any, tasks: Sequence[TaskSpec]) -> dict[str, str]:
  """{published name: ours} of the temperature groups of some tasks: its own, or that of its kind."""
  found: dict[str, str] = {}
  for task in tasks:
    ours = task.temperature
    if ours not in spec.temperature_groups:  # of pairs that were never trained only the order matters
      continue
    theirs = ours if ours in PUBLISHED_TEMPERATURES else PUBLISHED_GROUPS.get(task.type.name)
    if theirs is None:
      raise LayoutError(f'--torch: the published layout has no temperature group for config.tasks.{task.name}.kind='
                        f'{task.type.name!r}; it has those of {", ".join(PUBLISHED_GROUPS)}. Leave the task out with --tasks.')
    other = found.setdefault(theirs, ours)
    scales = [float(np.exp(params[_SCALE + name])) for name in (other, ours)]
    if scales[0] != scales[1]:
      raise LayoutError(f'--torch: temperature groups {other!r} (1/τ = {scales[0]:.4g}) and {ours!r} ({scales[1]:.4g}) would both '
                        f'be {theirs!r} in the published layout; leave the tasks of one out with --tasks, or train all of them '
                        'with one `temperature`.')
  return found
