"""UniPerceiver: embed → encode → features, for any list of sequences, kinds and target sets alike."""

import math
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uni_moe_jax.model.embedders import Embed
from uni_moe_jax.model.encoder import Collected, Encoder
from uni_moe_jax.model.heads import SimilarityHead, scale_of
from uni_moe_jax.model.prompts import LinearHead, prompt_table
from uni_moe_jax.model.sequences import READ_NOTHING, EmbeddedSequence, KVCache, Layout, join_equal
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.moe import routers
from uni_moe_jax.parallel import sharding


@flax.struct.dataclass
class Sequence:
  """One batch of sequences as raw inputs.

  Attributes:
    layout: static structure.
    ids: uint32 [B] example ids.
    pixels: [B, T, H, W, C] uint8 or normalised float, for a visual segment.
    temporal_offset: int32 scalar.
    text: int32 [B, S] for a text segment; a two-stream segment holds [words | queries].
    text_valid: bool [B, S] or None: which tokens are not padding.
    positions: int32 [B, M] positions to read, counted in the text segment; for 'masked' and 'slot'.
    text_positions: int32 [S] or [B, S] rows of the position table, or None for the layout's own.
    past: cached keys and values, or None.
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
  past: KVCache | None = None
  classes: jax.Array | None = None

  def pad_batch(self, multiple: int) -> 'Sequence':
    """With rows of padding, in which no token is valid, up to a multiple, so that every device has equally many.

    A partitioner moves what lies unevenly, drawn numbers and all, at every turn. Texts alone: pictures come in batches that divide,
    but for the last one of an evaluation.
    """
    missing = -self.ids.shape[0] % multiple
    if not missing or self.pixels is not None:
      return self
    fill = lambda x: None if x is None else jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)))
    rows = ['ids', 'text', 'positions', 'classes']
    if self.text_positions is not None and self.text_positions.ndim == 2:  # otherwise those of all rows
      rows.append('text_positions')
    valid = jnp.ones(self.text.shape, bool) if self.text_valid is None else self.text_valid
    return self.replace(text_valid=fill(valid), **{name: fill(getattr(self, name)) for name in rows})


@flax.struct.dataclass
class Encoded:
  """Result of `UniPerceiver.encode`.

  Attributes:
    hidden: the structure of the input with, for each sequence, hidden states [B, R, D] of its readout, or None where it reads nothing.
    collected: see `Encoder`; sequences are in the order of `jax.tree.leaves`.
  """
  hidden: Any
  collected: Collected


class UniPerceiver(nn.Module):
  """The whole model. Methods are called through `apply(…, method=…)`; `init` runs `__call__`.

  Attributes:
    spec: see `ModelSpec`.
    shards: into how many parts batches are laid out ([shards · b] on axis 0).
    mesh: on which it computes; None: on one device.
  """
  spec: ModelSpec
  shards: int = 1
  mesh: Mesh | None = None

  def setup(self):
    self.embed = Embed(self.spec, self.mesh)
    self.encoder = Encoder(self.spec, self.mesh)
    self.similarity = SimilarityHead(self.spec.width, self.mesh)
    if self.spec.head:
      self.linear_head = LinearHead(self.spec.head)
    start = math.log(1 / self.spec.temperature_init)
    self.log_scales = {
        name: self.param(f'log_scale_{name}', nn.with_logical_partitioning(nn.initializers.constant(start), ()), ())
        for name in self.spec.temperature_groups}

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

    Sequences of equal router inputs, prompts, masks and shapes are joined along the batch, unless keys or taps are collected or
    there is a cache.

    Args:
      sequences: any pytree of `Sequence`s.
      key, all_rows, taps, keys: see `Encoder`.
    """
    sequences, structure = jax.tree.flatten(sequences, is_leaf=lambda x: isinstance(x, Sequence))
    streams = tuple(self._stream(s) for s in sequences)
    past = tuple(s.past for s in sequences)
    if keys or taps or any(p is not None for p in past):
      hidden, collected = self.encoder(streams, past, key=key, all_rows=all_rows, taps=taps, keys=keys)
      return Encoded(structure.unflatten(hidden), collected)
    router_rows = [
        (tuple(routers.router_input(self.spec.router, c) for c in s.layout.conditions), s.layout.masks, s.layout.readout,
         s.layout.readout_segment, self.spec.num_deep_prompts and prompt_table(self.spec, s.layout.is_target))
        for s in streams]
    joined, split = join_equal(streams, tuple(router_rows), self.shards)
    hidden, collected = self.encoder(joined, (None,) * len(joined), key=key, all_rows=all_rows)
    return Encoded(structure.unflatten(split(hidden)), collected)

  def features(self, rows: jax.Array) -> jax.Array:
    """[..., D] hidden → [..., D] f32 features, not normalised."""
    return self.similarity(rows)

  def with_head(self, features: jax.Array, logits: jax.Array) -> jax.Array:
    """Logits of similarity [..., K] and of the linear head on features [..., D], not normalised, together."""
    return self.linear_head(features, logits)

  def scale(self, temperature: str) -> jax.Array:
    """exp(log scale) of a temperature group, clamped at 100."""
    return scale_of(self.log_scales[temperature])

  def _stream(self, s: Sequence) -> EmbeddedSequence:
    """Embeds a raw sequence: the prefix and prompts are joined to the first array, positions count from them."""
    layout = s.layout
    arrays, valid = [], []
    for modality, mask in zip(layout.modalities, layout.masks):
      if modality == 'visual':
        arrays.append(self.embed.visual(s.pixels, s.temporal_offset))
        valid.append(None)
      else:
        positions = s.text_positions
        if positions is None:
          n = s.text.shape[1]
          positions = jnp.arange(n) % (n // 2) if mask == 'two_stream' else jnp.arange(n)
        arrays.append(self.embed.text(s.text, positions))
        valid.append(s.text_valid)
    positions = s.positions
    if layout.prefixed:
      batch = arrays[0].shape[0]
      front = self.embed.front(batch, layout.is_target, layout.label_set, s.classes)
      arrays[0] = jnp.concatenate([front, arrays[0]], axis=1)
      if valid[0] is not None:
        there = jnp.broadcast_to(valid[0].any(axis=1, keepdims=True), front.shape[:2])  # not of rows that only fill up
        valid[0] = jnp.concatenate([there, valid[0]], axis=1)
      if positions is not None and layout.readout_segment == 0:
        positions = positions + front.shape[1]
    if layout.readout not in ('masked', 'slot', READ_NOTHING):
      positions = None
    # Entries of a target set come from every device whole; from here on, each encodes its own.
    lies = lambda x: sharding.shard_batch(x, self.mesh)
    return jax.tree.map(lies, EmbeddedSequence(tuple(arrays), tuple(valid), positions, s.ids, layout))
