"""Fresh parameters of a model, and their shapes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uni_moe_jax import tasks
from uni_moe_jax.model.streams import Layout
from uni_moe_jax.model.uni_perceiver import Sequence, UniPerceiver


def boxed_params(model: UniPerceiver, key: jax.Array) -> Any:
  """Parameters in boxes that name their logical axes. One text is enough to touch every one of them."""
  condition = next(iter(tasks.families().values()))
  text = Sequence(layout=Layout.of_text(condition), ids=jnp.zeros((1,), jnp.uint32), text=jnp.zeros((1, 2), jnp.int32))
  return model.init(key, (text,))['params']


def init_params(model: UniPerceiver, key: jax.Array) -> Any:
  """Fresh parameters, by `key`."""
  return nn.unbox(boxed_params(model, key))


def param_shapes(model: UniPerceiver) -> Any:
  """The parameter tree as `jax.ShapeDtypeStruct`s; computes nothing."""
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
