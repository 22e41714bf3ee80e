"""A closed set of answers as a tree of tokens, which constrains decoding."""

from collections.abc import Iterable, Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.utils.errors import UsageError

ROOT = 0


@flax.struct.dataclass
class Trie:
  """Padded children of every node."""
  tokens: np.ndarray  # int32 [nodes, C], token of each child; -1 for padding
  children: np.ndarray  # int32 [nodes, C], node of each child

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
    tokens, children = np.full((len(nodes), most), -1, np.int32), np.zeros((len(nodes), most), np.int32)
    for i, node in enumerate(nodes):
      tokens[i, :len(node)], children[i, :len(node)] = list(node), list(node.values())
    return cls(tokens, children)


def allowed(trie: Trie, node: jax.Array, vocab_size: int) -> jax.Array:
  """bool [B, k, V]: tokens that may follow at nodes [B, k]."""
  tokens = jnp.asarray(trie.tokens)[node]  # [B, k, C]
  # Padding becomes token V, whose column is cut off.
  tokens = jnp.where(tokens < 0, vocab_size, tokens)
  rows = jnp.zeros((*node.shape, vocab_size + 1), bool)
  B, k, _ = tokens.shape
  return rows.at[jnp.arange(B)[:, None, None], jnp.arange(k)[None, :, None], tokens].set(True)[..., :vocab_size]


def follow(trie: Trie, node: jax.Array, token: jax.Array, done: jax.Array) -> jax.Array:
  """Nodes [B, k] after tokens [B, k]; hypotheses that have ended keep their node."""
  matches = jnp.asarray(trie.tokens)[node] == token[..., None]
  child = jnp.where(matches, jnp.asarray(trie.children)[node], 0).sum(-1)
  return jnp.where(done, node, child)
