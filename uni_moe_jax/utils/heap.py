"""Settings of glibc's heap. With other C libraries the functions do nothing.

On CPU, XLA allocates its buffers with malloc. glibc gives every thread an arena of its own, and arrays of a save are
allocated between those of steps. Memory that is free in one arena does not serve another, so that a run of days would
grow by hundreds of MB per hour without using more. Its threads share one arena, then. Threads that compile would wait
for its lock: XLA takes 1.5 times as long with one arena (docs/results/performance.md).
"""

import ctypes
import importlib.util
import os
from collections.abc import Mapping

# Variables of glibc, the options of malloc.h that they set, and values. Freed memory stays in the process, since a step
# allocates it again at once: page faults would take a tenth of a step.
_KEPT = {'MALLOC_MMAP_MAX_': (-4, 0), 'MALLOC_TRIM_THRESHOLD_': (-1, -1), 'MALLOC_TOP_PAD_': (-2, 1 << 28)}
_MAX_MMAP_THRESHOLD = 1 << 25  # glibc takes no larger one
_ONE_ARENA = {'MALLOC_ARENA_MAX': (-8, 1)}
_ACCELERATORS = ('jax_plugins', 'libtpu')  # packages by which JAX finds accelerators


def only_cpu() -> bool:
  """Whether JAX can only use the CPU, by its settings and the installed packages; imports no JAX."""
  platforms = os.environ.get('JAX_PLATFORMS')
  return platforms == 'cpu' if platforms else not any(importlib.util.find_spec(name) for name in _ACCELERATORS)


def keep_memory() -> None:
  """Keep freed memory, if JAX can only use the CPU. Environment variables of glibc take precedence."""
  if only_cpu():
    _set(_KEPT)


def keep_up_to(size: int) -> None:
  """Keep up to `size` bytes of freed memory, of a process without JAX. Variables of glibc take precedence."""
  _set({'MALLOC_TRIM_THRESHOLD_': (-1, size), 'MALLOC_MMAP_THRESHOLD_': (-3, min(size, _MAX_MMAP_THRESHOLD))})


def share_arena() -> None:
  """Let all threads share one arena, if JAX can only use the CPU; see `keep_memory`.

  With an accelerator, XLA's buffers are not in the heap, and threads that read data would contend for the arena. Call
  this before threads start, because glibc reads the limit once.
  """
  if only_cpu():
    _set(_ONE_ARENA)


def _set(options: Mapping[str, tuple[int, int]]) -> None:
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    for variable, (option, value) in options.items():
      if variable not in os.environ:
        mallopt(option, value)


def trim() -> None:
  """Return free pages to the system, also those between used ones."""
  malloc_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if malloc_trim is not None:
    malloc_trim(0)
