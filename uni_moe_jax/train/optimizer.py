"""The optimizer from config: AdamW whose groups are path patterns, with freezing, warm-up and clipping.

A recipe (pretrain, fine-tune, prompt-tune) is a list of rules. Every parameter must match one, and the first match wins.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uni_moe_jax.config.schema import FREEZE
from uni_moe_jax.model.spec import Stack
from uni_moe_jax.train import adam
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.tree_paths import by_path, path_of


@dataclasses.dataclass(frozen=True)
class Rule:
  """What happens to one parameter: factor of the learning rate and decoupled weight decay, or frozen."""
  lr_factor: float
  weight_decay: float
  frozen: bool = False


def match_param_groups(params: Any, rules) -> Any:
  """A tree of `Rule` for a parameter tree.

  Raises:
    UsageError: a parameter that no pattern matches, or a pattern that should freeze and freezes nothing.
  """
  used = set()

  def one(key_path, _):
    path = path_of(key_path)
    for i, rule in enumerate(rules):
      if re.search(rule[0], path):
        used.add(i)
        return Rule(0.0, 0.0, True) if rule[1] == FREEZE else Rule(float(rule[1]), float(rule[2]))
    raise UsageError(f"config.optim.param_groups: no pattern matches parameter {path!r}; end with ('.*', 1.0, 0.0) or "
                     f"('.*', '{FREEZE}').")

  tree = jax.tree_util.tree_map_with_path(one, params)
  for i, rule in enumerate(rules):
    if rule[1] == FREEZE and i not in used:
      raise UsageError(f'config.optim.param_groups: {rule[0]!r} freezes nothing: no parameter matches it, or an earlier pattern '
                       'does; correct it, move it up or leave it out.')
  return tree


def _with_gate_factor(rules: Any, factor: float) -> Any:
  """The rules, with the learning rate of routers multiplied (the published WG_LR_FACTOR)."""
  return jax.tree_util.tree_map_with_path(
      lambda path, r: dataclasses.replace(r, lr_factor=r.lr_factor * factor) if '_router/' in path_of(path) else r, rules)


def frozen_paths(rules: Any) -> frozenset[str]:
  """Paths of the parameters that a tree of rules freezes."""
  return frozenset(path for path, rule in by_path(rules).items() if rule.frozen)


def schedule(c) -> optax.Schedule:
  """Learning rate of update t = 0, 1, …: (t + 1) / warmup, then cosine to `final`, clamped at the end of the run.

  'published': t / warmup, so that the first update only fills the moments; then the larger of `final` and the cosine, which
  is not clamped and rises again past the end.
  """
  peak, warmup, steps = c.optim.learning_rate, c.optim.warmup_steps, c.train.steps

  def published(count):
    t = jnp.asarray(count, jnp.float32)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * (t - warmup) / max(1, steps - warmup)))
    return peak * jnp.where(t < warmup, t / max(1, warmup), jnp.maximum(c.optim.final_lr_fraction, cosine))

  if c.optim.schedule == 'published':
    return published

  def rate(count):
    t = jnp.asarray(count, jnp.float32)
    rise = (t + 1) / max(1, warmup)
    progress = jnp.clip((t - warmup) / max(1, steps - warmup), 0.0, 1.0)
    fall = c.optim.final_lr_fraction + (1 - c.optim.final_lr_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return peak * jnp.where(t < warmup, rise, 1.0 if c.optim.schedule == 'constant' else fall)
  return rate


def _layer_factors(decay: float, rules: Any, params: Any, depth: Callable[[str], Any]) -> Any:
  """decay^(layers above) of every parameter, with the shape to multiply it."""
  def one(path, p, rule):
    if rule.frozen:
      return optax.MaskedNode()
    factor = decay ** np.asarray(depth(path_of(path)), np.float32)
    return factor.reshape(factor.shape + (1,) * (len(p.shape) - factor.ndim))
  return jax.tree_util.tree_map_with_path(one, params, rules)


def layers_above(stack: Stack, path: str) -> np.ndarray:
  """Layers between a parameter and the model's output: 0 of the last block's and the head's, L of the embedders'.

  Returns:
    int [] or, for parameters stacked over periods, [periods].
  """
  names = path.split('/')
  if names[0] == 'embed':
    return np.array(stack.num_layers)
  if names[0] != 'encoder':
    return np.array(0)
  block = int(names[2].removeprefix('block'))
  if names[1] == 'tail':
    return np.array(len(stack.tail) - 1 - block)
  return stack.num_layers - 1 - (np.arange(stack.periods) * len(stack.period) + block)


def _scale_by(tree) -> optax.GradientTransformation:
  """Multiplies each update by its own factor."""
  def scaled(u, f):
    return u if isinstance(f, float) and f == 1.0 else u * f
  return optax.stateless(lambda updates, _: jax.tree.map(scaled, updates, tree))


def _clip(most: float) -> optax.GradientTransformation:
  """Bounds the norm over all updates together, as `optax.clip_by_global_norm` does. That divides every one of them by the norm, which is
  too dear to be fused into what Adam does with them: clipped gradients would be written and read again."""
  def update(updates, _):
    factor = jnp.minimum(1, most / optax.tree.norm(updates))
    return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)
  return optax.stateless(update)


def _decay(tree) -> optax.GradientTransformation:
  """Adds each parameter's own weight decay (decoupled)."""
  return optax.stateless(lambda updates, params: jax.tree.map(
      lambda u, p, w: u if w == 0.0 else u + w * p, updates, params, tree))


def make_optimizer(
    c, params: Any, units: Callable[[str], int] = lambda path: 0, depth: Callable[[str], Any] | None = None) -> tuple[
        optax.GradientTransformation, optax.Schedule, Any]:
  """(optimizer, learning-rate schedule, tree of rules) for a config and a parameter tree (or its shapes).

  Frozen parameters take part in nothing: they have no moments, and the clip does not count them.

  Args:
    c, params: the config, the parameters.
    units: of a parameter's path, how many leading axes are updated on their own (see `touched.unit_axes`). Only the
      published conventions for parameters without a gradient ask; then the update takes `touched`.
    depth: of a parameter's path, how many layers lie above it: a number, or one per period [periods] for stacked ones (see
      `layers_above`). Only `optim.layerwise_lr_decay` asks.
  """
  rules = _with_gate_factor(match_param_groups(params, c.optim.param_groups), c.optim.router_lr_multiplier)
  trained = jax.tree.map(lambda r: not r.frozen, rules)
  rate = schedule(c)

  def masked(field):  # optax.masked replaces frozen leaves by nodes without leaves
    return jax.tree.map(lambda r: optax.MaskedNode() if r.frozen else getattr(r, field), rules)

  steps = [_clip(c.optim.grad_clip_norm)] if c.optim.grad_clip_norm else []
  if c.optim.unused_params == 'update':
    steps += [optax.scale_by_adam(b1=c.optim.b1, b2=c.optim.b2, eps=c.optim.eps), _decay(masked('weight_decay'))]
  else:
    shapes = jax.tree_util.tree_map_with_path(
        lambda path, p, rule: optax.MaskedNode() if rule.frozen else p.shape[:units(path_of(path))], params, rules)
    steps.append(adam.adamw(
        c.optim.b1, c.optim.b2, c.optim.eps, masked('weight_decay'), shapes, c.optim.unused_params))
  steps += [
      _scale_by(masked('lr_factor')),
      *([_scale_by(_layer_factors(c.optim.layerwise_lr_decay, rules, params, depth))] if c.optim.layerwise_lr_decay != 1 else []),
      optax.scale_by_learning_rate(rate),
  ]
  frozen = jax.tree.map(lambda r: r.frozen, rules)
  return optax.chain(optax.masked(optax.chain(*steps), trained), optax.masked(optax.set_to_zero(), frozen)), rate, rules
