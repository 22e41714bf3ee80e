"""Suite `decoding`: captions per second with and without caches, against the published code."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.eval.batches import two_at_once
from uni_moe_jax.model import decoding
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.uni_perceiver import UniPerceiver, init_params
from uni_moe_jax.tasks.router_names import DENSE
from uni_moe_jax.tools.bench import uncached_search
from uni_moe_jax.tools.bench.cases import RECORDED_PEAK, Context
from uni_moe_jax.tools.bench.results_table import Budget, Row
from uni_moe_jax.tools.bench.timing import interleaved

_PUBLISHED = {'attribute': 1.65, DENSE: 2.3}  # captions/s with caches; beam 2, 20 words, batch 8, 4,096 words
_BUDGET = {'attribute': Budget(12, 20, at_most=False)}
_BATCHES = 9  # of an evaluation
_NO_EOT = -1  # no word's id: every caption takes all steps


def caption_rate(context: Context) -> list[Row]:
  """Measure greedy and beam search, cached and uncached."""
  s = context.sizes
  captioners = {router: captioner(context, router) for router in _PUBLISHED}
  searches = {router: cached for router, (cached, _) in captioners.items()} | {'uncached': captioners['attribute'][1]}
  calls = {(name, k): functools.partial(search, k) for name, search in searches.items() for k in (1, 2)}
  calls |= {(name, 'evaluated'): functools.partial(_as_evaluated, cached) for name, (cached, _) in captioners.items()}
  seconds = interleaved(calls, s.rounds)
  note = (f'B {s.small_batch}, {s.words} words each (no caption ends early), {s.vocabulary} words, {s.image_size} px; '
          'experts are merged once, before; uncached: one forward pass of the whole two-stream caption per word')
  rate = lambda name, key: Row('decoding', name, seconds.figure(s.small_batch / seconds[key]), 'captions/s', note=note)
  rows = []
  for k, name in ((1, 'greedy'), (2, 'beam 2')):
    rows += [rate(f'{router}, {name}, cached', (router, k)) for router in captioners]
    rows += [rate(f'attribute, {name}, uncached', ('uncached', k)),
             Row('decoding', f'{name}, cached / uncached',
                 seconds.figure(seconds['uncached', k] / seconds['attribute', k]), 'x as fast', note=note)]
  scale = context.peak / RECORDED_PEAK
  note = f'recorded captions/s are scaled by the peak of this run over {RECORDED_PEAK / 1e9:.0f} GFLOP/s'
  for router, recorded in _PUBLISHED.items():
    one = s.small_batch / seconds[router, 2]
    evaluated = _BATCHES * s.small_batch / seconds[router, 'evaluated']
    rows += [
        Row('decoding', f"{router}, beam 2 / the published code's {recorded}", seconds.figure(one / (recorded * scale)),
            'x as fast', note=note),
        Row('decoding', f"{router}, beam 2, two batches at once / the published code's {recorded}",
            seconds.figure(evaluated / (recorded * scale)), 'x as fast', _BUDGET.get(router),
            f'{_BATCHES} batches as in an evaluation, the first one alone; {note}')]
  return rows


def _as_evaluated(search: Callable[[int], jax.Array]) -> None:
  """Search captions of several batches as evaluation does."""
  for _ in two_at_once(lambda _: search(2).block_until_ready(), range(_BATCHES)):
    pass


def captioner(context: Context, router: str) -> tuple[Callable[[int], jax.Array], Callable[[int], np.ndarray]]:
  """Return searches with and without caches, beam size → tokens int32 [B, k, n], of random parameters and images."""
  s, run = context.sizes, context.synthetic(context.captions(router))
  model, [task] = UniPerceiver(run.spec.model.spec), run.plan.tasks
  options = dict(temperature=task.temperature, spe=run.data.tokenizer.spe)
  limits = dict(max_len=task.max_len, eot=_NO_EOT)
  params = jax.jit(functools.partial(init_params, model))(jax.random.key(run.config.seed))
  rng = np.random.default_rng(0)
  shape = (s.small_batch, 1, s.image_size, s.image_size, run.config.model.channels)
  images = jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8))
  vocabulary = normalize(jnp.asarray(rng.normal(size=(s.vocabulary, s.width)), jnp.float32))

  @functools.partial(jax.jit, static_argnums=3)
  def beam_search(decoder, pixels, vocabulary, beam_size):
    return decoding.beam_search(decoder, pixels, vocabulary, **options, **limits, beam_size=beam_size).tokens

  def log_probs(rows, words, t):
    return uncached_search.next_word(
        model, task.type, params, images[rows], vocabulary, words, jnp.int32(t), **options)

  decoder = decoding.Decoder.of(model, params, task.type)  # once for all images
  cached = lambda beam_size: beam_search(decoder, images, vocabulary, beam_size)
  uncached = lambda beam_size: uncached_search.search(log_probs, len(images), beam_size=beam_size, **limits)[0]
  return cached, uncached
