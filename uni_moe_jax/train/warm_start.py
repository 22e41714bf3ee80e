"""Starting from another run's parameters: what has the same name and shape is taken over, what tuning adds starts fresh."""

import re
from typing import Any

import jax
import numpy as np

from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest
from uni_moe_jax.utils.tree_paths import by_path, path_of

# What a model may have that the other has not: prompts, heads, temperatures of other tasks, and what is added to a patch.
ADDED = (r'/prompts/', r'^embed/(spe_bias|visual_type|difference)$', r'^linear_head/', r'^log_scale_')


def merge_params(fresh: Any, old: Any, source: str) -> tuple[Any, list[str], list[str]]:
  """Parameters of a new run.

  Args:
    fresh: its fresh parameters. old: those of the run to start from. source: what to call that run.

  Returns:
    (parameters, paths that start fresh, paths of `old` that have no place here).

  Raises:
    UsageError: a parameter has another shape, or is in one of the models alone and is not among `ADDED`.
  """
  here, there = by_path(fresh), by_path(old)
  for path in sorted({*here} ^ {*there}):
    if not any(re.search(pattern, path) for pattern in ADDED):
      alone, other = ('this model', source) if path in here else (source, 'this model')
      raise UsageError(f'config.train.init={source!r}: {alone} has parameter {path!r}, {other} has not; config.model and '
                       f'config.moe must be those of that run. {nearest(path, there if path in here else here)[:200]}')
  for path in here:
    if path in there and here[path].shape != there[path].shape:
      raise UsageError(f'config.train.init={source!r}: parameter {path!r} has shape {there[path].shape} there and '
                       f'{here[path].shape} here; config.model, config.moe and the tokenizer must be those of that run.')
  params = jax.tree_util.tree_map_with_path(lambda p, leaf: there.get(path_of(p), leaf), fresh)
  return params, sorted({*here} - {*there}), sorted({*there} - {*here})


def compare_params(before: Any, after: Any, frozen: frozenset[str]) -> dict[str, Any]:
  """What tuning did to parameters.

  Args:
    before, after: parameters of the run that was started from, and of the tuned one, on the host.
    frozen: paths that do not train.

  Returns:
    {'parameters', 'trained': how many values there are, and of them those that train; 'identical': whether all that is frozen
    and was there before has the same bits; 'moved': whether something that trains has not}.
  """
  here, there = ({path: np.asarray(x) for path, x in by_path(t).items()} for t in (after, before))
  same = {path for path in {*here} & {*there} if here[path].tobytes() == there[path].tobytes()}
  return {
      'parameters': sum(x.size for x in here.values()),
      'trained': sum(x.size for path, x in here.items() if path not in frozen),
      'identical': {*here} & {*there} & frozen <= same,
      'moved': bool({*here} - frozen - same)}
