"""Hashes of examples, as batches give them to random changes."""

import numpy as np
import tensorflow as tf

from uni_moe_jax.utils import splitmix


def example_hashes(count: int, seed: int = 0) -> tf.Tensor:
  """Return uint64 [count], all different."""
  return tf.constant(np.array([splitmix.mix(seed, i) for i in range(count)], np.uint64))
