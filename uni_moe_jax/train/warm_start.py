"""Starting from another run: its parameters are copied, and those that tuning adds are initialized."""

import re
from collections.abc import Collection
from typing import Any

import ml_collections
import numpy as np

from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest
from uni_moe_jax.utils.tree_paths import by_path

# Parameters that only one of the models may have: prompts, heads, temperatures of other tasks, additions to a patch.
ADDED = (r'/prompts/', r'^embed/(spe_bias|visual_type|difference|neighbors)$', r'^linear_head/', r'^log_scale_')


def compare_models(
    new: Any, old: Any, source: str, computed: Collection[str]) -> tuple[list[str], list[str]]:
  """(paths of a new run that stay fresh, paths of the old run that are dropped).

  Args:
    new: shapes of the parameters of the new run.
    old: those of the run to start from.
    source: name of that run for errors.
    computed: paths of both whose values follow from the new config, or are of other classes, and stay fresh, in any
      shape.

  Raises:
    UsageError: a parameter has another shape, or only one of the models has it and it is not among `ADDED`.
  """
  new_params, old_params = by_path(new), by_path(old)
  for path in sorted({*new_params} ^ {*old_params}):
    if not any(re.search(pattern, path) for pattern in ADDED):
      has, lacks = ('this model', source) if path in new_params else (source, 'this model')
      near = nearest(path, old_params if path in new_params else new_params)[:200]
      raise UsageError(f'config.train.init={source!r}: {has} has parameter {path!r}, {lacks} has not; config.model and '
                       f'config.moe must be those of that run. {near}')
  for path in new_params:
    if path in old_params and path not in computed and new_params[path].shape != old_params[path].shape:
      raise UsageError(f'config.train.init={source!r}: parameter {path!r} has shape {old_params[path].shape} in that '
                       f'run and {new_params[path].shape} in this model; config.model, config.moe and the tokenizer '
                       'must be those of that run.')
  return sorted({*new_params} - {*old_params} | {*computed}), sorted({*old_params} - {*new_params})


def of_other_classes(new: ml_collections.ConfigDict, old: ml_collections.ConfigDict) -> set[str]:
  """Paths of a linear head and of label prompts that both configs have, but for other target sets."""
  def entries(c):
    of_sets = {f'embed/prompts/label_{name}': s.entries for name, s in c.target_sets.items() if s.label_prompts}
    sets = [c.target_sets[t.target_set].entries for t in c.tasks.values() if t.linear_head]
    head = ('kernel', 'bias', 'similarity_weight')
    return of_sets | {f'linear_head/{name}': s for s in sets for name in head}

  trained = entries(old)
  return {path for path, s in entries(new).items() if path in trained and s != trained[path]}


def compare_params(before: Any, after: Any, frozen: frozenset[str]) -> dict[str, Any]:
  """How tuning changed parameters on the host, of which those at the paths in `frozen` do not train.

  Returns:
    {'parameters', 'trained': number of values, and of those that train; 'identical': whether every frozen parameter
    that existed before has the same bits; 'moved': whether any parameter that trains has others}.
  """
  new, old = ({path: np.asarray(x) for path, x in by_path(t).items()} for t in (after, before))
  both = {*new} & {*old}
  same = {path for path in both if new[path].tobytes() == old[path].tobytes()}
  sizes = {path: x.size for path, x in new.items()}
  return {'parameters': sum(sizes.values()), 'trained': sum(sizes[path] for path in {*new} - frozen),
          'identical': both & frozen <= same, 'moved': bool({*new} - frozen - same)}
