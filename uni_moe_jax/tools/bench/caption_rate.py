"""Suite `decoding`: captions per second with and without caches, against the published code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.model import decoding
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.initialization import init_params
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.tasks.router_names import DENSE
from uni_moe_jax.tools.bench import uncached_search
from uni_moe_jax.tools.bench.cases import RECORDED_PEAK, Context
from uni_moe_jax.tools.bench.results_table import Budget, Row
from uni_moe_jax.tools.bench.timing import estimate, interleaved, per_second, ratio

_PUBLISHED = {'attribute': 1.9, DENSE: 3.0}  # captions/s with caches; beam 2, 20 words, batch 8, 4,096 words
_BUDGET = {'attribute': Budget(10, 20, at_most=False)}
_NO_EOT = -1  # no word's id: every caption takes all steps


def caption_rate(context: Context) -> list[Row]:
  """Measure greedy and beam search, cached and uncached."""
  s = context.sizes
  captioners = {router: Captioner(context, router) for router in ('attribute', DENSE)}
  calls = {(router, k): functools.partial(c.cached, k) for router, c in captioners.items() for k in (1, 2)}
  calls |= {('uncached', k): functools.partial(captioners['attribute'].uncached, k) for k in (1, 2)}
  seconds = interleaved(calls, s.rounds)
  note = (f'B {s.small_batch}, {s.words} words each (no caption ends early), {s.vocabulary} words, {s.image_size} px; '
          'uncached: one forward pass of the whole two-stream caption per word')
  rate = lambda name, key: Row('decoding', name, per_second(s.small_batch, seconds[key]), 'captions/s', note=note)
  rows = []
  for k, name in ((1, 'greedy'), (2, 'beam 2')):
    rows += [rate(f'{router}, {name}, cached', (router, k)) for router in captioners]
    rows += [rate(f'attribute, {name}, uncached', ('uncached', k)),
             Row('decoding', f'{name}, cached / uncached', ratio(seconds['uncached', k], seconds['attribute', k]),
                 'x as fast', note=note)]
  scale = context.peak / RECORDED_PEAK
  note = f'recorded captions/s are scaled by the peak of this run over {RECORDED_PEAK / 1e9:.0f} GFLOP/s'
  return rows + [
      Row('decoding', f"{router}, beam 2 / the published code's {recorded}",
          estimate(s.small_batch / seconds[router, 2] / (recorded * scale)), 'x as fast', _BUDGET.get(router), note)
      for router, recorded in _PUBLISHED.items()]


class Captioner:
  """A caption model with random parameters, images and words."""

  def __init__(self, context: Context, router: str):
    s, run = context.sizes, context.synthetic(context.captions(router))
    self._model, [task] = UniPerceiver(run.spec.model.spec), run.plan.tasks
    self._task_type, self._max_len = task.type, task.max_len
    self._options = dict(temperature=task.temperature, spe=run.data.tokenizer.spe)
    self._params = jax.jit(functools.partial(init_params, self._model))(jax.random.key(run.config.seed))
    rng = np.random.default_rng(0)
    shape = (s.small_batch, 1, s.image_size, s.image_size, run.config.model.channels)
    self._pixels = jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8))
    self._words = normalize(jnp.asarray(rng.normal(size=(s.vocabulary, s.width)), jnp.float32))

    def beam_search(params, pixels, words, beam_size):
      return decoding.beam_search(self._model, params, self._task_type, pixels, words, **self._options, eot=_NO_EOT,
                                  max_len=self._max_len, beam_size=beam_size).tokens
    self._beam_search = jax.jit(beam_search, static_argnums=3)

  def cached(self, beam_size: int) -> jax.Array:
    """Return tokens int32 [B, k, n] by `decoding.beam_search`."""
    return self._beam_search(self._params, self._pixels, self._words, beam_size)

  def uncached(self, beam_size: int) -> np.ndarray:
    """Return tokens int32 [B, k, n] by `uncached_search`."""
    def log_probs(images, words, t):
      return uncached_search.next_word(self._model, self._task_type, self._params, self._pixels[images], self._words,
                                       words, jnp.int32(t), **self._options)
    return uncached_search.search(
        log_probs, len(self._pixels), beam_size=beam_size, max_len=self._max_len, eot=_NO_EOT)[0]
