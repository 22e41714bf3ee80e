"""Sequences: from the fields of a batch to raw inputs, and inside the encoder, with caches and joins of equal ones.

A step encodes many sequences at once (several task types, several target sets). Each keeps its own arrays: one per
segment, with static conditions and masks, and padding, readout positions and example ids. Training, evaluation and
export build them by the same constructors, so that all encode the same.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

from uni_moe_jax.kernels.attention.parts import KeysValues
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.tasks.task_types import TaskType

Fields = dict[str, jax.Array]  # of a batch, [shards, b, …], or of an evaluation batch, [B, …]
NO_WORD = -1  # in place of a neighbor
READ_NOTHING = 'nothing'  # prefill: only keys and values of the last layer are wanted
_MAX_PADDING = 128  # most tokens of padding, over all its examples, to join a longer sequence: what a bucket must save


@dataclasses.dataclass(frozen=True)
class Layout:
  """Static structure of a sequence."""
  conditions: tuple[Condition, ...]  # one per segment; the prefix is token 0 of segment 0 if `prefixed`
  masks: tuple[str, ...]  # mask type per segment, see `masks.py`
  readout: str  # 'cls' | 'masked' | 'queries' | 'slot' | 'nothing'
  prefixed: bool = True  # False in a decoding step, whose prefix is among the cached keys
  prompted: Condition | None = None  # the condition of deep prompts; None: that of the first segment
  label_set: str | None = None  # the target set of which the sequences are entries, if it has label prompts

  @classmethod
  def of_task_type(cls, task_type: TaskType) -> 'Layout':
    """Input side of a task type."""
    return cls(task_type.conditions, tuple(s.mask for s in task_type.inputs), task_type.readout)

  @classmethod
  def of_text(cls, condition: Condition, label_set: str | None = None) -> 'Layout':
    """One text read at its prefix: the target side, target sets."""
    return cls((condition,), ('full',), 'cls', label_set=label_set)

  @property
  def prompt_condition(self) -> Condition:
    return self.prompted or self.conditions[0]

  @property
  def is_target(self) -> bool:
    return self.conditions[0].is_target

  @property
  def modalities(self) -> tuple[str, ...]:
    """'visual' or 'text' per segment."""
    return tuple(c.modality for c in self.conditions)

  @property
  def readout_segment(self) -> int | None:
    """Index of the segment whose rows are read."""
    if self.readout == READ_NOTHING:
      return None
    if self.readout == 'cls':
      return 0
    if self.readout == 'queries':
      return next(i for i, m in enumerate(self.masks) if m != 'full')
    return self.modalities.index('text')


@flax.struct.dataclass
class KVCache:
  """Keys and values of earlier tokens, visible to every token of a sequence.

  Keys and values are ((k, v), …), one pair per layer, in the tree that the encoder collects; with a leading axis of
  periods where it has one.
  """
  fixed: Any  # [b, N, P, H], of tokens that no word changes; each row serves B / b consecutive examples of the sequence
  words: Any  # [B, N, W, H], of decoded words
  valid: jax.Array | None  # bool [B, W], which words are decoded
  pools: Any  # of context routers: {sublayer: [B, D]}; {} without them
  recent: jax.Array | None = None  # int32 [B, n], the last decoded words, newest first, see `InputSequence.neighbors`

  def of_layer(self, subtree: str, block: int) -> 'KVCache':
    """The cache of one block of the pattern, without `valid`, which is that of all."""
    return KVCache(self.fixed[subtree][block], self.words[subtree][block], None, self.pools[subtree][block])

  def parts(self, valid: jax.Array) -> list[KeysValues]:
    """Keys and values of one layer."""
    return [(*self.fixed, None), (*self.words, valid[:, None, None])]


@flax.struct.dataclass
class InputSequence:
  """One batch of sequences as raw inputs."""
  layout: Layout = flax.struct.field(pytree_node=False)
  ids: jax.Array  # uint32 [B] example ids
  pixels: jax.Array | None = None  # [B, T, H, W, C] uint8 or normalized float, for a visual segment
  temporal_offset: jax.Array | int = 0  # int32 scalar
  text: jax.Array | None = None  # int32 [B, S] for a text segment; a two-stream one contains [words | queries]
  text_valid: jax.Array | None = None  # bool [B, S], which tokens are not padding; None: all
  positions: jax.Array | None = None  # int32 [B, M] of the tokens to read ('masked', 'slot'), in the text segment
  is_read: jax.Array | None = None  # bool [B, M], which positions count ('masked' in training); None: all
  # int32 [S], rows of the position table in a decoding step; None: the layout's own.
  text_positions: jax.Array | None = None
  text_before: jax.Array | None = None  # int32 [B, S, n] in a decoding step, see `neighbors`
  kv_cache: KVCache | None = None
  classes: jax.Array | None = None  # int32 [B], which entry of `layout.label_set` each sequence is

  @classmethod
  def of_inputs(cls, task_type: TaskType, fields: Fields) -> 'InputSequence':
    """The input side of a batch; fields are flat ([B, …])."""
    return cls(
        layout=Layout.of_task_type(task_type), ids=fields['id'], pixels=fields.get('pixels'),
        temporal_offset=fields.get('temporal_offset', 0), text=fields.get('text'),
        text_valid=fields.get('text_valid'), positions=fields.get('position'),
        is_read=fields['weight'] > 0 if task_type.readout == 'masked' and 'weight' in fields else None)

  @classmethod
  def of_pairs(cls, task_type: TaskType, fields: Fields) -> 'InputSequence':
    """The paired texts of a batch, on the target side; fields are flat.

    Their ids are not those of their inputs: draws that both have in common would tell a pair from its negatives.
    """
    return cls(layout=Layout.of_text(task_type.pair_condition), ids=_target_ids('pair', fields['id']),
               text=fields['target'], text_valid=fields['target_valid'])

  @classmethod
  def of_words(cls, name: str, condition: Condition, ids: jax.Array, eot: int) -> 'InputSequence':
    """Rows [spe, v, eot] of a vocabulary set for the word ids [K]."""
    text = jnp.stack([ids, jnp.full_like(ids, eot)], axis=1)
    return cls(layout=Layout.of_text(condition), ids=_target_ids(name, ids), text=text)

  @classmethod
  def of_buckets(
      cls, name: str, condition: Condition, buckets: tuple[Fields, ...], order: jax.Array, label_prompts: bool
  ) -> tuple['InputSequence', ...]:
    """One sequence per length bucket of a target set of texts.

    Args:
      order: int32 [V], the row of each entry in the concatenated buckets.
      label_prompts: whether each entry has a learned token.
    """
    out, start = [], 0
    layout = Layout.of_text(condition, name if label_prompts else None)
    entry = jnp.argsort(order).astype(jnp.int32) if label_prompts else None  # of each row
    for b in buckets:
      n = b['text'].shape[0]
      out.append(cls(
          layout=layout, ids=_target_ids(name, start + jnp.arange(n)), text=b['text'], text_valid=b['valid'],
          classes=entry[start:start + n] if label_prompts else None))
      start += n
    return tuple(out)

  def token_positions(self) -> jax.Array:
    """int32 [B, S] rows of the position table, one per token of the text."""
    if self.text_positions is not None:
      return jnp.broadcast_to(self.text_positions, self.text.shape)
    positions = jnp.arange(self.text.shape[1], dtype=jnp.int32)
    if self.layout.masks[self.layout.modalities.index('text')] == 'two_stream':
      positions = positions % (self.text.shape[1] // 2)
    return jnp.broadcast_to(positions, self.text.shape)

  def neighbors(self, n: int) -> jax.Array | None:
    """int32 [B, S, 2n]: the n words before each token of the text, nearest first, then those after; None if n is 0.

    NO_WORD past the ends and for padding. Captions have none after a word, since it must not see what follows it; those
    of a query are the words before it.
    """
    if not n:
      return None
    before, after = self.text_before, None
    if before is None:
      words = self.text if self.text_valid is None else jnp.where(self.text_valid, self.text, NO_WORD)
      full = self.layout.masks[self.layout.modalities.index('text')] == 'full'
      words = words if full else words[:, :words.shape[1] // 2]
      ends = jnp.full((words.shape[0], n), NO_WORD, words.dtype)
      padded = jnp.concatenate([ends, words, ends], axis=1)
      at = lambda offset: jax.lax.slice_in_dim(padded, n + offset, n + offset + words.shape[1], axis=1)
      before = jnp.stack([at(-k) for k in range(1, n + 1)], axis=-1)
      if full:
        after = jnp.stack([at(k) for k in range(1, n + 1)], axis=-1)
      else:
        before = jnp.concatenate([before, before], axis=1)
    return jnp.concatenate([before, jnp.full_like(before, NO_WORD) if after is None else after], axis=-1)

  def pad_batch(self, multiple: int) -> 'InputSequence':
    """Pads texts with examples without valid tokens, so that every device has equally many.

    A partitioner would move unevenly sharded rows, drawn numbers and all, at every step. Images come in batches that
    divide, except the last one of an evaluation, and stay as they are.
    """
    missing = -self.ids.shape[0] % multiple
    if not missing or self.pixels is not None:
      return self
    pad = lambda x: None if x is None else jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)))
    fields = 'ids', 'text', 'positions', 'is_read', 'classes'
    valid = jnp.ones(self.text.shape, bool) if self.text_valid is None else self.text_valid
    return self.replace(text_valid=pad(valid), **{name: pad(getattr(self, name)) for name in fields})


def _target_ids(name: str, rows: jax.Array) -> jax.Array:
  """Example ids of the entries of a target set, or of paired texts: the keys of stochastic depth and token noise."""
  return rows.astype(jnp.uint32) + jnp.uint32(zlib.crc32(name.encode()))


@flax.struct.dataclass
class EmbeddedSequence:
  """One batch of sequences inside the encoder."""
  segments: tuple[jax.Array, ...]  # [B, S, D] each
  valid: tuple[jax.Array | None, ...]  # bool [B, S] per segment, which tokens may serve as keys; None: all
  readout_positions: jax.Array | None  # int32 [B, M] of the tokens to read ('masked', 'slot')
  ids: jax.Array  # uint32 [B] example ids: the key of stochastic depth and of token noise
  layout: Layout = flax.struct.field(pytree_node=False)
  cache_valid: jax.Array | None = None  # bool [B, W], which words of its cache are decoded
  # S per segment, also where the encoder has removed `segments`.
  lengths: tuple[Any, ...] = flax.struct.field(pytree_node=False, default=())
  is_read: jax.Array | None = None  # as in `InputSequence`

  def without_segments(self, cache: 'KVCache | None') -> 'EmbeddedSequence':
    """What stays the same in all layers, with the cache's mask."""
    lengths = tuple(x.shape[1] for x in self.segments)
    return self.replace(segments=(), lengths=lengths, cache_valid=None if cache is None else cache.valid)

  def take_readout(self, x: jax.Array) -> jax.Array:
    """Rows of the readout segment [B, S, …] that are read: [B, R, …]."""
    if self.layout.readout == 'cls':
      return x[:, :1]
    if self.layout.readout == 'queries':
      return x[:, x.shape[1] // 2:]
    positions = self.readout_positions
    return jnp.take_along_axis(x, positions.reshape(positions.shape + (1,) * (x.ndim - 2)), axis=1)

  def readout_segments(self, segments: tuple[jax.Array, ...]) -> tuple[jax.Array | None, ...]:
    """The rows of the readout at the index of their segment; None for all others."""
    read = self.layout.readout_segment
    return tuple(self.take_readout(x) if i == read else None for i, x in enumerate(segments))

  def tokens(self, index: int, readout_only: bool = False) -> dict[str, Any]:
    """{'ids', 'positions', 'valid', 'groups'} of a segment, or of its readout rows, for `TokenRouter`."""
    positions, valid = self._positions(sum(self.lengths[:index]), self.lengths[index]), self.valid[index]
    groups = 1 if self.layout.masks[index] == 'full' else 2  # words and queries
    if readout_only:
      positions, valid = (None if x is None else self.take_readout(x) for x in (positions, valid))
      if self.is_read is not None:  # those that do not count repeat a token
        valid = self.is_read if valid is None else valid & self.is_read
      groups = 1
    return {'ids': self.ids, 'positions': positions, 'valid': valid, 'groups': groups}

  def prompt_tokens(self, length: int) -> dict[str, Any]:
    """The same of deep prompts, whose positions follow those of the segments."""
    positions, valid = self._positions(sum(self.lengths), length), self.valid[0]
    if valid is not None:  # examples that only pad the batch have no valid token
      valid = jnp.broadcast_to(valid.any(axis=1, keepdims=True), positions.shape)
    return {'ids': self.ids, 'positions': positions, 'valid': valid, 'groups': 1}

  def _positions(self, start: int, length: int) -> jax.Array:
    return jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32), (self.ids.shape[0], length))


def flatten(x: jax.Array) -> jax.Array:
  """[shards, b, …] → [shards · b, …]: a sharded axis stays the major one, nothing moves."""
  return x.reshape(-1, *x.shape[2:])


def split_shards(x: jax.Array, shards: int) -> jax.Array:
  """[shards · b, …] → [shards, b, …]."""
  return x.reshape(shards, -1, *x.shape[1:])


def take_rows(x: jax.Array, rows: slice, shards: int) -> jax.Array:
  """The same rows of every shard: [shards · b, …] → [shards · (stop - start), …]."""
  return flatten(split_shards(x, shards)[:, rows])


def flat_fields(fields: Fields) -> Fields:
  """Flattens the leading [shards, b] of every field, except the temporal offset, which a batch has once."""
  return {name: x if name == 'temporal_offset' else flatten(x) for name, x in fields.items()}


def map_joined(f: Callable[[Any], jax.Array], arrays: list[Any], shards: int) -> list[jax.Array]:
  """Applies a function of tokens to several arrays of them at once, and so reads its weights once.

  Args:
    f: [shards, N, …] → [shards, N, …], each token by itself.
    arrays: pytrees of arrays [shards · b, S, …], with any b and S.
  """
  if len(arrays) < 2 or any(x.shape[0] % shards for x in jax.tree.leaves(arrays)):
    return [f(x) for x in arrays]
  rows = [jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[2:]), a) for a in arrays]
  y, out, start = f(jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *rows)), [], 0
  for a in arrays:
    B, S = jax.tree.leaves(a)[0].shape[:2]
    own = y[:, start:start + B // shards * S]
    out.append(own.reshape(B, S, *y.shape[2:]))
    start += own.shape[1]
  return out


def pad_to_join(sequences: tuple[EmbeddedSequence, ...], keys: tuple[Any, ...]) -> tuple[EmbeddedSequence, ...]:
  """Pads texts to the length of longer ones with the same key, if that adds few tokens: then they can join.

  A sequence has about a hundred kernels of its own in a step, which take time to compile and to start, however few its
  tokens are. keys: as in `join_equal`.
  """
  padded, longest = list(sequences), {}
  lengths = {i: s.segments[0].shape[1] for i, s in enumerate(sequences)
             if s.layout.modalities == ('text',) and s.layout.readout == 'cls' and s.valid[0] is not None}
  for i in sorted(lengths, key=lengths.get, reverse=True):
    s, missing = sequences[i], longest.setdefault(keys[i], lengths[i]) - lengths[i]
    if missing * s.ids.shape[0] > _MAX_PADDING:
      longest[keys[i]] = lengths[i]
    elif missing:
      x, valid = (jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) for x in (s.segments[0], s.valid[0]))
      padded[i] = s.replace(segments=(x,), valid=(valid,))
  return tuple(padded)


def join_equal(sequences: tuple[EmbeddedSequence, ...], keys: tuple[Any, ...], shards: int):
  """Joins sequences whose key and shapes are equal along the batch, so that they share their products.

  The batch axis is [shards · b]: the examples of each shard are joined to each other, never across shards, so that
  joining moves nothing between devices.

  Args:
    keys: one hashable per sequence; sequences join only if keys are equal (router inputs, masks, readout).
    shards: number of shards of the batch axis.

  Returns:
    (joined sequences, split): `split(results)` takes one [B_joined, …] pytree per joined sequence and returns one
    [B, …] pytree per original sequence, in the original order.
  """
  groups: dict[Any, list[int]] = {}
  for i, (s, key) in enumerate(zip(sequences, keys)):
    leaves, structure = jax.tree.flatten(s.replace(layout=None))
    # A batch that does not divide, such as the last images of an evaluation, stays alone.
    divides = s.ids.shape[0] % shards == 0
    groups.setdefault((key, structure, *(x.shape[1:] for x in leaves)) if divides else i, []).append(i)

  def join(*leaves):
    if len(leaves) == 1:
      return leaves[0]
    return flatten(jnp.concatenate([split_shards(x, shards) for x in leaves], axis=1))

  joined = []
  for members in groups.values():
    layout = sequences[members[0]].layout
    joined.append(jax.tree.map(join, *(sequences[i].replace(layout=layout) for i in members)))

  def split(results):
    out = [None] * len(sequences)
    for members, result in zip(groups.values(), results, strict=True):
      start = 0
      for i in members:
        own = slice(start, start + sequences[i].ids.shape[0] // shards)
        out[i] = result if len(members) == 1 else jax.tree.map(lambda x, own=own: take_rows(x, own, shards), result)
        start = own.stop
    return tuple(out)

  return tuple(joined), split
