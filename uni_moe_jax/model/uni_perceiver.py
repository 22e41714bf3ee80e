"""UniPerceiver: embed → encode → features, for any sequences, task types and target sets; and fresh parameters."""

import dataclasses
import math
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
from uni_moe_jax.model.sequences import EmbeddedSequence, InputSequence, Layout, join_equal, map_joined, pad_to_join
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.moe import routers
from uni_moe_jax.moe.layers import param
from uni_moe_jax.parallel import sharding
from uni_moe_jax.tasks import task_types


@flax.struct.dataclass
class Encoded:
  """Result of `UniPerceiver.encode`."""
  hidden: Any  # the structure of the input with hidden states [B, R, D] of each readout, None where it reads nothing
  collected: Collected  # see `Encoder`; sequences are in the order of `jax.tree.leaves`


class UniPerceiver(nn.Module):
  """The whole model. Methods are called through `apply(…, method=…)`; `init` runs `__call__`."""
  spec: ModelSpec
  shards: int = 1  # of the batch axis ([shards · b] on axis 0)
  mesh: Mesh | None = None

  def setup(self):
    spec = self.spec
    self.embed = Embed(spec, self.mesh)
    self.encoder = Encoder(spec, self.mesh)
    self.similarity = SimilarityHead(spec.width, self.mesh)
    if spec.head:
      self.linear_head = LinearHead(spec.head)
    log_scale = nn.initializers.constant(math.log(1 / spec.temperature_init))
    self.log_scales = {name: param(self, heads.LOG_SCALE + name, log_scale, {}) for name in spec.temperature_groups}

  def __call__(self, sequence: InputSequence):
    """Uses every parameter; for `init`."""
    features = self.features(self.encode(sequence).hidden)
    if self.spec.head:
      features = self.with_head(features, jnp.zeros((1,) * (features.ndim - 1) + (self.spec.head,)))
    return features, {n: self.scale(n) for n in self.spec.temperature_groups}

  def encode(
      self, sequences: Any, *, key: jax.Array | None = None, all_rows: bool = False, taps: bool = False,
      keys: bool = False) -> Encoded:
    """Encodes sequences of any task types in one pass over the layers.

    Sequences (any pytree of them) of equal router inputs, prompts, masks and shapes are joined along the batch, unless
    keys or taps are collected or there is a cache; texts of nearly equal shapes, too. For the options see `Encoder`.
    """
    sequences, structure = jax.tree.flatten(sequences, is_leaf=lambda x: isinstance(x, InputSequence))
    embedded, caches = self._embed(sequences), tuple(s.kv_cache for s in sequences)
    if keys or taps or any(c is not None for c in caches):
      hidden, collected = self.encoder(embedded, caches, key=key, all_rows=all_rows, taps=taps, keys=keys)
      return Encoded(structure.unflatten(hidden), collected)
    join_keys = tuple(self._join_key(s.layout) for s in sequences)
    joined, split = join_equal(pad_to_join(embedded, join_keys), join_keys, self.shards)
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

  def _embed(self, sequences: list[InputSequence]) -> tuple[EmbeddedSequence, ...]:
    """Embeds raw sequences, the texts of all of them together: each one's gradient has the size of the word table."""
    prefix = self.embed.prefix() if any(s.layout.prefixed for s in sequences) else None
    texts = [(s.text, s.token_positions(), s.neighbors(self.spec.word_neighbors))
             for s in sequences if s.text is not None]
    embed = lambda text: sharding.shard_batch(self.embed.text(*text), self.mesh)
    embedded = iter(map_joined(embed, texts, self.shards))
    return tuple(self._segments(s, None if s.text is None else next(embedded), prefix) for s in sequences)

  def _segments(self, s: InputSequence, text: jax.Array | None, prefix: jax.Array | None) -> EmbeddedSequence:
    """A sequence with its embedded text [B, S, D]; prefix and prompts become the first tokens of segment 0."""
    layout = s.layout
    segments, valid = [], []
    for modality in layout.modalities:
      segments.append(text if modality == 'text' else self.embed.visual(s.pixels, s.temporal_offset))
      valid.append(s.text_valid if modality == 'text' else None)
    positions = s.positions if layout.readout in ('masked', 'slot') else None
    if layout.prefixed:
      front = self.embed.front(prefix, s)
      segments[0] = jnp.concatenate([front, segments[0]], axis=1)
      if valid[0] is not None:
        # Examples that only pad the batch have no valid prefix either.
        front_valid = jnp.broadcast_to(valid[0].any(axis=1, keepdims=True), front.shape[:2])
        valid[0] = jnp.concatenate([front_valid, valid[0]], axis=1)
      if positions is not None and layout.readout_segment == 0:
        positions = positions + front.shape[1]
    # Entries of a target set arrive on every device; from here on, each device encodes its own.
    embedded = EmbeddedSequence(tuple(segments), tuple(valid), positions, s.ids, layout, is_read=s.is_read)
    return jax.tree.map(lambda x: sharding.shard_batch(x, self.mesh), embedded)


def boxed_params(model: UniPerceiver, key: jax.Array) -> Any:
  """Fresh parameters in boxes that name their logical axes. Encoding one text creates all of them."""
  condition, spec = next(iter(task_types.families().values())), model.spec
  if spec.kernels:  # a merged model may lack this condition; all of its kernels have one shape
    model = model.clone(spec=dataclasses.replace(spec, kernels=((routers.router_input(spec.router, condition), 0),)))
  ids, tokens = jnp.zeros((1,), jnp.uint32), jnp.zeros((1, 2), jnp.int32)
  text = InputSequence(layout=Layout.of_text(condition), ids=ids, text=tokens)
  return model.init(key, text)['params']


def init_params(model: UniPerceiver, key: jax.Array) -> Any:
  """Fresh parameters."""
  return nn.unbox(boxed_params(model, key))


def param_shapes(model: UniPerceiver) -> Any:
  """The parameter tree as `jax.ShapeDtypeStruct`s; computes nothing."""
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
