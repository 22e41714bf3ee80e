"""What is measured at which sizes; cheap to import, so that a mistyped subject is answered at once."""

import dataclasses
import os

from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

# Subject → what it measures. `compile` comes last: a CPU process that has compiled much is slower afterwards.
SUITES = {
    'routers': 'train and inference step of every router against dense, pictures and their names',
    'mixed': 'the mixed step of all tasks of the config, every router against dense',
    'published': "the published setting's train step against the published code's",
    'sets': 'encoding a target set: all rows, the rows that are read, length buckets',
    'decoding': 'captions per second, with and without cached keys and values',
    'exported': 'inference of a merged model against dense and against its experts',
    'input': 'pictures and clips per second of the input pipeline; real-data step against constant-batch step',
    'files': 'pictures and clips per second out of JPEG, PNG and mp4 files',
    'optimizer': "AdamW's share of the step, with and without the clip",
    'compile': 'compile time of the step of all tasks, and how it grows with layers',
}
# They read the config's own data.
FROM_CONFIG = ('mixed', 'input', 'compile')


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of one benchmark.

  Attributes:
    rounds: interleaved rounds, each candidate once per round.
    num_layers, width, num_heads, mlp_dim, image_size, patch_size: of the model (L, D, N, F, pixels, pixels a side).
    experts: E. batch: B of `routers` and `optimizer`. small_batch: B of `published`, `sets` and `decoding`.
    names, name_tokens: entries of the target set, tokens of the longest.
    vocabulary, words: word ids and length of captions.
    gemm: n of the n × n × n product whose rate is the peak.
    compiled_layers: L of the two compiled models.
    steps: batches per round of `input` and `files`. files: pictures of a sort in `files`, of clips an eighth.
    own_layers: L of the config's model in `mixed` and `input`; 0: the config's own.
    mixed_routers: of `mixed`, dense first; (): all that there are.
    reduced: figures are not to be compared with the budgets.
  """
  rounds: int = 11
  num_layers: int = 12
  width: int = 192
  num_heads: int = 3
  mlp_dim: int = 768
  image_size: int = 224
  patch_size: int = 16
  experts: int = 8
  batch_size: int = 16
  small_batch: int = 8
  names: int = 1000
  name_tokens: int = 8
  vocabulary: int = 4096
  words: int = 20
  gemm: int = 2048
  compiled_layers: tuple[int, int] = (12, 24)
  steps: int = 10
  files: int = 256
  own_layers: int = 0
  mixed_routers: tuple[str, ...] = ()
  reduced: bool = False

  @property
  def model(self) -> dict[str, int]:
    """Fields of config.model."""
    return {k: getattr(self, k) for k in ('num_layers', 'width', 'num_heads', 'mlp_dim', 'image_size', 'patch_size')}


FULL = Sizes()
QUICK = Sizes(
    rounds=3, num_layers=2, image_size=96, names=200, vocabulary=1024, words=6, gemm=1024, compiled_layers=(2, 4), steps=2, files=64,
    own_layers=2, mixed_routers=('dense', 'attribute'), reduced=True)


# Most of a quick benchmark would be the compiler's time: without these optimisations a program is ready in half of it.
_QUICK_FLAGS = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'


def set_quick_xla_flags() -> None:
  """Makes programs ready sooner and slower; to be called before JAX is imported."""
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_QUICK_FLAGS}'.strip()


def choose(names: list[str]) -> tuple[str, ...]:
  """The named subjects in their order; all of them where none is named.

  Raises:
    UsageError: a name that is none.
  """
  for name in names:
    if name not in SUITES:
      raise UsageError(f'--suites: {name!r} is unknown; {nearest(name, SUITES)}.')
  return tuple(s for s in SUITES if s in names or not names)
