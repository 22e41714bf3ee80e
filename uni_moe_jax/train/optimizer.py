"""The optimizer of a config: AdamW or Muon with parameter groups, freezing, warm-up and gradient clipping.

A fine-tuning recipe is a list of (pattern, …) groups. Every parameter must match one, and the first match applies.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uni_moe_jax.config.schema import FREEZE
from uni_moe_jax.model.spec import Stack
from uni_moe_jax.train import adam, muon
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.tree_paths import by_path, path_of


class Numbers(NamedTuple):
  """Numbers of config.optim that a compiled step takes as arguments, so that runs which differ in them share it.

  Floats, or f32 scalars inside of the step. Whether an operation is left out, because its number is 0 or its factor 1,
  is part of the program.
  """
  learning_rate: Any
  warmup_steps: Any
  decay_steps: Any  # the step at which the schedule ends, by default the last one of the run
  final_lr_fraction: Any
  grad_clip_norm: Any
  router_lr_multiplier: Any
  lr_factors: tuple[Any, ...]  # by index in `param_groups`; 0 if it freezes
  weight_decays: tuple[Any, ...]

  @classmethod
  def of(cls, c) -> 'Numbers':
    """The numbers of a config."""
    groups = [(0.0, 0.0) if factor == FREEZE else (float(factor), float(*decay))
              for _, factor, *decay in c.optim.param_groups]
    chosen = {name: c.optim[name] for name in cls._fields[:-2]} | {'decay_steps': c.optim.decay_steps or c.train.steps}
    return cls(**chosen, lr_factors=tuple(f for f, _ in groups), weight_decays=tuple(d for _, d in groups))


@dataclasses.dataclass(frozen=True)
class ParamGroup:
  """How one parameter is optimized: factor of the learning rate and decoupled weight decay, or frozen."""
  lr_factor: float
  weight_decay: float
  frozen: bool = False
  index: int = dataclasses.field(default=0, compare=False)  # of the matching pattern


@dataclasses.dataclass(frozen=True, eq=False)
class Optimizer:
  """The optimizer of a config. With other numbers (`dataclasses.replace`) its state has the same structure."""
  numbers: Numbers
  groups: Any  # tree of `ParamGroup`
  schedule: str
  build: Callable[[Numbers], optax.GradientTransformation]

  @property
  def tx(self) -> optax.GradientTransformation:
    return self.build(self.numbers)

  def learning_rate(self, count: jax.Array | int) -> jax.Array:
    """Learning rate of update `count`, see `learning_rate`."""
    return learning_rate(self.schedule, self.numbers, count)


def _of_router(path: str) -> bool:
  return '_router/' in path


def param_groups(c, params: Any) -> Any:
  """The tree of `ParamGroup` of a config. A table that `model.posemb` freezes is frozen, whatever its pattern says."""
  frozen = ('embed/spatial',) if c.model.posemb == 'frozen' else ()
  return match_param_groups(params, c.optim.param_groups, c.optim.router_lr_multiplier, frozen)


def match_param_groups(
    params: Any, groups, router_lr_multiplier: float = 1.0, frozen: Collection[str] = ()) -> Any:
  """A tree of `ParamGroup` for a parameter tree, by `config.optim.param_groups`.

  Args:
    params: the parameters or their shapes.
    groups: of the config.
    router_lr_multiplier: of the learning rate of routers (the published WG_LR_FACTOR).
    frozen: paths that no pattern trains.

  Raises:
    UsageError: a parameter that no pattern matches, or a freezing pattern that freezes nothing.
  """
  used = set()

  def match(key_path, _):
    path = path_of(key_path)
    for i, (pattern, factor, *weight_decay) in enumerate(groups):
      if re.search(pattern, path):
        used.add(i)
        if factor == FREEZE or path in frozen:
          return ParamGroup(0.0, 0.0, True, i)
        factor = float(factor) * (router_lr_multiplier if _of_router(path) else 1)
        return ParamGroup(factor, float(*weight_decay), index=i)
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


def learning_rate(schedule: str, numbers: Numbers, count: jax.Array | int) -> jax.Array:
  """Learning rate of update t = 0, 1, …; schedule: of config.optim.

  (t + 1) / warmup_steps, then cosine to `final_lr_fraction`, constant past the end. 'published': t / warmup_steps, so
  that the first update only fills the moments; then the larger of `final_lr_fraction` and the cosine, which rises again
  past the end.
  """
  t, warmup, final = jnp.asarray(count, jnp.float32), numbers.warmup_steps, numbers.final_lr_fraction
  progress, rising = (t - warmup) / jnp.maximum(1.0, numbers.decay_steps - warmup), jnp.maximum(1.0, warmup)
  if schedule == 'published':
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return numbers.learning_rate * jnp.where(t < warmup, t / rising, jnp.maximum(final, cosine))
  fall = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
  return numbers.learning_rate * jnp.where(t < warmup, (t + 1) / rising, 1.0 if schedule == 'constant' else fall)


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


def _is(number: Any, neutral: float) -> bool:
  """Whether a number leaves its operation out; one that the step takes as an argument never does."""
  return isinstance(number, float) and number == neutral


def _scale_by(factors) -> optax.GradientTransformation:
  def scale(u, f):
    return u if _is(f, 1.0) else u * f
  return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, factors))


def _clip(max_norm: float) -> optax.GradientTransformationExtraArgs:
  """Bounds the global norm, like `optax.clip_by_global_norm`; the update takes it as `grad_norm`.

  Optax divides every gradient by the norm, which XLA does not fuse into Adam: clipped gradients would be written to
  memory and read again. It would also compute the norm a second time, since the step needs it before its update.
  """
  def update(updates, state, params, *, grad_norm, **_):
    factor = jnp.minimum(1, max_norm / grad_norm)
    return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state
  return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _decay(weight_decays) -> optax.GradientTransformation:
  return optax.stateless(lambda updates, params: jax.tree.map(
      lambda u, p, w: u if _is(w, 0.0) else u + w * p, updates, params, weight_decays))


def make_optimizer(
    c, params: Any, units: Callable[[str], int] = lambda path: 0, depth: Callable[[str], Any] | None = None,
    axis_names: Mapping[str, Sequence[str]] | None = None, on_one_cpu: bool = False) -> Optimizer:
  """The optimizer of a config.

  Frozen parameters have no moments. With clipping, the update takes `grad_norm`, the norm of all other gradients.

  Args:
    c: the config.
    params: the parameters or their shapes.
    units: path → number of leading axes that are updated separately, see `used_params.unit_axes`. For the published
      conventions of `optim.unused_params`, whose update takes `used`.
    depth: path → `layers_above`, for `optim.layerwise_lr_decay`.
    axis_names: path → logical names of the axes of a parameter, for `optim.name='muon'`.
    on_one_cpu: see `sharding.on_one_cpu`.
  """
  optim = c.optim
  groups = param_groups(c, params)
  frozen, trained = (jax.tree.map(lambda g, f=f: g.frozen == f, groups) for f in (True, False))

  def unless_frozen(f):  # optax.masked replaces frozen leaves by nodes without leaves
    return jax.tree_util.tree_map_with_path(
        lambda path, p, g: optax.MaskedNode() if g.frozen else f(path_of(path), p, g), params, groups)

  def layer_factor(path, p, _):  # in a shape that multiplies the parameter
    factor = optim.layerwise_lr_decay ** np.asarray(depth(path), np.float32)
    return factor.reshape(factor.shape + (1,) * (p.ndim - factor.ndim))

  def direction() -> optax.GradientTransformation:
    adamw = optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps)
    if optim.name == 'adamw':
      return adamw
    axes = unless_frozen(lambda path, *_: muon.matrix_axes(axis_names[path]) or optax.MaskedNode())
    of_muon = unless_frozen(lambda path, *_: muon.matrix_axes(axis_names[path]) is not None)
    return optax.chain(optax.masked(muon.scale_by_muon(axes, on_one_cpu), of_muon),
                       optax.masked(adamw, jax.tree.map(operator.not_, of_muon)))

  def build(numbers: Numbers) -> optax.GradientTransformation:
    def lr_factor(path, _, g):
      if g.lr_factor == 1.0:
        return 1.0
      return numbers.lr_factors[g.index] * (numbers.router_lr_multiplier if _of_router(path) else 1)

    weight_decay = unless_frozen(lambda path, p, g: g.weight_decay and numbers.weight_decays[g.index])
    steps = [_clip(numbers.grad_clip_norm)] if optim.grad_clip_norm else []
    if optim.unused_params == 'update':
      steps += [direction(), _decay(weight_decay)]
    else:
      shapes = unless_frozen(lambda path, p, g: p.shape[:units(path)])
      steps.append(adam.adamw(optim.b1, optim.b2, optim.eps, weight_decay, shapes, optim.unused_params))
    steps.append(_scale_by(unless_frozen(lr_factor)))
    if optim.layerwise_lr_decay != 1:
      steps.append(_scale_by(unless_frozen(layer_factor)))
    steps.append(optax.scale_by_learning_rate(lambda count: learning_rate(optim.schedule, numbers, count)))
    return optax.chain(optax.masked(optax.chain(*steps), trained, mask_compatible_extra_args=True),
                       optax.masked(optax.set_to_zero(), frozen))

  return Optimizer(Numbers.of(c), groups, optim.schedule, build)
