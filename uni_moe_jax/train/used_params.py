"""Which parameters a step gave a gradient, in the sense of PyTorch: part of the graph, whatever its value.

JAX gives every parameter a gradient, zero where there is none. Two published conventions of the optimizer tell "zero" from
"absent" (see `adam.py`); what is absent follows from what was encoded: experts that no row chose, embedders of a
modality that no sequence has, temperatures of other tasks and those at their clamp.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from uni_moe_jax.model.heads import MAX_SCALE
from uni_moe_jax.model.spec import PROJECTIONS, ModelSpec
from uni_moe_jax.utils.tree_paths import path_of

# Parameters that only some steps use, and what a step must hold for it; \1 is what the pattern's group found.
_NEEDS = (
    (r'^embed/(patch|patch_bias|difference|temporal|spatial|visual_type)$', 'visual'),
    (r'^embed/(position|type)$', 'text'),
    (r'/prompts/target$', 'target'),
    (r'^linear_head/', 'head'),
    (r'^embed/prompts/(label_.+)$', r'\1'),
)
_SCALE = 'log_scale_'

Chosen = dict[str, tuple[dict[str, jax.Array], ...]]


def used_experts(collected) -> Chosen:
  """{'blocks': ({part: int32 [periods, E]}, …), 'tail': ({part: int32 [E]}, …)}: how many encoded rows (of tokens:
  slots) chose an expert."""
  return {subtree: tuple(
      {part: d.used for part, d in out['router_stats'].items()} for out in collected[subtree])
          for subtree in ('blocks', 'tail')}


def expert_part(spec: ModelSpec, path: str) -> tuple[str, int, str] | None:
  """(subtree, block, part) of a parameter with an expert axis; None of any other."""
  names = path.split('/')
  if len(names) < 5 or names[3] not in PROJECTIONS:
    return None
  subtree, block, part = names[1], int(names[2].removeprefix('block')), PROJECTIONS[names[3]]
  pattern = spec.stack.period if subtree == 'blocks' else spec.stack.tail
  return (subtree, block, part) if part in pattern[block] else None


def unit_axes(spec: ModelSpec, path: str) -> int:
  """How many leading axes of a parameter enumerate slices that are updated on their own: (periods, experts) or none."""
  found = expert_part(spec, path)
  return 0 if found is None else 1 + (found[0] == 'blocks')


def touched(
    spec: ModelSpec, params: Any, chosen: Chosen, holds: Sequence[str], temperatures: Sequence[str]) -> Any:
  """A bool per parameter, or per expert slice ([periods, E] or [E]): whether the step's graph holds it.

  Args:
    spec: of the model.
    params: its parameters.
    chosen: see `used_experts`; over all encoded rows, those of sets whose loss has weight 0 included.
    holds: what the step holds: 'visual' or 'text' segments, a 'target' side, a task with a linear 'head', 'label_<set>' for
      each set with label prompts.
    temperatures: groups of its tasks.
  """
  def one(key_path, leaf):
    path = path_of(key_path)
    expert = expert_part(spec, path)
    if expert is not None:
      subtree, block, part = expert
      return chosen[subtree][block][part] > 0
    if path.startswith(_SCALE):
      here = path.removeprefix(_SCALE) in temperatures
      return jnp.asarray(here) & (jnp.exp(leaf) <= MAX_SCALE)
    needed = next((m.expand(what) for pattern, what in _NEEDS if (m := re.search(pattern, path))), None)
    if needed == 'text' and spec.prefix_word is not None:
      needed = None  # a word as prefix has a position, too
    return jnp.asarray(needed is None or needed in holds)
  return jax.tree_util.tree_map_with_path(one, params)
