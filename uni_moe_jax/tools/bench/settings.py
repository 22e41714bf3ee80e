"""Suites and sizes of the benchmark. Cheap to import, so that a mistyped suite is reported at once."""

import dataclasses
import importlib.metadata
import os

from uni_moe_jax.utils import heap
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

SUITES = ('routers', 'mixed', 'published', 'decoding', 'input', 'files', 'compile')
FROM_CONFIG = ('mixed', 'input', 'compile')  # they read the config's own data
TRAINING = ('routers', 'mixed', 'published')  # they take training steps
GPU = 'gpu'  # runs only if it is named: other machines cannot


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of a benchmark."""
  rounds: int = 11  # interleaved, each candidate once per round
  num_layers: int = 12
  width: int = 192
  num_heads: int = 3
  mlp_dim: int = 768
  image_size: int = 224
  patch_size: int = 16
  experts: int = 8
  batch_size: int = 16  # of `routers`
  small_batch: int = 8  # of `published` and `decoding`
  names: int = 1000  # entries of the target set
  name_tokens: int = 8  # of the longest name
  vocabulary: int = 4096  # word ids of captions
  words: int = 20  # length of captions
  gemm: int = 2048  # n of the n × n × n product whose rate is the peak
  compiled_layers: tuple[int, int] = (12, 24)
  steps: int = 10  # batches per round of `input` and `files`, or more where many are ready
  files: int = 256  # image files of a type; of videos half
  own_layers: int = 0  # of the config's model in `mixed` and `input`; 0: the config's own
  mixed_routers: tuple[str, ...] = ()  # of `mixed`, dense first; (): all
  reduced: bool = False  # figures are not judged by the budgets

  @property
  def model(self) -> dict[str, int]:
    """Fields of config.model."""
    return {k: getattr(self, k) for k in ('num_layers', 'width', 'num_heads', 'mlp_dim', 'image_size', 'patch_size')}


FULL = Sizes()
QUICK = Sizes(
    rounds=3, num_layers=2, image_size=96, names=200, vocabulary=1024, words=6, gemm=1024, compiled_layers=(2, 4),
    steps=2, files=64, own_layers=2, mixed_routers=('dense', 'attribute'), reduced=True)


@dataclasses.dataclass(frozen=True)
class GpuSizes(Sizes):
  """Sizes of the suite `gpu`: base/16 on one card, in less than half an hour."""
  rounds: int = 7
  width: int = 768
  num_heads: int = 12
  mlp_dim: int = 3072
  batch_size: int = 128
  small_batch: int = 64  # of captions
  calls: int = 10  # queued for one time, so that the host does not count
  tokens: int = 256 * 197  # of a batch of attention; rows of a grouped product
  lengths: tuple[int, ...] = (197, 589, 1569)  # of attention: one frame, three, eight
  # Of the Triton kernels: rows, columns, contracted, warps, stages.
  tiles: tuple[tuple[int, ...], ...] = (
      (64, 64, 32, 4, 2), (64, 128, 32, 4, 3), (128, 64, 32, 4, 3), (64, 128, 64, 4, 3), (128, 128, 32, 4, 3),
      (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3))


ON_GPU = GpuSizes()
QUICK_ON_GPU = GpuSizes(
    rounds=2, num_layers=2, batch_size=16, small_batch=8, calls=2, vocabulary=1024, words=6, tokens=4 * 197,
    tiles=ON_GPU.tiles[:2], steps=2, reduced=True)


def quick_xla_options() -> dict[str, int | bool]:
  """Return options of XLA that disable optimizations, so that a program compiles in less than half the time.

  An option that the installed XLA does not have would end the process.
  """
  options = {'xla_backend_optimization_level': 0}
  jaxlib = tuple(map(int, importlib.metadata.version('jaxlib').split('.')[:2]))  # without importing it
  return options if jaxlib >= (0, 11) else {**options, 'xla_cpu_use_fusion_emitters': False}


def set_quick_xla_flags() -> None:
  """Set XLA_FLAGS to `quick_xla_options`; call it before JAX is imported."""
  flags = ' '.join(f'--{name}={str(value).lower()}' for name, value in quick_xla_options().items())
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip()


def prepare_heap(suite: str) -> None:
  """Use the heap as `uni-moe train` does, if a suite takes training steps; call it before threads start."""
  heap.keep_memory()
  if suite in TRAINING:
    heap.share_arena()


def share_gpu_memory() -> None:
  """Let the processes of the suite `gpu` use the memory of one card; call it before JAX is imported."""
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'


def choose(names: list[str]) -> tuple[str, ...]:
  """Return the named suites in the benchmark's order, by default all but `gpu`; raises UsageError otherwise."""
  for name in names:
    if name not in (GPU, *SUITES):
      raise UsageError(f'--suites: {name!r} is unknown; {nearest(name, (*SUITES, GPU))}.')
  return tuple(s for s in (GPU, *SUITES) if s in (names or SUITES))
