"""The model as one frozen value: sizes, placement of experts, and the index of layers.

Modules read this value and not the run's config, so that a model can be built from a config, from a checkpoint's
metadata or from a fixture's manifest.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from uni_moe_jax.config.fields import check_choice, fail_if
from uni_moe_jax.config.schema import VARIANTS, Config, ModelConfig, MoeConfig, check_placement, layers_with_experts
from uni_moe_jax.kernels import projection
from uni_moe_jax.moe import routers
from uni_moe_jax.tasks.attributes import Condition, to_string
from uni_moe_jax.utils.errors import UsageError

# Projection → the sublayer whose router routes it.
PROJECTIONS = {'qkv': 'attention', 'attention_out': 'attention', 'ffn_in': 'mlp', 'ffn_out': 'mlp'}
# The parameter names of the routers, by sublayer: part of the checkpoint format.
ROUTER_PARAMS = {'attention': 'attention_router', 'mlp': 'ffn_router'}
MAX_PERIOD = 4


def router_input_name(router_input: routers.RouterInput) -> str:
  """A readable router input: '10011000', or its name."""
  return to_string(router_input) if isinstance(router_input, tuple) else str(router_input)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec(ModelConfig, MoeConfig):
  """The fields of config.model and config.moe, and what follows from tokenizer and plan."""
  vocab_size: int  # V, rows of the word table
  spe_id: int  # word id of the readout, mask, query and slot token
  prefix_word: int | None = None  # word id of the readout token, embedded as a text of length 1; None: LN(Word[spe])
  router_names: tuple[str, ...] = ()  # embedding table of the router, in order
  temperature_groups: tuple[str, ...] = ()  # groups with a learned scale each
  label_prompts: tuple[tuple[str, int], ...] = ()  # target sets with a learned token per entry, and their sizes
  head: int = 0  # classes of the linear head; 0: none
  cpu_bfloat16: bool = False  # of `config.train`, in training alone
  # Of a merged model (see `merging`): index of the kernel of each router input. There is no router then, and
  # projections have `num_experts` kernels.
  kernels: tuple[tuple[Any, int], ...] = ()

  def __post_init__(self):
    """Sets the sizes of `variant`. Raises UsageError for a value that nothing would read, as of configs."""
    for section, cls in (('model', ModelConfig), ('moe', MoeConfig)):
      for field in dataclasses.fields(cls):
        value = getattr(self, field.name)
        for x in value if isinstance(value, tuple) else (value,):
          # Exports have backends of `gmm` that configs lack; `dispatch` checks them all.
          if isinstance(x, str) and field.metadata['choices'] and field.name != 'gmm':
            check_choice(f'{section}.{field.name}', x, field.metadata['choices'])
    for name, size in VARIANTS.get(self.variant, {}).items():
      fail_if((given := getattr(self, name)) not in (size, getattr(ModelConfig, name)),
              f'model.variant={self.variant!r} sets config.model.{name}={given} to another value; leave it out, or set '
              "config.model.variant=''.")
      object.__setattr__(self, name, size)
    check_placement(self.placement, self.num_layers)
    object.__setattr__(self, 'dtype', jnp.dtype(self.dtype))

  @classmethod
  def from_config(
      cls, config: Config, *, router_tasks: tuple[str, ...], temperatures: tuple[str, ...], **derived: Any,
  ) -> 'ModelSpec':
    """The model of a checked config, with other fields as `derived`.

    router_tasks: names that a task router has embeddings for, in the order of its table.
    """
    return cls(
        **vars(config.model), **vars(config.moe), temperature_groups=temperatures,
        router_names=routers.table_names(config.moe.router, router_tasks), **derived)

  @property
  def head_dim(self) -> int:
    return self.width // self.num_heads

  @property
  def patches(self) -> int:
    """Visual tokens of one frame."""
    return (self.image_size // self.patch_size) ** 2

  @property
  def pattern(self) -> tuple[tuple[str, ...], ...]:
    """Per layer, the sublayers that have experts."""
    chosen = set() if self.router == routers.DENSE else set(layers_with_experts(self.placement, self.num_layers))
    return tuple(self.sublayers if i in chosen else () for i in range(self.num_layers))

  def product_method(self, mesh: Mesh | None) -> str:
    """How layers multiply on a mesh, see `projection.choose`."""
    return projection.choose(mesh, self.cpu_bfloat16)

  def kernel_of(self, condition: Condition) -> int:
    """Index of the kernel of a condition in a merged model.

    Raises:
      UsageError: the model was merged without this condition.
    """
    router_input, kernels = routers.router_input(self.router, condition), dict(self.kernels)
    if router_input not in kernels:
      names = ', '.join(map(router_input_name, kernels))
      raise UsageError(f'the merged model has no kernel for {condition}; it has {names}. Merge the trained model '
                       'again, for the tasks that need it.')
    return kernels[router_input]

  def router_input_names(self, conditions: tuple[Condition, ...]) -> tuple[str, ...]:
    """Readable names of the distinct router inputs of some conditions."""
    if self.router == routers.DENSE:
      return ('all tokens',)
    return tuple(router_input_name(r) for r in routers.distinct_inputs(self.router, conditions))

  @property
  def stack(self) -> 'Stack':
    return Stack.of(self.pattern)


@dataclasses.dataclass(frozen=True)
class Stack:
  """How layers are laid out in the parameter tree: `blocks` (scanned periods) and `tail` (unrolled).

  The tail is the last whole period and what remains after it: the last block computes only the rows that the readout
  needs, and taking it out of a stacked array would copy the stack.
  """
  period: tuple[tuple[str, ...], ...]  # sublayers with experts, per block of a period
  periods: int  # number of scanned periods
  tail: tuple[tuple[str, ...], ...]  # sublayers with experts, per tail block

  @classmethod
  def of(cls, pattern: tuple[tuple[str, ...], ...]) -> 'Stack':
    """The smallest period that explains the pattern; an irregular pattern is unrolled as a whole."""
    n = len(pattern)
    for p in range(1, min(MAX_PERIOD, n) + 1):
      if all(pattern[i] == pattern[i % p] for i in range(n)):
        periods = n // p - 1
        return cls(pattern[:p], periods, pattern[periods * p:])
    return cls((), 0, pattern)

  @property
  def num_layers(self) -> int:
    return len(self.period) * self.periods + len(self.tail)

  def locate(self, layer: int) -> tuple[str, int | None, str]:
    """(subtree, index on its stacked axis or None, block name) of a layer."""
    if not 0 <= layer < self.num_layers:
      raise IndexError(f'layer {layer} is outside 0…{self.num_layers - 1}.')
    scanned = len(self.period) * self.periods
    if layer < scanned:
      return 'blocks', layer // len(self.period), f'block{layer % len(self.period)}'
    return 'tail', None, f'block{layer - scanned}'
