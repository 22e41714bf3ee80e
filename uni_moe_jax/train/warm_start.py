"""Starting from another run: its parameters are copied, and those that tuning adds are initialized."""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest
from uni_moe_jax.utils.tree_paths import by_path

# Parameters that only one of the models may have: prompts, heads, temperatures of other tasks, additions to a patch.
ADDED = (r'/prompts/', r'^embed/(spe_bias|visual_type|difference|neighbors)$', r'^linear_head/', r'^log_scale_')
_LABEL_PROMPTS = 'embed/prompts/label_'


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


class Classes(NamedTuple):
  """Classes whose rows a parameter has, in order."""
  entries: Any  # of the target set in the config
  digest: str | None  # of their keys and names; None if they are numbers, or in runs of older versions
  size: int


def _target_sets(config: Any) -> dict[str, str]:
  """Paths of label prompts and of the linear head → the target set of their classes."""
  sets = {f'{_LABEL_PROMPTS}{name}': name for name, s in config.target_sets.items() if s.label_prompts}
  head = ('kernel', 'bias', 'similarity_weight')
  return sets | {f'linear_head/{name}': t.target_set for t in config.tasks.values() if t.linear_head for name in head}


def class_digests(
    config: Any, keys: Mapping[str, Sequence[str]], names: Mapping[str, Sequence[str]]) -> dict[str, str]:
  """Target set with label prompts or a linear head → digest of its classes, except for those that are numbers alone.

  keys, names: target set → what records call its entries, and their names.
  """
  digests = {}
  for target_set in sorted({*_target_sets(config).values()} & {*keys}):
    pairs = [*zip(keys[target_set], names[target_set], strict=True)]
    if not all(key.isdecimal() and name == key for key, name in pairs):
      digests[target_set] = hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]
  return digests


def classes(config: Any, digests: Mapping[str, str], params: Any) -> dict[str, Classes]:
  """Paths of label prompts and of the linear head → their classes. digests: of `class_digests`. params: shapes."""
  shapes = by_path(params)
  size = lambda path: shapes[path if path.startswith(_LABEL_PROMPTS) else 'linear_head/bias'].shape[0]
  return {path: Classes(config.target_sets[name].entries, digests.get(name), size(path))
          for path, name in _target_sets(config).items() if path in shapes}


def of_other_classes(new: Mapping[str, Classes], old: Mapping[str, Classes]) -> set[str]:
  """Paths that both runs have, but for other classes."""
  def differ(a, b):
    same = a.digest == b.digest if a.digest and b.digest else a.entries == b.entries
    return a.size != b.size or not same
  return {path for path, of_path in new.items() if path in old and differ(of_path, old[path])}


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
