"""Names of parameters: their places in a tree as one text, by which configs, conversion and analysis speak of them."""

from typing import Any

import jax


def path_of(key_path) -> str:
  """'encoder/blocks/block0/ffn_in/kernel' from a tree path."""
  return jax.tree_util.keystr(key_path, simple=True, separator='/')


def by_path(tree: Any) -> dict[str, Any]:
  """{path: leaf}, in the order of the tree."""
  return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
