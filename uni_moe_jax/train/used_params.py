"""Which parameters a step uses in PyTorch's sense: those in its graph, whatever their gradient is.

JAX gives every parameter a gradient, zero where there is none. Two published conventions of the optimizer distinguish
"zero" from "absent" (see `adam`). Absent are experts that nothing chose, embedders of a modality that was not encoded,
and temperatures of other tasks or at their clamp.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from uni_moe_jax.config.plan import Plan
from uni_moe_jax.model.encoder import Collected
from uni_moe_jax.model.heads import LOG_SCALE, MAX_SCALE
from uni_moe_jax.model.spec import PROJECTIONS, ModelSpec
from uni_moe_jax.utils.tree_paths import path_of

# Parameters that only some steps use, and the content that uses them; \1 is the group of the pattern.
_NEEDS = (
    (r'^embed/(stem.*|patch|patch_bias|difference|temporal|spatial|visual_type)$', 'visual'),
    (r'^embed/(position|type|neighbors)$', 'text'),
    (r'/prompts/target$', 'target'),
    (r'^linear_head/', 'head'),
    (r'^embed/prompts/(label_.+)$', r'\1'),
)

UsedExperts = dict[str, tuple[dict[str, jax.Array], ...]]


def used_experts(collected: Collected) -> UsedExperts:
  """Number of conditions (token routers: slots) that use each expert.

  {'blocks': ({sublayer: int32 [periods, E]}, …), 'tail': ({sublayer: int32 [E]}, …)}.
  """
  return {subtree: tuple({name: d.used for name, d in out['router_stats'].items()} for out in collected[subtree])
          for subtree in ('blocks', 'tail')}


def expert_sublayer(spec: ModelSpec, path: str) -> tuple[str, int, str] | None:
  """(subtree, block, sublayer) of a parameter with an expert axis; None for any other."""
  names = path.split('/')
  if len(names) < 5 or names[3] not in PROJECTIONS:
    return None
  subtree, block, sublayer = names[1], int(names[2].removeprefix('block')), PROJECTIONS[names[3]]
  pattern = spec.stack.period if subtree == 'blocks' else spec.stack.tail
  return (subtree, block, sublayer) if sublayer in pattern[block] else None


def unit_axes(spec: ModelSpec, path: str) -> int:
  """Number of leading axes that the optimizer updates separately: (periods, experts), (experts), none."""
  expert = expert_sublayer(spec, path)
  return 0 if expert is None else 1 + (expert[0] == 'blocks')


def contents(plan: Plan) -> tuple[str, ...]:
  """What a step of the plan encodes and scores, see `used_mask`."""
  names = {s.modality for t in plan.tasks for s in t.type.inputs}
  if plan.sets or any(t.type.target == 'pair' for t in plan.tasks):
    names |= {'text', 'target'}
  if any(t.linear_head for t in plan.tasks):
    names.add('head')
  return tuple(sorted(names | {f'label_{s.name}' for s in plan.sets if s.label_prompts}))


def used_mask(
    spec: ModelSpec, params: Any, used: UsedExperts, contents: Sequence[str], temperatures: Sequence[str]) -> Any:
  """A bool per parameter, or per expert slice ([periods, E] or [E]): whether the step uses it.

  Args:
    spec, params: of the model.
    used: see `used_experts`, over everything encoded, also target sets whose loss has weight 0.
    contents: 'visual' or 'text' segments, a 'target' side, a task with a linear 'head', 'label_<set>' for each set with
      label prompts.
    temperatures: groups of the step's tasks.
  """
  def of_param(key_path, leaf):
    path = path_of(key_path)
    if (expert := expert_sublayer(spec, path)) is not None:
      subtree, block, sublayer = expert
      return used[subtree][block][sublayer] > 0
    if path.startswith(LOG_SCALE):
      return jnp.asarray(path.removeprefix(LOG_SCALE) in temperatures) & (jnp.exp(leaf) <= MAX_SCALE)
    need = next((m.expand(content) for pattern, content in _NEEDS if (m := re.search(pattern, path))), None)
    if spec.prefix_word is not None and path in ('embed/position', 'embed/type'):  # every sequence starts with a word
      need = None
    return jnp.asarray(need is None or need in contents)
  return jax.tree_util.tree_map_with_path(of_param, params)
