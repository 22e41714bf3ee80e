"""Suites and sizes of the benchmark. Cheap to import, so that a mistyped suite is reported at once."""

import dataclasses
import os

from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

# Suite → what it measures. `compile` is last: a CPU process that has compiled much is slower afterwards.
SUITES = {
    'routers': 'training and inference step of every router against dense, images and their names',
    'mixed': 'step of all tasks of the config, every router against dense',
    'published': "training step of the published setting against the published code's",
    'decoding': 'captions per second, with and without cached keys and values',
    'input': 'images and videos per second of the input pipeline; step on real batches against one constant batch',
    'files': 'images and videos per second from JPEG, PNG and mp4 files',
    'compile': 'compile time of the step of all tasks, and its growth with layers',
}
FROM_CONFIG = ('mixed', 'input', 'compile')  # they read the config's own data


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of a benchmark.

  Attributes:
    rounds: interleaved rounds, each candidate once per round.
    num_layers, width, num_heads, mlp_dim, image_size, patch_size: of the model (L, D, N, F, pixels, pixels per side).
    experts: E. batch_size: B of `routers`. small_batch: B of `published` and `decoding`.
    names, name_tokens: entries of the target set, tokens of the longest.
    vocabulary, words: word ids and length of captions.
    gemm: n of the n × n × n product whose rate is the peak.
    compiled_layers: L of the two compiled models.
    steps: batches per round of `input` and `files`. files: number of image files of a type in `files`; of videos an
      eighth.
    own_layers: L of the config's model in `mixed` and `input`; 0: the config's own.
    mixed_routers: of `mixed`, dense first; (): all.
    reduced: figures are not judged by the budgets.
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
    rounds=3, num_layers=2, image_size=96, names=200, vocabulary=1024, words=6, gemm=1024, compiled_layers=(2, 4),
    steps=2, files=64, own_layers=2, mixed_routers=('dense', 'attribute'), reduced=True)


def set_quick_xla_flags() -> None:
  """Disable optimizations of the compiler, which halves its time; call it before JAX is imported."""
  flags = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip()


def choose(names: list[str]) -> tuple[str, ...]:
  """Return the named suites in the benchmark's order; by default all.

  Raises:
    UsageError: an unknown name.
  """
  for name in names:
    if name not in SUITES:
      raise UsageError(f'--suites: {name!r} is unknown; {nearest(name, SUITES)}.')
  return tuple(s for s in SUITES if s in names or not names)
