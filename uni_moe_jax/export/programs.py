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
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from flax import traverse_util

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.model import decoding, heads
from uni_moe_jax.model.sequences import InputSequence, Layout
from uni_moe_jax.model.uni_perceiver import UniPerceiver, param_shapes
from uni_moe_jax.moe import precision
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.utils.tree_paths import by_path

PLATFORMS = ('cpu', 'cuda', 'tpu')

Arrays, Shape = dict[str, Any], jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class ExportedTask:
  """A task whose programs are exported; beam_size, length_penalty: of its captions, as in `decoding.beam_search`."""
  task: TaskSpec
  num_frames: int = 0  # T of its images or videos; 0 without visual input
  set_size: int = 0  # V of its target set; 0 for pairs
  text_condition: Condition | None = None  # of texts that can be its answers; None: only entries of its target set can
  beam_size: int = 1
  length_penalty: float = 0.0
  media: str = 'text'  # 'image' or 'video' with visual input, by its source

  @property
  def conditions(self) -> tuple[Condition, ...]:
    """Conditions of every array that its programs encode."""
    return (*self.task.type.conditions, *([] if self.text_condition is None else [self.text_condition]))


@dataclasses.dataclass(frozen=True)
class Program:
  """A function with its inputs."""
  run: Callable[[Arrays, Arrays], Arrays]  # (parameters by path, inputs) → outputs
  inputs: Arrays  # shapes and dtypes, with symbolic sizes
  dtype: Any  # of the products of layers

  def lowered(self, params: Arrays) -> jax.export.Exported:
    """Lowers the program for every platform, without source locations. params: arrays or shapes by path.

    Locations name folders of the exporting machine and would make equal programs differ.
    """
    shapes = {path: Shape(x.shape, x.dtype) for path, x in params.items()}
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update('jax_traceback_in_locations_limit', 0)
    try:
      with precision.of_evaluation(self.dtype):  # a program keeps the precision of its lowering
        return jax.export.export(jax.jit(self.run), platforms=PLATFORMS)(shapes, self.inputs)
    finally:
      jax.config.update('jax_traceback_in_locations_limit', before)


def programs(model: UniPerceiver, exported: ExportedTask, spe: int, eot: int) -> dict[str, Program]:
  """Returns the programs of a task by name.

  Sizes: b batch, s tokens, m masked positions, v targets, c candidates. Pixels are uint8 [b, T, H, W, C] (normalized
  inside the program); texts are int32 [b, s], each ended by `eot`, with a bool [b, s] that is False for padding;
  features are normalized f32 [b, D].
  """
  made, task_type = _Programs(model, exported), exported.task.type
  if task_type.readout == 'queries':
    functions = made.captions(spe, eot)
  else:
    answers = {'score': made.score} if task_type.target == 'pair' else {'classify': made.classify}
    encode_text = {} if exported.text_condition is None else {'encode_text': made.encode_text}
    functions = {name: make() for name, make in {'encode': made.encode, **answers, **encode_text}.items()}
  return {name: Program(run, inputs, model.spec.dtype) for name, (run, inputs) in functions.items()}


class _Programs:
  """Makes the programs of one task, each as (run, inputs) of a `Program`."""

  def __init__(self, model: UniPerceiver, exported: ExportedTask):
    self._model, self._spec, self._exported, self._task = model, model.spec, exported, exported.task
    self._task_type, self._temperature = exported.task.type, exported.task.temperature

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
      fields |= {**_text(n), 'position': Shape((n['b'], n['m'] if masked else 1), jnp.int32)}
    return fields, n

  def _pixels(self, batch) -> Shape:
    s = self._spec
    return Shape((batch, self._exported.num_frames, s.image_size, s.image_size, s.channels), jnp.uint8)

  def _vectors(self, count) -> Shape:
    return Shape((count, self._spec.width), jnp.float32)

  def _features(self, params: Arrays, fields: Arrays) -> jax.Array:
    """Features [b, R, D], not normalized."""
    batch = next(iter(fields.values())).shape[0]
    return self._encoded(
        params, InputSequence.of_inputs(self._task_type, {**fields, 'id': jnp.zeros((batch,), jnp.uint32)}))

  def _encoded(self, params: Arrays, sequence: InputSequence) -> jax.Array:
    return self._apply(params, lambda m: m.features(m.encode(sequence).hidden))

  def _read(self, x: jax.Array) -> jax.Array:
    """Drops the axis of readout positions except for masked prediction."""
    return x if self._task_type.readout == 'masked' else x[:, 0]

  def encode(self):
    def run(params, x):
      return {'features': self._read(heads.normalize(self._features(params, x)))}
    return run, self._fields()[0]

  def classify(self):
    fields, n = self._fields(' v')
    head = self._task.linear_head  # it has a fixed number of classes

    def run(params, x):
      features = self._features(params, {name: a for name, a in x.items() if name != 'targets'})
      logits = heads.logits(features, x['targets'], self._apply(params, 'scale', self._temperature))
      if head:
        logits = self._apply(params, 'with_head', features, logits)
      return {'log_p': self._read(jax.nn.log_softmax(logits))}
    return run, {**fields, 'targets': self._vectors(self._exported.set_size if head else n['v'])}

  def encode_text(self):
    layout = Layout.of_text(self._exported.text_condition)

    def run(params, x):
      ids = jnp.zeros((x['text'].shape[0],), jnp.uint32)
      sequence = InputSequence(layout=layout, ids=ids, text=x['text'], text_valid=x['text_valid'])
      return {'features': heads.normalize(self._encoded(params, sequence)[:, 0])}
    return run, _text(self._sizes('b s', True))

  def score(self):
    n = self._sizes('b c', False)
    has_scale = self._temperature in self._spec.temperature_groups  # ranking pairs needs no scale

    def run(params, x):
      scale = self._apply(params, 'scale', self._temperature) if has_scale else jnp.float32(1)
      return {'scores': heads.logits(x['features'], x['texts'], scale)}
    return run, {'features': self._vectors(n['b']), 'texts': self._vectors(n['c'])}

  def captions(self, spe: int, eot: int):
    """All three programs of captions, by name."""
    task_type, max_len, model, exported = self._task_type, self._task.max_len, self._model, self._exported
    [b] = self._sizes('b', False).values()
    pixels, words = {'pixels': self._pixels(b)}, {'targets': self._vectors(exported.set_size)}

    def caption(params, x):
      captions = decoding.beam_search(
          decoding.Decoder.of(model, _tree(params), task_type), x['pixels'], x['targets'],
          temperature=self._temperature, spe=spe, eot=eot, max_len=max_len, beam_size=exported.beam_size,
          length_penalty=exported.length_penalty)
      return {'tokens': captions.tokens[:, 0], 'score': captions.scores[:, 0]}

    def kv_cache(params, x):
      return decoding.prefill(model, _tree(params), task_type, x['pixels'], max_len)

    def prefill(params, x):
      return {'cache': tuple(jax.tree.leaves(kv_cache(params, x)))}

    leaves, structure = jax.tree.flatten(jax.eval_shape(kv_cache, by_path(param_shapes(model)), pixels))

    def step(params, x):
      features, new = decoding.decode_step(
          model, _tree(params), task_type, jax.tree.unflatten(structure, x['cache']), x['word'], x['t'], spe=spe)
      scaled = self._apply(params, 'scale', self._temperature) * features
      logits = jnp.matmul(scaled, x['targets'].T, precision=precision.EXACT)
      return {'log_p': jax.nn.log_softmax(logits), 'cache': tuple(jax.tree.leaves(new))}

    token = {'word': Shape((b,), jnp.int32), 't': Shape((), jnp.int32)}
    return {'caption': (caption, {**pixels, **words}), 'prefill': (prefill, pixels),
            'step': (step, {'cache': tuple(leaves), **token, **words})}


def flat(tree: Arrays) -> Arrays:
  """Inputs or outputs of a program without tuples, in the order of `jax.tree.leaves`: a cache is cache_0, cache_1, …"""
  named = {}
  for name, x in sorted(tree.items()):
    named |= {f'{name}_{i}': leaf for i, leaf in enumerate(x)} if isinstance(x, (tuple, list)) else {name: x}
  return named


def _tree(params: Arrays) -> dict[str, Any]:
  """Parameters by path → tree of parameters."""
  return traverse_util.unflatten_dict(params, sep='/')


def _text(n: dict[str, Any]) -> Arrays:
  return {'text': Shape((n['b'], n['s']), jnp.int32), 'text_valid': Shape((n['b'], n['s']), jnp.bool_)}
