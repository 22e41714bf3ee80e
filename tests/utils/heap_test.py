"""glibc's heaps, counted by itself (malloc_info) in separate processes, because glibc reads the limit once."""

import ctypes
import subprocess
import sys

import pytest

from tests.helpers import in_process, processes
from uni_moe_jax.utils import heap

_COUNTED = """
import ctypes, sys, threading
from uni_moe_jax.utils import heap
exec(sys.argv[1])
libc, here, go_on = ctypes.CDLL(None), threading.Barrier(5), threading.Event()
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes, libc.fclose.argtypes = (ctypes.c_int, ctypes.c_void_p), (ctypes.c_void_p,)
def take():
  libc.malloc(100_000)
  here.wait()
  go_on.wait()
threads = [threading.Thread(target=take) for _ in range(4)]
for t in threads: t.start()
here.wait()
out = libc.fopen(b'/dev/stdout', b'w')
libc.malloc_info(0, out)
libc.fclose(ctypes.c_void_p(out))
go_on.set()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'malloc_info'), reason='another C library than glibc')
@pytest.mark.parametrize('environment, call, heaps', [
    ({}, '', 5),  # the control: one of the main thread, one of each other
    ({}, 'heap.keep_memory()', 5),
    ({}, 'heap.share_arena()', 1),
    ({'JAX_PLATFORMS': 'cpu'}, 'heap._ACCELERATORS = ("sys",); heap.share_arena()', 1),
    ({}, 'heap._ACCELERATORS = ("no_such_package", "sys"); heap.share_arena()', 5),  # JAX finds an accelerator
    ({'JAX_PLATFORMS': 'cuda'}, 'heap.share_arena()', 5),
    ({'MALLOC_ARENA_MAX': '2'}, 'heap.share_arena()', 2),
])
def test_threads_share_one_heap_where_jax_can_only_use_the_cpu(environment, call, heaps):
  env = {'PYTHONPATH': ':'.join(p for p in sys.path if p), **environment}
  done = subprocess.run([sys.executable, '-c', _COUNTED, call], env=env, capture_output=True, text=True, check=True)
  assert done.stdout.count('<heap nr=') == heaps


def test_threads_of_the_service_share_one_heap(monkeypatch, capfd):
  shared = []
  monkeypatch.setattr(heap, 'share_arena', lambda: shared.append(True))
  assert in_process.run(processes.ROOT / 'launch/serve.py') == 2 and shared == [True]
  assert 'give either --model' in capfd.readouterr().err


_FAULTS = """
import ctypes, resource, sys
from uni_moe_jax.utils import heap
exec(sys.argv[1])
libc, size = ctypes.CDLL(None), int(sys.argv[2])
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_size_t,), (ctypes.c_void_p,)
def use():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  array = libc.malloc(size)
  ctypes.memset(array, 1, size)
  libc.free(array)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
use()
print(use())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'malloc_info'), reason='another C library than glibc')
@pytest.mark.parametrize('call, size, platforms, faults', [
    ('', 1 << 27, 'cpu', True), ('heap.keep_memory()', 1 << 27, 'cpu', False),
    ('heap.keep_memory()', 1 << 27, 'cuda', True),
    ('', 1 << 24, 'cuda', True), ('heap.keep_up_to(1 << 26)', 1 << 24, 'cuda', False),
    ('heap.keep_up_to(1 << 26)', 1 << 27, 'cuda', True)])
def test_freed_memory_serves_the_next_use_without_page_faults(call, size, platforms, faults):
  env = {'PYTHONPATH': ':'.join(p for p in sys.path if p), 'JAX_PLATFORMS': platforms}
  done = subprocess.run([sys.executable, '-c', _FAULTS, call, str(size)], env=env, capture_output=True, text=True,
                        check=True)
  assert (int(done.stdout) > 50) == faults
