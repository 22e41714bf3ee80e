"""A small model whose parameters are nowhere zero, and inputs of every task type."""

import dataclasses
import functools
import math
import zlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from tests.helpers import fast_compile
from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.model.sequences import InputSequence, Layout
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.moe import routers
from uni_moe_jax.tasks import task_types

jit = functools.partial(jax.jit, compiler_options=fast_compile.OPTIONS)

ROUTERS = ('attribute', 'task', 'modality', 'token', 'context', 'dense')
VOCABULARY, SPE, EOT = 23, 0, 1
SIDE = 8  # pixels
WORDS = 3  # tokens of a text; a caption has as many queries again


def spec(router: str = 'attribute', **changes: Any) -> ModelSpec:
  """Three layers of width 16: two are scanned, one is the tail."""
  small = ModelSpec(
      num_layers=3, width=16, num_heads=2, mlp_dim=24, vocab_size=VOCABULARY, spe_id=SPE, image_size=SIDE,
      patch_size=4, channels=1, max_num_frames=3, max_text_len=12, pixel_mean=(0.5,), pixel_std=(0.25,),
      layer_scale_init=0.8, remat=False, router=router, num_experts=4, top_k=2,
      router_names=routers.table_names(router, task_types.router_tasks()),
      temperature_groups=('group',), gmm='batched')  # it compiles fastest; backends are compared in tests/kernels
  return dataclasses.replace(small, **changes)


def task_spec(task_type: str | task_types.TaskType, **changes: Any) -> TaskSpec:
  """A task with one example per step and texts of four tokens."""
  task_type = task_types.TASK_TYPES[task_type] if isinstance(task_type, str) else task_type
  fields = dict(name='task', group='', source='', batch_size=1, temperature='group', max_len=4, max_predictions=2)
  return TaskSpec(type=task_type, **fields | changes)


def _with_equal_parameters(model_spec: ModelSpec) -> ModelSpec:
  """The same spec for all that differ only in what no parameter depends on, since to trace a model takes a second."""
  return dataclasses.replace(model_spec, top_k=1, drop_path=0.0, noise_std=0.0, capacity_factor=0.0, gmm='batched',
                             remat=False, attention_impl='xla', layer_scale_init=1.0)


def boxed(model_spec: ModelSpec) -> Any:
  """Shapes of the parameters, in boxes that name their axes."""
  return _boxed(_with_equal_parameters(model_spec))


@functools.cache
def _boxed(model_spec: ModelSpec) -> Any:
  text = sequence('text_classification', batch=1)
  init = jax.eval_shape(UniPerceiver(model_spec).init, jax.random.key(0), text)
  return init['params']


@functools.cache
def params(model_spec: ModelSpec) -> Any:
  """Random parameters, biases too. A leaf depends on its path and shape alone, and nothing is compiled."""

  def fill(path, leaf):
    name = jax.tree_util.keystr(path)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if 'log_scale' in name:
      return np.float32(math.log(5.0))
    around = 1.0 if name.endswith("['scale']") or "['scale1']" in name or "['scale2']" in name else 0.0
    draws = np.asarray(rng.normal(size=leaf.shape), np.float32)
    return around + (0.2 if around else 0.4) * draws

  values = jax.tree_util.tree_map_with_path(fill, nn.unbox(boxed(model_spec)))
  with jax.ensure_compile_time_eval():  # a cached result must not hold tracers
    return jax.device_put(values)


def sequence(task_type: str | task_types.TaskType, batch: int = 2, seed: int = 0, words: int = WORDS,
             **fields) -> InputSequence:
  """The input side of a task type; `fields` replace the random ones."""
  task_type = task_types.TASK_TYPES[task_type] if isinstance(task_type, str) else task_type
  rng = np.random.default_rng(seed)
  made = {'ids': np.arange(10, 10 + batch, dtype=np.uint32)}
  if task_type.visual:
    frames = 2 if 'video' in task_type.name else 1
    made['pixels'] = np.asarray(rng.normal(size=(batch, frames, SIDE, SIDE, 1)), np.float32)
  if task_type.text_index is not None:
    text = np.asarray(rng.integers(2, VOCABULARY, (batch, words)), np.int32)
    made['text'] = np.concatenate([text, np.full_like(text, SPE)], axis=1) if task_type.two_stream else text
    made['text_valid'] = None if task_type.two_stream else np.ones((batch, words), bool)
  if task_type.readout in ('masked', 'slot'):
    picks = 2 if task_type.readout == 'masked' else 1
    shuffled = rng.permuted(np.tile(np.arange(words), (batch, 1)), axis=1)
    made['positions'] = np.asarray(shuffled[:, :picks], np.int32)
  return InputSequence(layout=Layout.of_task_type(task_type), **{**jax.device_put(made), **fields})


def target(condition, batch: int = 2, seed: int = 0, words: int = WORDS) -> InputSequence:
  """Texts on the target side."""
  rng = np.random.default_rng(seed)
  made = dict(ids=np.arange(batch, dtype=np.uint32), text_valid=np.ones((batch, words), bool),
              text=np.asarray(rng.integers(2, VOCABULARY, (batch, words)), np.int32))
  return InputSequence(layout=Layout.of_text(condition), **jax.device_put(made))


def encode(model_spec: ModelSpec, sequences, *, values=None, shards: int = 1, **options):
  """Features [B, R, D] per sequence, and what the encoder collected."""
  def run(model):
    encoded = model.encode(tuple(sequences), **options)
    return jax.tree.map(model.features, encoded.hidden), encoded.collected
  values = params(model_spec) if values is None else values
  return UniPerceiver(model_spec, shards).apply({'params': values}, method=run)


@functools.cache
def forward(model_spec: ModelSpec, **options):
  """(parameters, sequences, key or None) → what `encode` returns, compiled; for the options see `encode`."""
  return jit(lambda values, sequences, key: encode(model_spec, sequences, values=values, key=key, **options))


def run(model_spec: ModelSpec, sequences, key=None, *, values=None, **options):
  """What `encode` returns for these sequences, compiled."""
  return forward(model_spec, **options)(params(model_spec) if values is None else values, tuple(sequences), key)
