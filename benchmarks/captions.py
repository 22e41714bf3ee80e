"""Captions per second, with caches: greedy and with two beams, and two batches at once as evaluation has them.

  python -m benchmarks.captions --output=captions.json

On the machine of docs/results/performance.md the published code made 1.65 captions a second (attribute, two beams).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases, paired
from uni_moe_jax.eval.batches import two_at_once
from uni_moe_jax.model import decoding
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.uni_perceiver import UniPerceiver, init_params
from uni_moe_jax.tasks.router_names import DENSE

_BATCHES = 9  # of an evaluation
_NO_EOT = -1  # no word's id: every caption takes all steps


def main() -> None:
  options = paired.arguments(__doc__)
  report, sizes = paired.Report(options), cases.sizes(options.quick)
  searches = {router: captioner(sizes, router) for router in (DENSE, 'attribute')}
  for beams in (1, 2):
    report.compare(f'captions, beam size {beams}', {
        router: functools.partial(search, beams) for router, search in searches.items()},
                   work=sizes.batch_size, unit='captions/s')
  report.compare('captions, beam size 2, two batches at once', {
      router: functools.partial(_as_evaluated, search) for router, search in searches.items()},
                 work=_BATCHES * sizes.batch_size, unit='captions/s')
  report.write()


def _as_evaluated(search: Callable[[int], jax.Array]) -> None:
  """Search captions of several batches as evaluation does."""
  for _ in two_at_once(lambda _: search(2).block_until_ready(), range(_BATCHES)):
    pass


def captioner(sizes: cases.Sizes, router: str) -> Callable[[int], jax.Array]:
  """A search, beam size → tokens int32 [B, k, n], of random parameters and images."""
  run = sizes.run(sizes.captions(router))
  model, [task] = UniPerceiver(run.spec.model.spec), run.plan.tasks
  params = jax.jit(functools.partial(init_params, model))(jax.random.key(run.config.seed))
  rng = np.random.default_rng(0)
  shape = (sizes.batch_size, 1, sizes.image_size, sizes.image_size, run.config.model.channels)
  images = jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8))
  vocabulary = normalize(jnp.asarray(rng.normal(size=(sizes.vocabulary, sizes.width)), jnp.float32))

  @functools.partial(jax.jit, static_argnums=3)
  def beam_search(decoder, pixels, vocabulary, beam_size):
    return decoding.beam_search(
        decoder, pixels, vocabulary, temperature=task.temperature, spe=run.data.tokenizer.spe, max_len=task.max_len,
        eot=_NO_EOT, beam_size=beam_size).tokens

  decoder = decoding.Decoder.of(model, params, task.type)  # experts merge once for all images
  return lambda beam_size: beam_search(decoder, images, vocabulary, beam_size)


if __name__ == '__main__':
  main()
