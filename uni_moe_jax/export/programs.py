"""The programs of an exported model: for each task, functions of parameters and named arrays, with a symbolic batch.

encode: input → features. classify: input, targets → log-probabilities. encode_text: texts that may be answers → features.
score: features of inputs and of texts → similarities. caption: pictures → captions, the whole search; prefill and step: the
same, one word at a time. All go through the code that training and evaluation use.
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
# Of float32 products: by default NVIDIA GPUs multiply TF32 and TPUs bfloat16, so that a program would say something else there.
WHOLE = 'highest'

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Asked:
  """A task whose programs are exported.

  Attributes:
    task: of the run.
    frames: T of its pictures or clips; 0 where it has none.
    size: V of its target set; 0 of pairs.
    texts: condition of texts that may be its answers; None: only the entries of its set can be.
    beams, penalty: of its captions, as in `decode.search`.
  """
  task: TaskSpec
  frames: int = 0
  size: int = 0
  texts: Condition | None = None
  beams: int = 1
  penalty: float = 0.0

  @property
  def conditions(self) -> tuple[Condition, ...]:
    """Of every array that its programs encode."""
    return (*self.task.type.conditions, *([] if self.texts is None else [self.texts]))


@dataclasses.dataclass(frozen=True)
class Program:
  """A function with its inputs.

  Attributes:
    run: (parameters by path, inputs) → outputs, all of them dictionaries.
    inputs: shapes and types, with symbolic sizes.
    precision: of float32 products, for `jax.default_matmul_precision`.
  """
  run: Callable[[Arrays, Arrays], Arrays]
  inputs: Arrays
  precision: str

  def lowered(self, params: Arrays) -> jax.export.Exported:
    """The program for every platform. params: arrays or shapes by path."""
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in params.items()}
    with jax.default_matmul_precision(self.precision):  # a program keeps that of its lowering, whoever calls it
      return jax.export.export(jax.jit(self.run), platforms=PLATFORMS)(shapes, self.inputs)


def programs(model: UniPerceiver, asked: Asked, spe: int, eot: int) -> dict[str, Program]:
  """Programs of a task by name.

  Sizes: b batch, s tokens, m picked positions, v targets, c candidates. Pixels are uint8 [b, T, H, W, C], normalised inside;
  texts int32 [b, s], each ended by `eot`, with bool [b, s], which of them are no padding; features f32 [b, D], normalised.
  """
  made = _Programs(model, asked)
  kind = asked.task.type
  if kind.readout == 'queries':
    return made.captions(spe, eot)
  found = {'encode': made.encode()}
  if kind.target == 'pair':
    found['score'] = made.score()
  else:
    found['classify'] = made.classify()
  if asked.texts is not None:
    found['encode_text'] = made.encode_text()
  return found


class _Programs:
  """Makes the programs of one task."""

  def __init__(self, model: UniPerceiver, asked: Asked):
    self._model, self._spec, self._asked, self._task = model, model.spec, asked, asked.task
    self._kind = asked.task.type
    # Who asks for bfloat16 asks for speed: the few float32 products that are left are then as fast as the platform has them.
    fast = jnp.dtype(self._spec.dtype) != jnp.float32
    self._program = functools.partial(Program, precision='default' if fast else WHOLE)

  def _apply(self, params: Arrays, method, *args):
    return self._model.apply({'params': _tree(params)}, *args, method=method)

  def _sizes(self, names: str, text: bool) -> dict[str, Any]:
    """Symbolic sizes by name; texts are at most as long as the position table."""
    bounds = (f's <= {self._spec.max_text_len}',) if text else ()
    return dict(zip(names.split(), jax.export.symbolic_shape(names.replace(' ', ', '), constraints=bounds)))

  def _fields(self, more: str = '') -> tuple[Arrays, dict[str, Any]]:
    """(shapes of the task's input arrays, sizes)."""
    text, picks = self._kind.text_index is not None, self._kind.readout == 'masked'
    n = self._sizes(f'b{" s" * text}{" m" * picks}{more}', text)
    fields = {'pixels': self._pixels(n['b'])} if self._kind.visual else {}
    if text:
      fields |= _text(n)
      fields['position'] = jax.ShapeDtypeStruct((n['b'], n['m'] if picks else 1), jnp.int32)
    return fields, n

  def _pixels(self, batch) -> jax.ShapeDtypeStruct:
    s = self._spec
    return jax.ShapeDtypeStruct((batch, self._asked.frames, s.image_size, s.image_size, s.channels), jnp.uint8)

  def _features(self, params: Arrays, fields: Arrays) -> jax.Array:
    """[b, R, D], not normalised."""
    batch = next(iter(fields.values())).shape[0]
    sequence = batching.input_sequence(self._kind, {**fields, 'id': jnp.zeros((batch,), jnp.uint32)})
    return self._encoded(params, sequence)

  def _encoded(self, params: Arrays, sequence: Sequence) -> jax.Array:
    return self._apply(params, lambda m: m.features(m.encode(sequence).hidden))

  def _read(self, x: jax.Array) -> jax.Array:
    """Only picks are read at several positions."""
    return x if self._kind.readout == 'masked' else x[:, 0]

  def encode(self) -> Program:
    fields, _ = self._fields()

    def run(params, x):
      return {'features': self._read(heads.normalize(self._features(params, x)))}
    return self._program(run, fields)

  def classify(self) -> Program:
    fields, n = self._fields(' v')
    size = self._asked.size if self._task.linear_head else n['v']  # a linear head has its classes
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
    layout = Layout.of_text(self._asked.texts)

    def run(params, x):
      ids = jnp.zeros((x['text'].shape[0],), jnp.uint32)
      sequence = Sequence(layout=layout, ids=ids, text=x['text'], text_valid=x['text_valid'])
      return {'features': heads.normalize(self._encoded(params, sequence)[:, 0])}
    return self._program(run, _text(n))

  def score(self) -> Program:
    n = self._sizes('b c', False)
    known = self._task.temperature in self._spec.temperature_groups  # of pairs only the order matters, which needs no scale
    rows = lambda size: jax.ShapeDtypeStruct((size, self._spec.width), jnp.float32)

    def run(params, x):
      scale = self._apply(params, 'scale', self._task.temperature) if known else jnp.float32(1)
      return {'scores': heads.logits(x['features'], x['texts'], scale)}
    return self._program(run, {'features': rows(n['b']), 'texts': rows(n['c'])})

  def captions(self, spe: int, eot: int) -> dict[str, Program]:
    kind, length, model = self._kind, self._task.max_len, self._model
    [b] = self._sizes('b', False).values()
    pixels = {'pixels': self._pixels(b)}
    words = {'targets': jax.ShapeDtypeStruct((self._asked.size, self._spec.width), jnp.float32)}

    def caption(params, x):
      found = decoding.beam_search(
          model, _tree(params), kind, x['pixels'], x['targets'], temperature=self._task.temperature, spe=spe, eot=eot,
          max_len=length, beam_size=self._asked.beams, length_penalty=self._asked.penalty)
      return {'tokens': found.tokens[:, 0], 'score': found.scores[:, 0]}

    def past(params, x):
      return decoding.prefill(model, _tree(params), kind, x['pixels'], length)

    def prefill(params, x):
      return {'cache': tuple(jax.tree.leaves(past(params, x)))}

    shapes = jax.eval_shape(past, by_path(param_shapes(model)), pixels)
    leaves, structure = jax.tree.flatten(shapes)

    def step(params, x):
      features, new = decoding.decode_step(
          model, _tree(params), kind, jax.tree.unflatten(structure, x['cache']), x['word'], x['t'], spe=spe)
      logits = self._apply(params, 'scale', self._task.temperature) * features @ x['targets'].T
      return {'log_p': jax.nn.log_softmax(logits), 'cache': tuple(jax.tree.leaves(new))}

    asks = {'word': jax.ShapeDtypeStruct((b,), jnp.int32), 't': jax.ShapeDtypeStruct((), jnp.int32)}
    return {
        'caption': self._program(caption, {**pixels, **words}), 'prefill': self._program(prefill, pixels),
        'step': self._program(step, {'cache': tuple(leaves), **asks, **words})}


def _tree(params: Arrays) -> dict[str, Any]:
  """Parameters by path as a model takes them."""
  return traverse_util.unflatten_dict(params, sep='/')


def _text(n: dict[str, Any]) -> Arrays:
  return {'text': jax.ShapeDtypeStruct((n['b'], n['s']), jnp.int32),
          'text_valid': jax.ShapeDtypeStruct((n['b'], n['s']), jnp.bool_)}
