"""A closed set of answers as a tree of tokens: what decoding may say next."""

from collections.abc import Iterable, Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.utils.errors import UsageError

ROOT = 0


@flax.struct.dataclass
class Trie:
  """Nodes and their children, padded.

  Attributes:
    tokens: int32 [nodes, C], token of each child; -1 where there is none.
    children: int32 [nodes, C], its node.
  """
  tokens: np.ndarray
  children: np.ndarray

  @classmethod
  def of(cls, answers: Iterable[Sequence[int]]) -> 'Trie':
    """The tree of token sequences, each with its `eot`.

    Raises:
      UsageError: there is no answer.
    """
    nodes: list[dict[int, int]] = [{}]
    for answer in answers:
      at = ROOT
      for token in answer:
        if token not in nodes[at]:
          nodes.append({})
          nodes[at][token] = len(nodes) - 1
        at = nodes[at][token]
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
  # Token V takes the places of children that do not exist, and is cut off.
  tokens = jnp.where(tokens < 0, vocab_size, tokens)
  rows = jnp.zeros((*node.shape, vocab_size + 1), bool)
  B, k, _ = tokens.shape
  return rows.at[jnp.arange(B)[:, None, None], jnp.arange(k)[None, :, None], tokens].set(True)[..., :vocab_size]


def follow(trie: Trie, node: jax.Array, token: jax.Array, done: jax.Array) -> jax.Array:
  """Nodes [B, k] after tokens [B, k]; hypotheses that have ended stay where they are."""
  hit = jnp.asarray(trie.tokens)[node] == token[..., None]
  child = jnp.where(hit, jnp.asarray(trie.children)[node], 0).sum(-1)
  return jnp.where(done, node, child)
