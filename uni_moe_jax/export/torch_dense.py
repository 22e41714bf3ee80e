"""Merged models in the layout of the published dense model, with its names of temperature groups."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.config.schema import PUBLISHED_GROUPS, PUBLISHED_TEMPERATURES
from uni_moe_jax.convert import torch_layout
from uni_moe_jax.convert.torch_layout import LayoutError
from uni_moe_jax.export.programs import ExportedTask
from uni_moe_jax.model.heads import LOG_SCALE
from uni_moe_jax.model.spec import ModelSpec, router_input_name
from uni_moe_jax.moe import routers


def state(spec: ModelSpec, params: Any, tasks: Sequence[ExportedTask]) -> dict[str, np.ndarray]:
  """Returns arrays of the published layout for some tasks of a dense model.

  They include only the temperature groups of these tasks, and no kernel of frame differences, which images do not use.

  Raises:
    LayoutError: the model has several kernels per projection, or the tasks need a parameter that the layout lacks.
  """
  if spec.router != routers.DENSE:
    contents = f'a {spec.router} router'
    if spec.kernels:
      inputs = ', '.join(router_input_name(condition) for condition, _ in spec.kernels)
      contents = f'{len(spec.kernels)} conditions ({inputs})'
    raise LayoutError(
        f'--torch: the published dense layout has one kernel per projection, but this export has {contents}; choose '
        'tasks of one condition with --tasks and add --bake_targets. `uni-moe convert --output` writes the layout '
        'with experts.')
  of_videos = [e.task.name for e in tasks if e.num_frames > 1]
  if spec.frame_differences and of_videos:
    raise LayoutError('--torch: the published layout does not support config.model.frame_differences, but task '
                      f'{of_videos[0]!r} reads videos; choose image tasks with --tasks.')
  groups = _groups(spec, params, [e.task for e in tasks])
  renamed = params | {LOG_SCALE + published: params[LOG_SCALE + own] for published, own in groups.items()}
  plain = dataclasses.replace(spec, temperature_groups=tuple(groups), frame_differences=False)
  return torch_layout.to_torch(renamed, plain)[0]


def _groups(spec: ModelSpec, params: Any, tasks: Sequence[TaskSpec]) -> dict[str, str]:
  """{published name: name in the run} of the tasks' groups: the run's name if it is published, else the task type's."""
  groups: dict[str, str] = {}
  for task in tasks:
    own = task.temperature
    if own not in spec.temperature_groups:  # pairs without training are ranked, which needs no scale
      continue
    published = own if own in PUBLISHED_TEMPERATURES else PUBLISHED_GROUPS.get(task.type.name)
    if published is None:
      raise LayoutError(f'--torch: the published layout has no temperature group for config.tasks.{task.name}.type='
                        f'{task.type.name!r}; it has groups for {", ".join(PUBLISHED_GROUPS)}. Leave the task out with '
                        '--tasks.')
    other = groups.setdefault(published, own)
    scales = [float(np.exp(params[LOG_SCALE + name])) for name in (other, own)]
    if scales[0] != scales[1]:
      raise LayoutError(f'--torch: temperature groups {other!r} (1/τ = {scales[0]:.4g}) and {own!r} ({scales[1]:.4g}) '
                        f'would both be {published!r} in the published layout; leave the tasks of one out with '
                        '--tasks, or train all of them with one `temperature`.')
  return groups
