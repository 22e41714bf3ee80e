"""Sections of the suite `gpu`. Each yields its measurements, so that one that fails leaves the others."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.kernels import attention as attention_kernels
from uni_moe_jax.kernels import gmm
from uni_moe_jax.kernels.gmm import triton as gmm_triton
from uni_moe_jax.model.flops import TRAIN
from uni_moe_jax.parallel import peaks
from uni_moe_jax.tasks.router_names import DENSE, ROUTERS
from uni_moe_jax.tools.bench import caption_rate
from uni_moe_jax.tools.bench.cases import Context, RepeatedStep
from uni_moe_jax.tools.bench.results_table import Budget, Row
from uni_moe_jax.tools.bench.settings import GpuSizes
from uni_moe_jax.tools.bench.timing import Estimate, Rounds, interleaved
from uni_moe_jax.utils.errors import RunError

Measure = Callable[[], list[Row]]
Measurement = tuple[str, Measure]  # and its name, for a row without a figure
Operands = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...], jax.Array]  # with gradients, without, of the result

_MFU = {(DENSE, 'train'): Budget(45, 55, at_most=False)}
_RATIO = {('attribute', 'train'): Budget(1.05, 1.02), ('token', 'train'): Budget(2., 1.9)}
_TOLERANCE = .02  # of the largest result, for bfloat16
KERNELS = 'product', 'gradient of x', 'gradient of kernels'  # of Triton


class NotAvailableError(Exception):
  """A measurement that needs another device."""


row = functools.partial(Row, 'gpu')


def describe(e: Exception, characters: int) -> str:
  """The type of an error and the beginning of its message, in one line."""
  return f'{type(e).__name__}: {" ".join(str(e).split())[:characters]}'


def models(context: Context) -> Iterator[Measurement]:
  """Training and inference steps of base/16, each router in turns with dense."""
  dense = functools.cache(lambda: _step(context, DENSE))  # of the others one at a time is in memory
  for router in (DENSE, *(r for r in ROUTERS if r != DENSE)):
    yield router, functools.partial(_model, context, router, dense)


def _step(context: Context, router: str, deterministic: bool = False) -> RepeatedStep:
  config = context.images_and_names(router=router)
  config.model.remat = False
  config.train.deterministic = deterministic
  return RepeatedStep(context.synthetic(config))


def _model(context: Context, router: str, dense: Callable[[], RepeatedStep]) -> list[Row]:
  s, device = context.sizes, context.devices[0].device_kind
  steps = {DENSE: dense()} if router == DENSE else {DENSE: dense(), router: _step(context, router)}
  step = steps[router]
  work = step.run.step_flops(None, step.batch, step.sets) / TRAIN
  note = (f'base/16, bfloat16, B {s.batch_size}, {s.image_size} px, a name of {s.name_tokens} tokens per image, no '
          'remat; FLOPs: matrix products; ')
  rate = peaks.of_kind(device)
  note += f'peak of {device}: {rate / 1e12:.0f} TFLOP/s' if rate else f'the peak of {device!r} is unknown'
  rows = []
  for mode, passes, calls in (('train', TRAIN, steps), ('inference', 1, {r: x.infer for r, x in steps.items()})):
    rounds = _seconds(s, calls)
    seconds, judged = rounds[router], 'H100' in device
    rows.append(row(f'{router}, {mode}', rounds.figure(s.batch_size / seconds), 'examples/s', note=note))
    rows.append(row(f'{router}, {mode}', rounds.figure(100 * passes * work / seconds / rate), '% MFU',
                    _MFU.get((router, mode)) if judged else None, note) if rate else
                row(f'{router}, {mode}', rounds.figure(passes * work / seconds / 1e12), 'TFLOP/s', note=note))
    if router != DENSE:
      budget = _RATIO.get((router, mode)) if judged else None
      rows.append(row(f'{router} / dense, {mode}', rounds.figure(seconds / rounds[DENSE]), 'x', budget, note))
  return rows


def _seconds(sizes: GpuSizes, calls: Mapping[Any, Callable[[], Any]]) -> Rounds:
  """Seconds of a call, of several that are queued together. Other processes of the host do not count."""
  queue = lambda call: [call() for _ in range(sizes.calls)][-1]
  rounds = interleaved({name: functools.partial(queue, call) for name, call in calls.items()}, sizes.rounds,
                       other_cores=lambda: 0.)
  return dataclasses.replace(rounds, seconds={name: s / sizes.calls for name, s in rounds.seconds.items()})


def _forward_and_gradients(
    s: GpuSizes, name: str, function: Callable[..., jax.Array], operands: Operands, note: str,
    reference: Callable[..., jax.Array] | None = None) -> list[Row]:
  """Rows of the milliseconds of a function, and of its gradients. reference: what it computes.

  Gradients of attention need its forward pass, which counts; those of a product do not.
  """
  def programs_of(function):
    gradients = lambda args, rest, dy: jax.vjp(lambda *args: function(*args, *rest), *args)[1](dy)
    forward = lambda args, rest, _: function(*args, *rest)
    return {'forward': jax.jit(forward), 'gradients': jax.jit(gradients)}

  programs = programs_of(function)
  for k, program in programs_of(reference).items() if reference else ():
    _check(programs[k](*operands), program(*operands))
  rounds = _seconds(s, {k: functools.partial(program, *operands) for k, program in programs.items()})
  return [row(f'{name}, {k}', rounds.figure(1e3 * rounds[k]), 'ms', note=note) for k in programs]


def _check(results: Any, expected: Any) -> None:
  """Raise RunError if a kernel's results are not those of XLA: none has run on a GPU before."""
  for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
    error = float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max() / jnp.abs(b).max())
    if not error < _TOLERANCE:
      raise RunError(f"results differ from XLA's by {error:.2g} of the largest; at most {_TOLERANCE} is rounding")


def attention(context: Context) -> Iterator[Measurement]:
  """Attention without masks, as images and videos have it."""
  for tokens, implementation in itertools.product(
      context.sizes.lengths, (attention_kernels.XLA, attention_kernels.CUDNN)):
    name = f'attention of {tokens} tokens, {implementation}'
    yield name, functools.partial(_attention, context, name, tokens, implementation)


def _attention(context: Context, name: str, tokens: int, implementation: str) -> list[Row]:
  s, function, reference = context.sizes, jax.nn.dot_product_attention, None
  if implementation == attention_kernels.CUDNN:
    if jax.default_backend() != 'gpu':
      raise NotAvailableError('cuDNN needs an NVIDIA GPU')
    reference = function
    function = functools.partial(attention_kernels.attend, valid=None, implementation=implementation, mesh=None)
  shape = max(1, s.tokens // tokens), tokens, s.num_heads, s.width // s.num_heads
  q, k, v, dy = jax.random.normal(jax.random.key(0), (4, *shape), jnp.bfloat16)
  note = f'bfloat16, [B, S, N, H] = {list(shape)}'
  return _forward_and_gradients(s, name, function, ((q, k, v), (), dy), note, reference)


def grouped_products(context: Context) -> Iterator[Measurement]:
  """Grouped products in the shapes of a token router: tiles of the Triton kernels, then these against the others."""
  s = context.sizes
  for D, F in _shapes(s):
    operands = functools.partial(_grouped_operands, s, D, F)
    tiles = [gmm_triton.Tiles()] * len(KERNELS)  # the fastest of each kernel, once they are measured
    for i, which in enumerate(KERNELS):
      name = f'{D} x {F}, Triton {which}'
      yield name, functools.partial(_tune, s, name, i, operands, tiles)
    for name in IMPLEMENTATIONS:
      yield f'{D} x {F}, {name}', functools.partial(_grouped, s, f'{D} x {F}, {name}', name, operands, tiles)


def _shapes(s: GpuSizes) -> list[tuple[int, int]]:
  """(D, F) of the projections of a layer."""
  return [(s.width, 3 * s.width), (s.width, s.width), (s.width, s.mlp_dim), (s.mlp_dim, s.width)]


def _group_sizes(s: GpuSizes) -> np.ndarray:
  """Rows of every expert [E], about as uneven as those of a router."""
  rng = np.random.default_rng(0)
  return rng.multinomial(s.tokens, rng.dirichlet(np.full(s.experts, 8.)))


def _grouped_operands(s: GpuSizes, D: int, F: int) -> Operands:
  """((x [G, D], kernel [E, D, F]), sizes [E], the gradient of the product [G, F])."""
  normal = lambda *shape: jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16)
  return (normal(s.tokens, D), normal(s.experts, D, F)), (jnp.asarray(_group_sizes(s), jnp.int32),), normal(s.tokens, F)


def _loop(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
  """The grouped product as E products of all rows."""
  group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side='right')[:, None]
  return sum(jnp.where(group == e, x @ kernel[e], 0) for e in range(len(kernel)))


def _triton_program(kernel: int, tiles: gmm_triton.Tiles | None) -> Callable[..., jax.Array]:
  """One of the `KERNELS`, as a function of operands; without tiles that of the loop."""
  def run(args, rest, dy):
    product = lambda *args: (
        gmm_triton.grouped_matmul(*args, *rest, (tiles,) * len(KERNELS)) if tiles else _loop(*args, *rest))
    return jax.vjp(product, *args)[1](dy)[kernel - 1] if kernel else product(*args)
  return jax.jit(run)


def _tune(
    s: GpuSizes, name: str, kernel: int, operands: Callable[[], Operands], fastest: list[gmm_triton.Tiles]
) -> list[Row]:
  """Measure a kernel with every choice of tiles; the fastest goes to `fastest`."""
  arrays, figures, notes = operands(), {}, []
  expected = _triton_program(kernel, None)(*arrays)
  for tiles in itertools.starmap(gmm_triton.Tiles, s.tiles):
    label = '{}x{}x{}, {} warps, {} stages'.format(*tiles)
    program = functools.partial(_triton_program(kernel, tiles), *arrays)
    try:
      _check(program(), expected)
      rounds = _seconds(s, {tiles: program})
    except Exception as e:  # pylint: disable=broad-exception-caught  # tiles may need more memory than a core has
      notes.append(f'{label}: {describe(e, 80)}')
    else:
      figures[tiles] = label, rounds.figure(1e3 * rounds[tiles])
      notes.append(f'{label}: {figures[tiles][1].value:.3g} ms')
  if not figures:
    raise RuntimeError('; '.join(notes))
  fastest[kernel] = min(figures, key=lambda tiles: figures[tiles][1].value)
  label, figure = figures[fastest[kernel]]
  return [row(f'{name}, fastest tiles: {label}', figure, 'ms', note='; '.join(notes))]


IMPLEMENTATIONS = {
    'Triton': gmm_triton.grouped_matmul, 'batched': functools.partial(gmm.grouped_matmul, backend='batched'),
    'ragged_dot': functools.partial(gmm.grouped_matmul, backend='ragged'),
    'tokamax': functools.partial(gmm.grouped_matmul, backend='tokamax')}


def _grouped(
    s: GpuSizes, name: str, implementation: str, operands: Callable[[], Operands], tiles: list[gmm_triton.Tiles]
) -> list[Row]:
  function, arrays = IMPLEMENTATIONS[implementation], operands()
  if implementation == 'Triton':
    function = functools.partial(function, tiles=tuple(tiles))
  note = (f'bfloat16, {s.tokens} rows; groups of {", ".join(map(str, _group_sizes(s)))} rows, of batched equal '
          'ones; Triton: with the fastest tiles')
  reference = None if implementation == 'batched' else _loop  # batched has other groups
  return _forward_and_gradients(s, name, function, arrays, note, reference)


def captions(context: Context) -> Iterator[Measurement]:
  """Captions per second, with caches."""
  for router in (DENSE, 'attribute'):
    yield f'{router}, captions', functools.partial(_captions, context, router)


def _captions(context: Context, router: str) -> list[Row]:
  s, (search, _) = context.sizes, caption_rate.captioner(context, router)
  rounds = _seconds(dataclasses.replace(s, calls=1), {k: functools.partial(search, k) for k in (1, 2)})
  note = f'base/16, bfloat16, B {s.small_batch}, {s.words} words each, {s.vocabulary} words, {s.image_size} px'
  return [row(f'{router}, {name}', rounds.figure(s.small_batch / rounds[k]), 'captions/s', note=note)
          for k, name in ((1, 'greedy'), (2, 'beam 2'))]


def digests(context: Context) -> Iterator[Measurement]:
  """Digests of the parameters after some deterministic steps, which two processes must share."""
  for router in ('attribute', 'token'):
    name = f'{router}, deterministic steps'
    yield name, functools.partial(_digest, context, name, router)


def _digest(context: Context, name: str, router: str) -> list[Row]:
  step, digest = _step(context, router, deterministic=True), hashlib.sha256()
  for _ in range(context.sizes.steps):
    step()
  for leaf in jax.tree.leaves(step.state.params):
    digest.update(np.asarray(leaf))
  return [row(name, Estimate(context.sizes.steps), 'steps, bit-equal', note=digest.hexdigest())]


SECTIONS: dict[str, Callable[[Context], Iterator[Measurement]]] = {
    'models': models, 'attention': attention, 'grouped products': grouped_products, 'captions': captions,
    'digests': digests}
