"""glibc's heap, which a run on CPU would fill with holes, for days; with another C library nothing happens here.

There, XLA's buffers come from malloc. glibc gives threads heaps of their own, and arrays of a save lie between those of steps: what is
free in one heap does not serve another, and a run would grow by hundreds of megabytes an hour without holding more.
"""

import ctypes
import importlib.util
import os

_M_ARENA_MAX = -8  # of malloc.h
_ACCELERATORS = ('jax_plugins', 'libtpu')  # packages through which JAX finds some


def use_single_arena() -> None:
  """All threads take from one heap, where JAX can only use the CPU; MALLOC_ARENA_MAX of the environment comes first.

  Elsewhere XLA's buffers are not in the heap, and many threads that read data would wait for each other. To be called before threads
  are started: glibc looks at the limit once.
  """
  platforms = os.environ.get('JAX_PLATFORMS')
  on_cpu = platforms == 'cpu' if platforms else not any(importlib.util.find_spec(name) for name in _ACCELERATORS)
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if on_cpu and mallopt is not None and 'MALLOC_ARENA_MAX' not in os.environ:
    mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
  """Free pages between used ones go back to the system."""
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if trim is not None:
    trim(0)
