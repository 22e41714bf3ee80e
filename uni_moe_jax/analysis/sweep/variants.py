"""What a router sweep compares: names of variants, each a router and fields of the config. Imports no JAX."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import ml_collections

from uni_moe_jax.config.schema import VARIANTS as SIZES
from uni_moe_jax.config.schema import apply_choices, layers_with_experts
from uni_moe_jax.tasks.router_names import DENSE, ROUTERS
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

_ROUNDED_TO = 8  # units of the MLP of `dense_wide`


def _wide(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Widens the MLP until a dense model has the parameters of the experts.

  A layer with experts has E - 1 more copies of its projections, of 4 D² + 4 D parameters in attention and 2 D F + F + D
  in the MLP. One more hidden unit in each of L layers has L (2 D + 1) parameters.
  """
  c = apply_choices(config)
  D, F, L = c.model.width, c.model.mlp_dim, c.model.num_layers
  projections = {'attention': 4 * D * D + 4 * D, 'mlp': 2 * D * F + F + D}
  copies = (c.moe.num_experts - 1) * len(set(layers_with_experts(c.moe.placement, L)))
  more = copies * sum(projections[s] for s in c.moe.sublayers) / (L * (2 * D + 1))
  sizes = {name: c.model[name] for name in SIZES[c.model.variant]} if c.model.variant else {}
  sizes['mlp_dim'] = round((F + more) / _ROUNDED_TO) * _ROUNDED_TO
  return (*(['model.variant='] if c.model.variant else []), *(f'model.{name}={x}' for name, x in sizes.items()))


class Variant(NamedTuple):
  """A router, and the fields that it sets in a config with this router."""
  router: str
  fields: Callable[[ml_collections.ConfigDict], tuple[str, ...]] = lambda _: ()


VARIANTS = {
    DENSE: Variant(DENSE),
    'dense_wide': Variant(DENSE, _wide),
    'attribute': Variant('attribute'),
    'attribute_every_2': Variant('attribute', lambda _: ('moe.placement=every_2',)),
    'attribute_top_1': Variant('attribute', lambda _: ('moe.top_k=1',)),
    'attribute_top_4': Variant('attribute', lambda _: ('moe.top_k=4',)),
    'token_in_4': Variant('token', lambda _: ('moe.experts_per_condition=4',)),
} | {router: Variant(router) for router in ROUTERS}  # the order of tables


class PerVariant:
  """A number for each variant, written as a default and exceptions: '3,dense=5'."""

  def __init__(self, flag: str, text: str, names: Sequence[str], default: int | None):
    """flag: that has the text, for messages. names: of all variants. default: if the text has none.

    Raises:
      UsageError: a part is no number of at least 1, is given twice or has an unknown name.
    """
    self._default, self._exceptions, seen = default, {}, set()
    for part in text.split(',') if text else ():
      name, equals, number = part.rpartition('=')
      if not (number.isdecimal() and int(number) >= 1):
        raise UsageError(f'--{flag}={text}: {part!r} must be a number of at least 1, or NAME=NUMBER.')
      if equals and name not in names:
        raise UsageError(f'--{flag}={text}: {name!r} is unknown; {nearest(name, names)}.')
      if name in seen:
        raise UsageError(f'--{flag}={text} has two numbers for {name or "the default"}; remove one.')
      seen.add(name)
      if equals:
        self._exceptions[name] = int(number)
      else:
        self._default = int(number)

  def __getitem__(self, name: str) -> int | None:
    return self._exceptions.get(name, self._default)
