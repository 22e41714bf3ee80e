"""Fresh parameters of a model, and their shapes."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uni_moe_jax.model.sequences import Layout, Sequence
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.moe import routers
from uni_moe_jax.tasks import task_types


def boxed_params(model: UniPerceiver, key: jax.Array) -> Any:
  """Parameters in boxes that name their logical axes. Encoding one text creates all of them."""
  condition, spec = next(iter(task_types.families().values())), model.spec
  if spec.kernels:  # a merged model may lack this condition; all of its kernels have one shape
    model = model.clone(spec=dataclasses.replace(spec, kernels=((routers.router_input(spec.router, condition), 0),)))
  text = Sequence(layout=Layout.of_text(condition), ids=jnp.zeros((1,), jnp.uint32), text=jnp.zeros((1, 2), jnp.int32))
  return model.init(key, text)['params']


def init_params(model: UniPerceiver, key: jax.Array) -> Any:
  """Fresh parameters, by `key`."""
  return nn.unbox(boxed_params(model, key))


def param_shapes(model: UniPerceiver) -> Any:
  """The parameter tree as `jax.ShapeDtypeStruct`s; computes nothing."""
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
