"""Settings of glibc's heap, which fragments over days of a run on CPU. With other C libraries the functions do nothing.

On CPU, XLA allocates its buffers with malloc. glibc gives every thread an arena of its own, and arrays of a save are
allocated between those of steps. Memory that is free in one arena does not serve another, so that a run would grow by
hundreds of MB per hour without using more.
"""

import ctypes
import importlib.util
import os

_M_ARENA_MAX = -8  # of malloc.h
_ACCELERATORS = ('jax_plugins', 'libtpu')  # packages by which JAX finds accelerators


def use_single_arena() -> None:
  """Let all threads share one arena if JAX can only use the CPU. The variable MALLOC_ARENA_MAX takes precedence.

  With an accelerator, XLA's buffers are not in the heap, and threads that read data would contend for the arena. Call
  this before threads start, because glibc reads the limit once.
  """
  platforms = os.environ.get('JAX_PLATFORMS')
  on_cpu = platforms == 'cpu' if platforms else not any(importlib.util.find_spec(name) for name in _ACCELERATORS)
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if on_cpu and mallopt is not None and 'MALLOC_ARENA_MAX' not in os.environ:
    mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
  """Return free pages to the system, also those between used ones."""
  malloc_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if malloc_trim is not None:
    malloc_trim(0)
