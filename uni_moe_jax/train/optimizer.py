"""The optimizer of a config: AdamW with parameter groups, freezing, warm-up and gradient clipping.

A fine-tuning recipe is a list of (pattern, …) groups. Every parameter must match one, and the first match applies.
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
class ParamGroup:
  """How one parameter is optimized: factor of the learning rate and decoupled weight decay, or frozen."""
  lr_factor: float
  weight_decay: float
  frozen: bool = False


def match_param_groups(params: Any, groups, router_lr_multiplier: float = 1.0) -> Any:
  """A tree of `ParamGroup` for a parameter tree, by `config.optim.param_groups`.

  router_lr_multiplier: of the learning rate of routers (the published WG_LR_FACTOR).

  Raises:
    UsageError: a parameter that no pattern matches, or a freezing pattern that freezes nothing.
  """
  used = set()

  def match(key_path, _):
    path = path_of(key_path)
    for i, (pattern, factor, *weight_decay) in enumerate(groups):
      if re.search(pattern, path):
        used.add(i)
        if factor == FREEZE:
          return ParamGroup(0.0, 0.0, True)
        return ParamGroup(float(factor) * (router_lr_multiplier if '_router/' in path else 1), float(*weight_decay))
    raise UsageError(f"config.optim.param_groups: no pattern matches parameter {path!r}; end with ('.*', 1.0, 0.0) or "
                     f"('.*', '{FREEZE}').")

  tree = jax.tree_util.tree_map_with_path(match, params)
  for i, (pattern, factor, *_) in enumerate(groups):
    if factor == FREEZE and i not in used:
      raise UsageError(f'config.optim.param_groups: {pattern!r} freezes nothing: no parameter matches it, or an '
                       'earlier pattern does; correct it, move it up or remove it.')
  return tree


def frozen_paths(groups: Any) -> frozenset[str]:
  """Paths of the parameters that a tree of `ParamGroup` freezes."""
  return frozenset(path for path, group in by_path(groups).items() if group.frozen)


def schedule(c) -> optax.Schedule:
  """Learning rate of update t = 0, 1, …

  (t + 1) / warmup_steps, then cosine to `final_lr_fraction`, constant past the end. 'published': t / warmup_steps, so
  that the first update only fills the moments; then the larger of `final_lr_fraction` and the cosine, which rises again
  past the end. The end is `decay_steps`, by default that of the run.
  """
  peak, warmup, final = c.optim.learning_rate, c.optim.warmup_steps, c.optim.final_lr_fraction
  end = c.optim.decay_steps or c.train.steps

  def rate(count):
    t = jnp.asarray(count, jnp.float32)
    if c.optim.schedule == 'published':
      cosine = 0.5 * (1 + jnp.cos(jnp.pi * (t - warmup) / max(1, end - warmup)))
      return peak * jnp.where(t < warmup, t / max(1, warmup), jnp.maximum(final, cosine))
    rise = (t + 1) / max(1, warmup)
    progress = jnp.clip((t - warmup) / max(1, end - warmup), 0.0, 1.0)
    fall = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return peak * jnp.where(t < warmup, rise, 1.0 if c.optim.schedule == 'constant' else fall)
  return rate


def layers_above(stack: Stack, path: str) -> np.ndarray:
  """Layers between a parameter and the output: 0 in the last block and the head, L in the embedders.

  The array has the shape [], or [periods] for parameters that are stacked over periods.
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


def _scale_by(factors) -> optax.GradientTransformation:
  def scale(u, f):
    return u if isinstance(f, float) and f == 1.0 else u * f
  return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, factors))


def _clip(max_norm: float) -> optax.GradientTransformation:
  """Bounds the global norm, like `optax.clip_by_global_norm`.

  Optax divides every gradient by the norm, which XLA does not fuse into Adam: clipped gradients would be written to
  memory and read again.
  """
  def update(updates, _):
    factor = jnp.minimum(1, max_norm / optax.tree.norm(updates))
    return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)
  return optax.stateless(update)


def _decay(weight_decays) -> optax.GradientTransformation:
  return optax.stateless(lambda updates, params: jax.tree.map(
      lambda u, p, w: u if w == 0.0 else u + w * p, updates, params, weight_decays))


def make_optimizer(
    c, params: Any, units: Callable[[str], int] = lambda path: 0, depth: Callable[[str], Any] | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule, Any]:
  """(optimizer, learning-rate schedule, tree of `ParamGroup`) of a config.

  Frozen parameters have no moments, and the gradient norm for clipping excludes them.

  Args:
    c: the config.
    params: the parameters or their shapes.
    units: path → number of leading axes that are updated separately, see `used_params.unit_axes`. For the published
      conventions of `optim.unused_params`, whose update takes `used`.
    depth: path → `layers_above`, for `optim.layerwise_lr_decay`.
  """
  optim, learning_rate = c.optim, schedule(c)
  groups = match_param_groups(params, optim.param_groups, optim.router_lr_multiplier)

  def unless_frozen(f):  # optax.masked replaces frozen leaves by nodes without leaves
    return jax.tree_util.tree_map_with_path(
        lambda path, p, g: optax.MaskedNode() if g.frozen else f(path_of(path), p, g), params, groups)

  def layer_factor(path, p, _):  # in a shape that multiplies the parameter
    factor = optim.layerwise_lr_decay ** np.asarray(depth(path), np.float32)
    return factor.reshape(factor.shape + (1,) * (p.ndim - factor.ndim))

  weight_decay = unless_frozen(lambda path, p, g: g.weight_decay)
  steps = [_clip(optim.grad_clip_norm)] if optim.grad_clip_norm else []
  if optim.unused_params == 'update':
    steps += [optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps), _decay(weight_decay)]
  else:
    shapes = unless_frozen(lambda path, p, g: p.shape[:units(path)])
    steps.append(adam.adamw(optim.b1, optim.b2, optim.eps, weight_decay, shapes, optim.unused_params))
  steps.append(_scale_by(unless_frozen(lambda path, p, g: g.lr_factor)))
  if optim.layerwise_lr_decay != 1:
    steps.append(_scale_by(unless_frozen(layer_factor)))
  steps.append(optax.scale_by_learning_rate(learning_rate))
  frozen, trained = (jax.tree.map(lambda g, f=f: g.frozen == f, groups) for f in (True, False))
  tx = optax.chain(optax.masked(optax.chain(*steps), trained, mask_compatible_extra_args=True),
                   optax.masked(optax.set_to_zero(), frozen))
  return tx, learning_rate, groups
