"""Sequences inside the encoder: layouts, caches of keys and values, and joins of equal ones.

A step encodes many sequences at once (several task types, several target sets). Each keeps its own arrays: one per
segment, with static conditions and masks, and padding, readout positions and example ids.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp

from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.tasks.task_types import TaskType

READ_NOTHING = 'nothing'  # prefill: only keys and values of the last layer are wanted
# (keys, values [b, N, S, H] in the order of the products, mask bool [B or 1, 1, Q or 1, S] or None: all visible). b
# divides B, and each row serves B / b consecutive examples: hypotheses about one image share its keys, all examples
# those of prompts.
KeysValues = tuple[jax.Array, jax.Array, jax.Array | None]


def heads_first(x: jax.Array) -> jax.Array:
  """[…, S, N, H] → […, N, S, H]."""
  return x.swapaxes(-3, -2)


@dataclasses.dataclass(frozen=True)
class Layout:
  """Static structure of a sequence.

  Attributes:
    conditions: one per segment. The prefix is token 0 of segment 0 if `prefixed`.
    masks: mask type per segment (see `masks.py`).
    readout: 'cls' | 'masked' | 'queries' | 'slot' | 'nothing'.
    prefixed: False in a decoding step, whose prefix is among the cached keys.
    prompted: the condition of deep prompts; None: that of the first segment.
    label_set: the target set of which the sequences are entries, if it has label prompts.
  """
  conditions: tuple[Condition, ...]
  masks: tuple[str, ...]
  readout: str
  prefixed: bool = True
  prompted: Condition | None = None
  label_set: str | None = None

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
    """Whether the sequence is on the target side."""
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
class EmbeddedSequence:
  """One batch of sequences inside the encoder.

  Attributes:
    segments: [B, S, D] each.
    valid: bool [B, S] per segment, None where nothing is padded: which tokens may serve as keys.
    readout_positions: int32 [B, M] of the tokens to read ('masked', 'slot'), else None.
    ids: uint32 [B] example ids: the key of stochastic depth and of token noise.
    cache_valid: bool [B, W], which words of its cache are decoded, or None.
    layout: static.
    lengths: S per segment, also where the encoder has removed `segments`.
  """
  segments: tuple[jax.Array, ...]
  valid: tuple[jax.Array | None, ...]
  readout_positions: jax.Array | None
  ids: jax.Array
  layout: Layout = flax.struct.field(pytree_node=False)
  cache_valid: jax.Array | None = None
  lengths: tuple[Any, ...] = flax.struct.field(pytree_node=False, default=())

  def without_segments(self, cache: 'KVCache | None') -> 'EmbeddedSequence':
    """What stays the same in all layers, with the cache's mask."""
    lengths = tuple(x.shape[1] for x in self.segments)
    return self.replace(segments=(), lengths=lengths, cache_valid=None if cache is None else cache.valid)

  def take_readout(self, x: jax.Array) -> jax.Array:
    """Rows of the readout segment [B, S, …] that are read: [B, R, …]."""
    return take_readout(x, self.layout.readout, self.readout_positions)

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
      groups = 1
    return {'ids': self.ids, 'positions': positions, 'valid': valid, 'groups': groups}

  def prompt_tokens(self, length: int) -> dict[str, Any]:
    """The same of deep prompts, whose positions follow those of the segments."""
    return {'ids': self.ids, 'positions': self._positions(sum(self.lengths), length), 'valid': None, 'groups': 1}

  def _positions(self, start: int, length: int) -> jax.Array:
    return jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32), (self.ids.shape[0], length))


@flax.struct.dataclass
class KVCache:
  """Keys and values of earlier tokens, visible to every token of a sequence.

  Keys and values are ((k, v), …), one pair per layer, in the tree that the encoder collects; with a leading axis of
  periods where it has one.

  Attributes:
    fixed: [b, N, P, H], of tokens that no word changes; each row serves B / b consecutive examples of the sequence.
    words: [B, N, W, H], of decoded words. valid: bool [B, W], which words are decoded.
    pools: of context routers: {sublayer: [B, D]}; {} without them.
  """
  fixed: Any
  words: Any
  valid: jax.Array | None
  pools: Any

  def of_layer(self, subtree: str, block: int) -> 'KVCache':
    """The cache of one block of the pattern, without `valid`, which is that of all."""
    return KVCache(self.fixed[subtree][block], self.words[subtree][block], None, self.pools[subtree][block])

  def parts(self, valid: jax.Array) -> list[KeysValues]:
    """Keys and values of one layer."""
    return [(*self.fixed, None), (*self.words, valid[:, None, None])]


def take_readout(x: jax.Array, readout: str, positions: jax.Array | None) -> jax.Array:
  """Rows of [B, S, …] that a readout reads: [B, R, …]."""
  if readout == 'cls':
    return x[:, :1]
  if readout == 'queries':
    return x[:, x.shape[1] // 2:]
  return jnp.take_along_axis(x, positions.reshape(positions.shape + (1,) * (x.ndim - 2)), axis=1)


def flatten(x: jax.Array) -> jax.Array:
  """[shards, b, …] → [shards · b, …]: a sharded axis stays the major one, nothing moves."""
  return x.reshape(-1, *x.shape[2:])


def split_shards(x: jax.Array, shards: int) -> jax.Array:
  """[shards · b, …] → [shards, b, …]."""
  return x.reshape(shards, -1, *x.shape[1:])


def take_rows(x: jax.Array, rows: slice, shards: int) -> jax.Array:
  """The same rows of every shard: [shards · b, …] → [shards · (stop - start), …]."""
  return flatten(split_shards(x, shards)[:, rows])


def join_equal(sequences: tuple[EmbeddedSequence, ...], keys: tuple[Any, ...], shards: int):
  """Joins sequences whose key and shapes are equal along the batch, so that they share their products.

  The batch axis is [shards · b]: the examples of each shard are joined to each other, never across shards, so that
  joining moves nothing between devices.

  Args:
    sequences: to join.
    keys: one hashable per sequence; sequences join only if keys are equal (router inputs, masks, readout).
    shards: number of shards of the batch axis.

  Returns:
    (joined sequences, split): `split(results)` takes one [B_joined, …] pytree per joined sequence and returns one
    [B, …] pytree per original sequence, in the original order.
  """
  groups: dict[Any, list[int]] = {}
  for i, (s, key) in enumerate(zip(sequences, keys)):
    shapes = tuple(x.shape[1:] for x in s.segments)
    padded = tuple(v is not None for v in s.valid)
    read = None if s.readout_positions is None else s.readout_positions.shape[1:]
    # A batch that does not divide, such as the last images of an evaluation, stays alone.
    divides = s.ids.shape[0] % shards == 0
    groups.setdefault((key, shapes, padded, read) if divides else i, []).append(i)

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
      if len(members) == 1:
        out[members[0]] = result
        continue
      start = 0
      for i in members:
        own = slice(start, start + sequences[i].ids.shape[0] // shards)
        out[i] = jax.tree.map(lambda x, own=own: take_rows(x, own, shards), result)
        start = own.stop
    return tuple(out)

  return tuple(joined), split
