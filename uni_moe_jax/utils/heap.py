"""Settings of glibc's heap, which fragments over days of a run on CPU. With other C libraries the functions do nothing.

On CPU, XLA allocates its buffers with malloc. glibc gives every thread an arena of its own, and arrays of a save are
allocated between those of steps. Memory that is free in one arena does not serve another, so that a run would grow by
hundreds of MB per hour without using more.
"""

import ctypes
import importlib.util
import os

# Variables of glibc, the options of malloc.h that they set, and values. One arena for all threads; freed memory stays
# in the process, since a step allocates it again at once: page faults would take a tenth of a step.
_OPTIONS = {
    'MALLOC_ARENA_MAX': (-8, 1), 'MALLOC_MMAP_MAX_': (-4, 0), 'MALLOC_TRIM_THRESHOLD_': (-1, -1),
    'MALLOC_TOP_PAD_': (-2, 1 << 28)}
_ACCELERATORS = ('jax_plugins', 'libtpu')  # packages by which JAX finds accelerators


def only_cpu() -> bool:
  """Whether JAX can only use the CPU, by its settings and the installed packages; imports no JAX."""
  platforms = os.environ.get('JAX_PLATFORMS')
  return platforms == 'cpu' if platforms else not any(importlib.util.find_spec(name) for name in _ACCELERATORS)


def configure() -> None:
  """Let all threads share one arena, and keep freed memory, if JAX can only use the CPU.

  Environment variables of glibc take precedence. With an accelerator, XLA's buffers are not in the heap, and threads
  that read data would contend for the arena. Call this before threads start, because glibc reads the limit once.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if only_cpu() and mallopt is not None:
    for variable, (option, value) in _OPTIONS.items():
      if variable not in os.environ:
        mallopt(option, value)


def trim() -> None:
  """Return free pages to the system, also those between used ones."""
  malloc_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if malloc_trim is not None:
    malloc_trim(0)
