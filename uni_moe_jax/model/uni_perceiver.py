"""UniPerceiver: embed → encode → features, for any sequences, task types and target sets."""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uni_moe_jax.model import heads
from uni_moe_jax.model.embedders import Embed
from uni_moe_jax.model.encoder import Collected, Encoder
from uni_moe_jax.model.heads import LinearHead, SimilarityHead
from uni_moe_jax.model.prompts import prompt_table
from uni_moe_jax.model.sequences import EmbeddedSequence, KVCache, Layout, join_equal
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.moe import routers
from uni_moe_jax.parallel import sharding


@flax.struct.dataclass
class Sequence:
  """One batch of sequences as raw inputs.

  Attributes:
    layout: static structure.
    ids: uint32 [B] example ids.
    pixels: [B, T, H, W, C] uint8 or normalized float, for a visual segment.
    temporal_offset: int32 scalar.
    text: int32 [B, S] for a text segment; a two-stream segment holds [words | queries].
    text_valid: bool [B, S] or None: which tokens are not padding.
    positions: int32 [B, M] of the tokens to read, counted in the text segment; for 'masked' and 'slot'.
    text_positions: int32 [S] or [B, S] rows of the position table, or None for the layout's own.
    kv_cache: cached keys and values, or None.
    classes: int32 [B], which entry of `layout.label_set` each sequence is.
  """
  layout: Layout = flax.struct.field(pytree_node=False)
  ids: jax.Array
  pixels: jax.Array | None = None
  temporal_offset: jax.Array | int = 0
  text: jax.Array | None = None
  text_valid: jax.Array | None = None
  positions: jax.Array | None = None
  text_positions: jax.Array | None = None
  kv_cache: KVCache | None = None
  classes: jax.Array | None = None

  def pad_batch(self, multiple: int) -> 'Sequence':
    """Pads texts with examples without valid tokens, so that every device has equally many.

    A partitioner would move unevenly sharded rows, drawn numbers and all, at every step. Images come in batches that
    divide, except the last one of an evaluation, and stay as they are.
    """
    missing = -self.ids.shape[0] % multiple
    if not missing or self.pixels is not None:
      return self
    pad = lambda x: None if x is None else jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)))
    fields = ['ids', 'text', 'positions', 'classes']
    if self.text_positions is not None and self.text_positions.ndim == 2:  # otherwise those of all examples
      fields.append('text_positions')
    valid = jnp.ones(self.text.shape, bool) if self.text_valid is None else self.text_valid
    return self.replace(text_valid=pad(valid), **{name: pad(getattr(self, name)) for name in fields})


@flax.struct.dataclass
class Encoded:
  """Result of `UniPerceiver.encode`.

  Attributes:
    hidden: the structure of the input with, for each sequence, hidden states [B, R, D] of its readout, or None if it
      reads nothing.
    collected: see `Encoder`; sequences are in the order of `jax.tree.leaves`.
  """
  hidden: Any
  collected: Collected


class UniPerceiver(nn.Module):
  """The whole model. Methods are called through `apply(…, method=…)`; `init` runs `__call__`.

  Attributes:
    shards: number of shards of the batch axis ([shards · b] on axis 0).
    mesh: None on one device.
  """
  spec: ModelSpec
  shards: int = 1
  mesh: Mesh | None = None

  def setup(self):
    spec = self.spec
    self.embed = Embed(spec, self.mesh)
    self.encoder = Encoder(spec, self.mesh)
    self.similarity = SimilarityHead(spec.width, self.mesh)
    if spec.head:
      self.linear_head = LinearHead(spec.head)
    init = heads.log_scale_init(spec.temperature_init)
    self.log_scales = {name: self.param(heads.LOG_SCALE + name, init, ()) for name in spec.temperature_groups}

  def __call__(self, sequence: Sequence):
    """Uses every parameter; for `init`."""
    features = self.features(self.encode(sequence).hidden)
    if self.spec.head:
      features = self.with_head(features, jnp.zeros((1,) * (features.ndim - 1) + (self.spec.head,)))
    return features, {n: self.scale(n) for n in self.spec.temperature_groups}

  def encode(
      self, sequences: Any, *, key: jax.Array | None = None, all_rows: bool = False, taps: bool = False,
      keys: bool = False) -> Encoded:
    """Encodes sequences of any task types in one pass over the layers.

    Sequences of equal router inputs, prompts, masks and shapes are joined along the batch, unless keys or taps are
    collected or there is a cache.

    Args:
      sequences: any pytree of `Sequence`s.
      key, all_rows, taps, keys: see `Encoder`.
    """
    sequences, structure = jax.tree.flatten(sequences, is_leaf=lambda x: isinstance(x, Sequence))
    embedded, caches = tuple(self._embed(s) for s in sequences), tuple(s.kv_cache for s in sequences)
    if keys or taps or any(c is not None for c in caches):
      hidden, collected = self.encoder(embedded, caches, key=key, all_rows=all_rows, taps=taps, keys=keys)
      return Encoded(structure.unflatten(hidden), collected)
    joined, split = join_equal(embedded, tuple(self._join_key(s.layout) for s in sequences), self.shards)
    hidden, collected = self.encoder(joined, (None,) * len(joined), key=key, all_rows=all_rows)
    return Encoded(structure.unflatten(split(hidden)), collected)

  def features(self, hidden: jax.Array) -> jax.Array:
    """[..., D] hidden states → [..., D] f32 features, not normalized."""
    return self.similarity(hidden)

  def with_head(self, features: jax.Array, logits: jax.Array) -> jax.Array:
    """Sums logits of similarity [..., K] and of the linear head on features [..., D], not normalized."""
    return self.linear_head(features, logits)

  def scale(self, temperature: str) -> jax.Array:
    """exp(log scale) of a temperature group, clamped at 100."""
    return heads.scale_of(self.log_scales[temperature])

  def _join_key(self, layout: Layout) -> tuple[Any, ...]:
    """Sequences with equal keys may share their products."""
    return (tuple(routers.router_input(self.spec.router, c) for c in layout.conditions), layout.masks, layout.readout,
            layout.readout_segment, self.spec.num_deep_prompts and prompt_table(self.spec, layout.is_target))

  def _embed(self, s: Sequence) -> EmbeddedSequence:
    """Embeds a raw sequence; prefix and prompts become the first tokens of segment 0."""
    layout = s.layout
    segments, valid = [], []
    for modality, mask in zip(layout.modalities, layout.masks):
      if modality == 'visual':
        segments.append(self.embed.visual(s.pixels, s.temporal_offset))
        valid.append(None)
      else:
        positions = s.text_positions
        if positions is None:
          n = s.text.shape[1]
          positions = jnp.arange(n) % (n // 2) if mask == 'two_stream' else jnp.arange(n)
        segments.append(self.embed.text(s.text, positions))
        valid.append(s.text_valid)
    positions = s.positions if layout.readout in ('masked', 'slot') else None
    if layout.prefixed:
      front = self.embed.front(segments[0].shape[0], layout.is_target, layout.label_set, s.classes)
      segments[0] = jnp.concatenate([front, segments[0]], axis=1)
      if valid[0] is not None:
        # Examples that only pad the batch have no valid prefix either.
        front_valid = jnp.broadcast_to(valid[0].any(axis=1, keepdims=True), front.shape[:2])
        valid[0] = jnp.concatenate([front_valid, valid[0]], axis=1)
      if positions is not None and layout.readout_segment == 0:
        positions = positions + front.shape[1]
    # Entries of a target set arrive on every device; from here on, each device encodes its own.
    embedded = EmbeddedSequence(tuple(segments), tuple(valid), positions, s.ids, layout)
    return jax.tree.map(lambda x: sharding.shard_batch(x, self.mesh), embedded)
