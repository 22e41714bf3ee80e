"""libtpu's plan of a program: the scheduled instructions and the buffers of their results.

Nine tenths of a libtpu compile turn the plan into machine code, which preflight does not need, and libtpu has no option
to omit that. But XLA can dump the plan, so a subprocess compiles and is killed as soon as the dump is complete.
"""

import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import ml_collections

from uni_moe_jax.preflight.topology import Topology
from uni_moe_jax.utils import signals

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PLAN = '*after_optimizations_after_buffer_assignment.txt'
_BUFFERS = '*after_optimizations-buffer-assignment.txt'
TOO_LARGE = 'too_large.txt'  # the compiler's message for a program that is too large
_ALLOCATION = re.compile(r'^allocation \d+: size (\d+), (.*)$', re.MULTILINE)
_POLL_SECONDS = 0.1
_LOG_CHARACTERS = 4000  # of a failed subprocess, in the error


def is_too_large(error: jax.errors.JaxRuntimeError) -> bool:
  """Return whether a compiler refused a program because it exceeds the device memory."""
  return 'RESOURCE_EXHAUSTED' in str(error)


def plan_program(config: ml_collections.ConfigDict, which: Any, topology: Topology) -> tuple[str, dict[str, float]]:
  """Plan a program of a run on TPUs in a subprocess. which: see `compiled_programs.Which`.

  Returns:
    (text of the scheduled HLO module, bytes on a device as `parse_buffers` returns them).

  Raises:
    JaxRuntimeError: the program needs more memory than the device has; see `is_too_large`.
    RuntimeError: the subprocess failed for another reason.
  """
  with tempfile.TemporaryDirectory() as name:
    folder, log = pathlib.Path(name), pathlib.Path(name) / 'log.txt'
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(_ROOT), os.environ.get('PYTHONPATH', '')])}
    with log.open('wb') as out:
      child = signals.start([sys.executable, '-m', 'uni_moe_jax.preflight.compiled_programs', name], signal.SIGKILL,
                            stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment)
    try:
      with child.stdin as pipe:
        pickle.dump((config.copy_and_resolve_references().to_dict(), which, topology.name), pipe)
      while child.poll() is None and not _is_complete(folder):
        time.sleep(_POLL_SECONDS)
    finally:
      child.kill()
      child.wait()
    if (folder / TOO_LARGE).exists():
      raise jax.errors.JaxRuntimeError((folder / TOO_LARGE).read_text())
    if not _is_complete(folder):
      tail = log.read_text(errors='replace')[-_LOG_CHARACTERS:]
      raise RuntimeError(f'compiling ended with exit code {child.returncode} and no plan: {tail}')
    [text], [buffers] = folder.glob(_PLAN), folder.glob(_BUFFERS)
    return text.read_text(), parse_buffers(buffers.read_text())


def plan_of(compiled: jax.stages.Compiled) -> tuple[str, dict[str, float]]:
  """Return the plan of a program that was compiled completely, with the bytes of its 'code'."""
  sizes = compiled.memory_analysis()
  return compiled.as_text(), {
      'arguments': sizes.argument_size_in_bytes, 'results': sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
      'temporaries': sizes.temp_size_in_bytes, 'code': sizes.generated_code_size_in_bytes}


def parse_buffers(text: str) -> dict[str, float]:
  """Sum the bytes in main memory of {'arguments', 'results', 'temporaries'} in XLA's buffer assignment.

  Results that reuse an argument's buffer do not count, nor other memories, which have a color.
  """
  total = dict(arguments=0., results=0., temporaries=0.)
  for size, what in _ALLOCATION.findall(text):
    if not what.startswith('color'):
      part = 'arguments' if what.startswith('parameter') else 'results' if 'maybe-live-out' in what else 'temporaries'
      total[part] += float(size)
  return total


def _is_complete(folder: pathlib.Path) -> bool:
  """Whether the whole plan is written; XLA writes it after the buffer assignment."""
  for file in folder.glob(_PLAN):
    with file.open('rb') as f:
      f.seek(max(0, file.stat().st_size - 16))
      # Every computation ends with a brace; the last one is the entry.
      return f.read().rstrip().endswith(b'\n}') and b'\nENTRY ' in file.read_bytes()
  return False
