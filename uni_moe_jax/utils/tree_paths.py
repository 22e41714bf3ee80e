"""Paths of parameters in a tree as strings, by which configs, conversion and analysis name them."""

from typing import Any

import jax


def path_of(key_path) -> str:
  """Return a tree path as a string, such as 'encoder/blocks/block0/ffn_in/kernel'."""
  return jax.tree_util.keystr(key_path, simple=True, separator='/')


def by_path(tree: Any) -> dict[str, Any]:
  """Return {path: leaf} in the order of the tree."""
  return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def describe_arrays(tree: Any) -> dict[str, str]:
  """Return {path: 'float32[8, 3]'} of a tree of shapes or of Orbax's description of one."""
  return {path: f'{leaf.dtype}{list(leaf.shape)}' for path, leaf in by_path(tree).items() if hasattr(leaf, 'shape')}
