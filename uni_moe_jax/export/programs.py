"""Programs of an exported model: for each task, functions of parameters and arrays with a symbolic batch.

  encode: input → features
  classify: input, targets → log-probabilities
  encode_text: texts that can be answers → features
  score: features of inputs and of texts → similarities
  caption: images → captions by the complete search
  prefill, step: greedy captions, one token at a time

All use the code of training and evaluation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from flax import traverse_util

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.model import batching, decoding, heads
from uni_moe_jax.model.initialization import param_shapes
from uni_moe_jax.model.sequences import Layout
from uni_moe_jax.model.uni_perceiver import Sequence, UniPerceiver
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.utils.tree_paths import by_path

PLATFORMS = ('cpu', 'cuda', 'tpu')
# For float32 products. By default NVIDIA GPUs multiply in TF32 and TPUs in bfloat16, so a program would return other
# values there.
FULL_PRECISION = 'highest'

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ExportedTask:
  """A task whose programs are exported.

  Attributes:
    task: of the run.
    num_frames: T of its images or videos; 0 without visual input.
    set_size: V of its target set; 0 for pairs.
    text_condition: condition of texts that can be its answers; None: only the entries of its target set can be answers.
    beam_size, length_penalty: of its captions, as in `decoding.beam_search`.
  """
  task: TaskSpec
  num_frames: int = 0
  set_size: int = 0
  text_condition: Condition | None = None
  beam_size: int = 1
  length_penalty: float = 0.0

  @property
  def conditions(self) -> tuple[Condition, ...]:
    """Conditions of every array that its programs encode."""
    return (*self.task.type.conditions, *([] if self.text_condition is None else [self.text_condition]))


@dataclasses.dataclass(frozen=True)
class Program:
  """A function with its inputs.

  Attributes:
    run: (parameters by path, inputs) → outputs; all are dictionaries.
    inputs: shapes and dtypes, with symbolic sizes.
    precision: of float32 products, for `jax.default_matmul_precision`.
  """
  run: Callable[[Arrays, Arrays], Arrays]
  inputs: Arrays
  precision: str

  def lowered(self, params: Arrays) -> jax.export.Exported:
    """Lowers the program for every platform. params: arrays or shapes by path."""
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in params.items()}
    with jax.default_matmul_precision(self.precision):  # a program keeps the precision of its lowering
      return jax.export.export(jax.jit(self.run), platforms=PLATFORMS)(shapes, self.inputs)


def programs(model: UniPerceiver, exported: ExportedTask, spe: int, eot: int) -> dict[str, Program]:
  """Returns the programs of a task by name.

  Sizes: b batch, s tokens, m masked positions, v targets, c candidates. Pixels are uint8 [b, T, H, W, C] (normalized
  inside the program); texts are int32 [b, s], each ended by `eot`, with a bool [b, s] that is False for padding;
  features are normalized f32 [b, D].
  """
  made = _Programs(model, exported)
  task_type = exported.task.type
  if task_type.readout == 'queries':
    return made.captions(spe, eot)
  by_name = {'encode': made.encode()}
  if task_type.target == 'pair':
    by_name['score'] = made.score()
  else:
    by_name['classify'] = made.classify()
  if exported.text_condition is not None:
    by_name['encode_text'] = made.encode_text()
  return by_name


class _Programs:
  """Makes the programs of one task."""

  def __init__(self, model: UniPerceiver, exported: ExportedTask):
    self._model, self._spec, self._exported, self._task = model, model.spec, exported, exported.task
    self._task_type = exported.task.type
    # A bfloat16 export is for speed, so its few float32 products have the platform's fastest precision.
    fast = jnp.dtype(self._spec.dtype) != jnp.float32
    self._program = functools.partial(Program, precision='default' if fast else FULL_PRECISION)

  def _apply(self, params: Arrays, method, *args):
    return self._model.apply({'params': _tree(params)}, *args, method=method)

  def _sizes(self, names: str, text: bool) -> dict[str, Any]:
    """Symbolic sizes by name; the length of texts is bounded by the position table."""
    bounds = (f's <= {self._spec.max_text_len}',) if text else ()
    return dict(zip(names.split(), jax.export.symbolic_shape(names.replace(' ', ', '), constraints=bounds)))

  def _fields(self, more: str = '') -> tuple[Arrays, dict[str, Any]]:
    """(shapes of the task's input arrays, sizes)."""
    text, masked = self._task_type.text_index is not None, self._task_type.readout == 'masked'
    n = self._sizes(f'b{" s" * text}{" m" * masked}{more}', text)
    fields = {'pixels': self._pixels(n['b'])} if self._task_type.visual else {}
    if text:
      fields |= _text(n)
      fields['position'] = jax.ShapeDtypeStruct((n['b'], n['m'] if masked else 1), jnp.int32)
    return fields, n

  def _pixels(self, batch) -> jax.ShapeDtypeStruct:
    s = self._spec
    return jax.ShapeDtypeStruct((batch, self._exported.num_frames, s.image_size, s.image_size, s.channels), jnp.uint8)

  def _features(self, params: Arrays, fields: Arrays) -> jax.Array:
    """Features [b, R, D], not normalized."""
    batch = next(iter(fields.values())).shape[0]
    sequence = batching.input_sequence(self._task_type, {**fields, 'id': jnp.zeros((batch,), jnp.uint32)})
    return self._encoded(params, sequence)

  def _encoded(self, params: Arrays, sequence: Sequence) -> jax.Array:
    return self._apply(params, lambda m: m.features(m.encode(sequence).hidden))

  def _read(self, x: jax.Array) -> jax.Array:
    """Drops the axis of readout positions except for masked prediction."""
    return x if self._task_type.readout == 'masked' else x[:, 0]

  def encode(self) -> Program:
    fields, _ = self._fields()

    def run(params, x):
      return {'features': self._read(heads.normalize(self._features(params, x)))}
    return self._program(run, fields)

  def classify(self) -> Program:
    fields, n = self._fields(' v')
    size = self._exported.set_size if self._task.linear_head else n['v']  # a linear head has a fixed number of classes
    targets = jax.ShapeDtypeStruct((size, self._spec.width), jnp.float32)

    def run(params, x):
      features = self._features(params, {name: a for name, a in x.items() if name != 'targets'})
      scale = self._apply(params, 'scale', self._task.temperature)
      logits = heads.logits(features, x['targets'], scale)
      if self._task.linear_head:
        logits = self._apply(params, 'with_head', features, logits)
      return {'log_p': self._read(jax.nn.log_softmax(logits))}
    return self._program(run, {**fields, 'targets': targets})

  def encode_text(self) -> Program:
    n = self._sizes('b s', True)
    layout = Layout.of_text(self._exported.text_condition)

    def run(params, x):
      ids = jnp.zeros((x['text'].shape[0],), jnp.uint32)
      sequence = Sequence(layout=layout, ids=ids, text=x['text'], text_valid=x['text_valid'])
      return {'features': heads.normalize(self._encoded(params, sequence)[:, 0])}
    return self._program(run, _text(n))

  def score(self) -> Program:
    n = self._sizes('b c', False)
    has_scale = self._task.temperature in self._spec.temperature_groups  # ranking pairs needs no scale
    features = lambda size: jax.ShapeDtypeStruct((size, self._spec.width), jnp.float32)

    def run(params, x):
      scale = self._apply(params, 'scale', self._task.temperature) if has_scale else jnp.float32(1)
      return {'scores': heads.logits(x['features'], x['texts'], scale)}
    return self._program(run, {'features': features(n['b']), 'texts': features(n['c'])})

  def captions(self, spe: int, eot: int) -> dict[str, Program]:
    task_type, max_len, model = self._task_type, self._task.max_len, self._model
    [b] = self._sizes('b', False).values()
    pixels = {'pixels': self._pixels(b)}
    words = {'targets': jax.ShapeDtypeStruct((self._exported.set_size, self._spec.width), jnp.float32)}

    def caption(params, x):
      captions = decoding.beam_search(
          model, _tree(params), task_type, x['pixels'], x['targets'], temperature=self._task.temperature, spe=spe,
          eot=eot, max_len=max_len, beam_size=self._exported.beam_size,
          length_penalty=self._exported.length_penalty)
      return {'tokens': captions.tokens[:, 0], 'score': captions.scores[:, 0]}

    def kv_cache(params, x):
      return decoding.prefill(model, _tree(params), task_type, x['pixels'], max_len)

    def prefill(params, x):
      return {'cache': tuple(jax.tree.leaves(kv_cache(params, x)))}

    shapes = jax.eval_shape(kv_cache, by_path(param_shapes(model)), pixels)
    leaves, structure = jax.tree.flatten(shapes)

    def step(params, x):
      features, new = decoding.decode_step(
          model, _tree(params), task_type, jax.tree.unflatten(structure, x['cache']), x['word'], x['t'], spe=spe)
      logits = self._apply(params, 'scale', self._task.temperature) * features @ x['targets'].T
      return {'log_p': jax.nn.log_softmax(logits), 'cache': tuple(jax.tree.leaves(new))}

    token = {'word': jax.ShapeDtypeStruct((b,), jnp.int32), 't': jax.ShapeDtypeStruct((), jnp.int32)}
    return {
        'caption': self._program(caption, {**pixels, **words}), 'prefill': self._program(prefill, pixels),
        'step': self._program(step, {'cache': tuple(leaves), **token, **words})}


def _tree(params: Arrays) -> dict[str, Any]:
  """Parameters by path → tree of parameters."""
  return traverse_util.unflatten_dict(params, sep='/')


def _text(n: dict[str, Any]) -> Arrays:
  return {'text': jax.ShapeDtypeStruct((n['b'], n['s']), jnp.int32),
          'text_valid': jax.ShapeDtypeStruct((n['b'], n['s']), jnp.bool_)}
