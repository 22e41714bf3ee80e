"""What the model is, as one frozen value: sizes, placement of experts, and the index of layers.

Modules read this and nothing of the run's config, so that a model can be built from a checkpoint's metadata, a
fixture's manifest or a config alike.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from uni_moe_jax.moe import routers
from uni_moe_jax.tasks.attributes import Condition, to_string
from uni_moe_jax.tasks.task_types import MODALITIES
from uni_moe_jax.utils.errors import UsageError

SUBLAYERS = ('attention', 'mlp')
# Projection → the part whose router decides for it.
PROJECTIONS = {'qkv': 'attention', 'attention_out': 'attention', 'ffn_in': 'mlp', 'ffn_out': 'mlp'}
# The parameter names of the routers, by sublayer: part of the checkpoint format.
ROUTER_PARAMS = {'attention': 'attention_router', 'mlp': 'ffn_router'}
PLACEMENTS = ('all', 'every_2', 'every_4', 'none')
MAX_PERIOD = 4


def router_input_name(row: routers.RouterInput) -> str:
  """A router input for people: '10011000', or its name."""
  return to_string(row) if isinstance(row, tuple) else str(row)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """Sizes and choices of one model; every field is documented in `config.py`."""
  num_layers: int                        # L
  width: int                         # D
  num_heads: int                         # N
  mlp_dim: int                        # F
  vocab_size: int                    # V of the word table
  spe_id: int                        # word id of the prefix, mask, query and slot token
  image_size: int                    # pixels a side
  patch_size: int                         # pixels a side
  channels: int = 3
  max_num_frames: int = 8                # rows of the temporal table
  max_text_len: int = 512                # rows of the position table
  pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)
  prefix_word: int | None = None     # None: LN(Word[spe]); an id: that word as a text of length 1
  video_mean: tuple[float, ...] = ()  # of clips, that is of more than one frame; () = as pictures
  video_std: tuple[float, ...] = ()
  posemb: str = 'sincos2d'            # 'sincos2d' (computed), 'frozen' (a parameter that starts so) or 'learned'
  modality_embedding: bool = False          # a learnt row added to every visual token
  text_posemb_init: str = 'normal'      # 'normal' or 'sincos': the text positions' initial table
  text_posemb_std: float = 0.02         # its standard deviation
  mimetic_init: bool = False  # or 'equal': keys start as a copy of the queries
  frame_differences: bool = False    # patches of clips bring their change since the frame before
  temporal_posemb_std: float = 0.02         # initial standard deviation of the temporal rows
  layer_scale_init: float = 1e-3          # initial value of both LayerScale vectors
  drop_path: float = 0.0             # stochastic depth, same rate in every layer
  dtype: Any = jnp.float32           # of products; parameters and decisions stay float32
  remat: bool = True                 # recompute blocks in the backward pass
  router: str = 'attribute'          # key of moe.routers.ROUTERS, or 'dense'
  num_experts: int = 8               # E
  top_k: int = 2                     # K
  noise_std: float = 1.0             # of the gate's training noise, times E
  capacity_factor: float = 0.0              # factor f of dispatch in training; 0 = exact
  gmm: str = 'auto'              # backend of gmm products, see moe/gmm.py
  placement: str | tuple[int, ...] = 'all'
  sublayers: tuple[str, ...] = SUBLAYERS     # which projections have experts
  router_names: tuple[str, ...] = () # embedding table of the router, in order
  temperature_groups: tuple[str, ...] = () # groups, one learnt scale each
  temperature_init: float = 0.07          # initial τ
  num_deep_prompts: int = 0                   # P, deep num_deep_prompts per layer
  prompt_sharing: str = 'shared'       # by inputs and targets, 'separate', or of 'inputs' alone
  num_prefix_prompts: int = 0            # learnt tokens after the prefix, of the same sides
  label_prompts: tuple[tuple[str, int], ...] = ()  # target sets with a learnt token per entry, and their sizes
  spe_bias: bool = False             # a learnt row added to every `spe`
  head: int = 0                      # K, classes of a linear head; 0: none
  # Of a merged model (export/merge.py): which kernel each router input has. Then there is no router, and projections hold
  # `num_experts` kernels, of which every array takes one.
  kernels: tuple[tuple[Any, int], ...] = ()

  @classmethod
  def from_config(
      cls, config, *, vocab_size: int, spe_id: int, prefix_word: int | None, temperatures: tuple[str, ...],
      router_tasks: tuple[str, ...], head: int = 0, label_prompts: tuple[tuple[str, int], ...] = ()) -> 'ModelSpec':
    """The model of a checked run config; the keyword arguments come from its tokenizer and plan.

    Args:
      router_tasks: names that a task router must know, in the order of its table.
      head: classes of the task with a linear head, or 0.
      label_prompts: (name, size) of every target set with label prompts.
    """
    m, moe = config.model, config.moe
    placement = moe.placement if isinstance(moe.placement, str) else tuple(moe.placement)
    return cls(
        num_layers=m.num_layers, width=m.width, num_heads=m.num_heads, mlp_dim=m.mlp_dim, vocab_size=vocab_size, spe_id=spe_id,
        image_size=m.image_size, patch_size=m.patch_size, channels=m.channels, max_num_frames=m.max_num_frames, max_text_len=m.max_text_len,
        pixel_mean=tuple(m.pixel_mean), pixel_std=tuple(m.pixel_std), video_mean=tuple(m.video_mean),
        video_std=tuple(m.video_std), prefix_word=prefix_word, posemb=m.posemb, modality_embedding=m.modality_embedding,
        text_posemb_init=m.text_posemb_init, text_posemb_std=m.text_posemb_std, mimetic_init=m.mimetic_init,
        frame_differences=m.frame_differences, temporal_posemb_std=m.temporal_posemb_std, layer_scale_init=m.layer_scale_init,
        drop_path=m.drop_path, dtype=jnp.dtype(m.dtype), remat=m.remat, router=moe.router,
        num_experts=moe.num_experts, top_k=moe.top_k, noise_std=moe.noise_std, capacity_factor=moe.capacity_factor, gmm=moe.gmm,
        placement=placement, sublayers=tuple(moe.sublayers),
        router_names=routers.table_names(moe.router, router_tasks, MODALITIES), temperature_groups=temperatures,
        temperature_init=m.temperature_init, num_deep_prompts=m.num_deep_prompts, prompt_sharing=m.prompt_sharing, num_prefix_prompts=m.num_prefix_prompts,
        label_prompts=label_prompts, spe_bias=m.spe_bias, head=head)

  @property
  def head_dim(self) -> int:
    return self.width // self.num_heads

  @property
  def patches(self) -> int:
    """Visual tokens of one frame."""
    return (self.image_size // self.patch_size) ** 2

  @property
  def pattern(self) -> tuple[tuple[str, ...], ...]:
    """Per layer, the parts that have experts. 'every_2' is the published name for indices 0, 2, 4, …"""
    step = {'all': 1, 'every_2': 2, 'every_4': 4, 'none': self.num_layers + 1}
    if self.router == 'dense' or self.placement == 'none':
      chosen = ()
    elif isinstance(self.placement, str):
      chosen = range(0, self.num_layers, step[self.placement])
    else:
      chosen = self.placement
    return tuple(self.sublayers if i in set(chosen) else () for i in range(self.num_layers))

  def kernel_of(self, condition: Condition) -> int:
    """Which kernel of a merged model an array of a condition takes.

    Raises:
      UsageError: the model was merged without this condition.
    """
    row, known = routers.router_input(self.router, condition), dict(self.kernels)
    if row not in known:
      raise UsageError(f'the merged model has no kernel for {condition}; it has {", ".join(map(router_input_name, known))}. Merge the '
                       'trained model again, for the tasks that need it.')
    return known[row]

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

  Attributes:
    period: parts with experts, per block of a period.
    periods: how many periods are scanned.
    tail: parts with experts, per tail block.
  """
  period: tuple[tuple[str, ...], ...]
  periods: int
  tail: tuple[tuple[str, ...], ...]

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
    """(subtree, index on its stacked axis or None, block name) of a layer: the one way to address layers."""
    if not 0 <= layer < self.num_layers:
      raise IndexError(f'layer {layer} is outside 0…{self.num_layers - 1}.')
    scanned = len(self.period) * self.periods
    if layer < scanned:
      return 'blocks', layer // len(self.period), f'block{layer % len(self.period)}'
    return 'tail', None, f'block{layer - scanned}'
