"""Subject: captions per second, with cached keys and values and without, against the published code's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.model import decoding
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.initialization import init_params
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.moe.routers import DENSE
from uni_moe_jax.tasks.task_types import TaskType
from uni_moe_jax.tools.bench import machine, uncached_search
from uni_moe_jax.tools.bench.cases import Context
from uni_moe_jax.tools.bench.results_table import Budget, Row
from uni_moe_jax.tools.bench.timing import estimate, interleaved, per_second, ratio

_PUBLISHED = {'attribute': 1.9, DENSE: 3.0}  # captions/s with caches; beam 2, 20 words, batch 8, 4,096 words
_BUDGET = {'attribute': Budget(10, 20, at_most=False)}
_NEVER = -1  # an `eot` that no word is: every caption takes all its steps


def caption_rate(context: Context) -> list[Row]:
  """Greedy and beam 2, both ways."""
  s = context.sizes
  moe, dense = Captioner(context, 'attribute'), Captioner(context, DENSE)
  calls = {(r, beams): functools.partial(captioner.cached, beams)
           for r, captioner in (('attribute', moe), (DENSE, dense)) for beams in (1, 2)}
  slow = {('uncached', beams): functools.partial(moe.uncached, beams) for beams in (1, 2)}
  seconds = interleaved({**calls, **slow}, s.rounds)
  peak = context.peak / machine.RECORDED_PEAK
  note = (f'B {s.small_batch}, {s.words} words each (no caption ends early), {s.vocabulary} words, {s.image_size} px; uncached: '
          'one forward of the whole two-stream caption per word')
  scaled = f'recorded captions/s are scaled by the peak of this run over {machine.RECORDED_PEAK / 1e9:.0f} GFLOP/s'
  rows = []
  for beams, name in ((1, 'greedy'), (2, 'beam 2')):
    for r in _PUBLISHED:
      rows.append(Row('decoding', f'{r}, {name}, cached', per_second(s.small_batch, seconds[r, beams]), 'captions/s',
                      note=note))
    rows.append(Row('decoding', f'attribute, {name}, uncached', per_second(s.small_batch, seconds['uncached', beams]),
                    'captions/s', note=note))
    rows.append(Row('decoding', f'{name}, cached / uncached', ratio(seconds['uncached', beams], seconds['attribute', beams]),
                    'x as fast', note=note))
  for r, recorded in _PUBLISHED.items():
    fast = estimate(s.small_batch / seconds[r, 2] / (recorded * peak))
    rows.append(Row('decoding', f"{r}, beam 2 / the published code's {recorded}", fast, 'x as fast', _BUDGET.get(r), scaled))
  return rows


class Captioner:
  """A fresh caption model and what it is asked."""

  def __init__(self, context: Context, router: str):
    s, run = context.sizes, context.synthetic(context.captions(router))
    self._model, [task], self._spe = UniPerceiver(run.spec.model.spec), run.plan.tasks, run.data.tokenizer.spe
    self._kind, self._temperature, self._length = task.type, task.temperature, task.max_len
    self._params = jax.jit(functools.partial(init_params, self._model))(jax.random.key(run.config.seed))
    rng = np.random.default_rng(0)
    shape = (s.small_batch, 1, s.image_size, s.image_size, run.config.model.channels)
    self._pixels = jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8))
    self._words = normalize(jnp.asarray(rng.normal(size=(s.vocabulary, s.width)), jnp.float32))

  def cached(self, beams: int) -> jax.Array:
    """int32 [B, k, n], by `model.decode`."""
    return _search(self._model, self._kind, self._params, self._pixels, self._words, temperature=self._temperature,
                   spe=self._spe, length=self._length, beams=beams)

  def uncached(self, beams: int) -> np.ndarray:
    """int32 [B, k, n], by `uncached`."""
    def log_p_of(pictures, words, t):
      return uncached_search.next_word(self._model, self._kind, self._params, self._pixels[pictures], self._words, words,
                                jnp.int32(t), temperature=self._temperature, spe=self._spe)
    return uncached_search.search(log_p_of, len(self._pixels), beams=beams, length=self._length, eot=_NEVER)[0]


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=('temperature', 'spe', 'length', 'beams'))
def _search(model: UniPerceiver, kind: TaskType, params, pixels, words, *, temperature, spe, length, beams) -> jax.Array:
  return decoding.beam_search(model, params, kind, pixels, words, temperature=temperature, spe=spe, eot=_NEVER, max_len=length,
                              beam_size=beams).tokens
