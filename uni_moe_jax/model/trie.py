"""A closed set of answers as a tree of tokens, which constrains decoding."""

import itertools
from collections.abc import Iterable, Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.utils.errors import UsageError

ROOT = 0


@flax.struct.dataclass
class Trie:
  """Children of every node: those of node i are rows `first[i]`, … of the others."""
  tokens: np.ndarray  # int32 [children + C], token of each child; -1 for padding
  children: np.ndarray  # int32 [children + C], node of each child
  first: np.ndarray  # int32 [nodes + 1]
  most: int = flax.struct.field(pytree_node=False)  # C, of one node

  @classmethod
  def of(cls, answers: Iterable[Sequence[int]]) -> 'Trie':
    """The tree of token sequences, each with its `eot`; without any, a UsageError."""
    nodes: list[dict[int, int]] = [{}]
    for answer in answers:
      node = ROOT
      for token in answer:
        if token not in nodes[node]:
          nodes.append({})
          nodes[node][token] = len(nodes) - 1
        node = nodes[node][token]
    if not nodes[ROOT]:
      raise UsageError('a trie needs at least one answer.')
    most = max(map(len, nodes))
    # A row of C for every node would take gigabytes: the root of 20,000 answers has thousands of children.
    join = lambda rows, padding: np.array([*itertools.chain(*rows), *[padding] * most], np.int32)
    first = np.cumsum([0, *map(len, nodes)], dtype=np.int32)
    return cls(join(nodes, -1), join(map(dict.values, nodes), 0), first, most)

  def of_nodes(self, node: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(tokens, children) int32 [B, k, C] of nodes [B, k]; the token of padding is -1."""
    first = jnp.asarray(self.first)
    row = first[node][..., None] + jnp.arange(self.most).reshape(1, 1, -1)
    tokens = jnp.where(row < first[node + 1][..., None], jnp.asarray(self.tokens)[row], -1)
    return tokens, jnp.asarray(self.children)[row]


def allowed(trie: Trie, node: jax.Array, vocab_size: int) -> jax.Array:
  """bool [B, k, V]: tokens that may follow at nodes [B, k]."""
  tokens, _ = trie.of_nodes(node)
  # Padding becomes token V, whose column is cut off.
  tokens = jnp.where(tokens < 0, vocab_size, tokens)
  rows = jnp.zeros((*node.shape, vocab_size + 1), bool)
  B, k, _ = tokens.shape
  return rows.at[jnp.arange(B)[:, None, None], jnp.arange(k)[None, :, None], tokens].set(True)[..., :vocab_size]


def follow(trie: Trie, node: jax.Array, token: jax.Array, done: jax.Array) -> jax.Array:
  """Nodes [B, k] after tokens [B, k]; hypotheses that have ended keep their node."""
  tokens, children = trie.of_nodes(node)
  child = jnp.where(tokens == token[..., None], children, 0).sum(-1)
  return jnp.where(done, node, child)
