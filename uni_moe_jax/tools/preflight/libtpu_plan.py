"""libtpu's plan of a program: the scheduled instructions and the buffers of their results.

Nine tenths of a libtpu compile turn the plan into machine code, which preflight does not need, and libtpu has no option
to omit that. But XLA can dump the plan, so a subprocess compiles and is killed as soon as the dump is complete.
"""

import dataclasses
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import ml_collections

from uni_moe_jax.tools.preflight.topology import Topology

ERROR_FILE = 'too_large.txt'  # the compiler's message for a program that is too large
_ROOT = pathlib.Path(__file__).resolve().parents[3]
_PLAN = '*after_optimizations_after_buffer_assignment.txt'
_BUFFERS = '*after_optimizations-buffer-assignment.txt'
_ALLOCATION = re.compile(r'^allocation \d+: size (\d+), (.*)$', re.MULTILINE)
_POLL_SECONDS = 0.1
_LOG_CHARACTERS = 4000  # of a failed subprocess, in the error


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
  """The plan of a program for one device.

  Attributes:
    text: the scheduled HLO module.
    arguments, results, temporaries: bytes in main memory; results that reuse an argument's buffer are not counted.
    code: bytes of the program; None if it was not made.
  """
  text: str
  arguments: float
  results: float
  temporaries: float
  code: float | None = None


class ProgramTooLarge(Exception):
  """The program needs more memory than the device has; the message is the compiler's."""


def plan_program(config: ml_collections.ConfigDict, which: Any, topology: Topology) -> MemoryPlan:
  """Plan a program of a run in a subprocess.

  Args:
    config: of the run. which: see `compiled_programs.Which`. topology: of TPUs.

  Raises:
    ProgramTooLarge: it does not fit. RuntimeError: the subprocess failed for another reason.
  """
  with tempfile.TemporaryDirectory() as name:
    folder, log = pathlib.Path(name), pathlib.Path(name) / 'log.txt'
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(_ROOT), os.environ.get('PYTHONPATH', '')])}
    with log.open('wb') as out:
      child = subprocess.Popen([sys.executable, '-m', 'uni_moe_jax.tools.preflight.libtpu_process', name],
                               stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment)
    try:
      with child.stdin as pipe:
        pickle.dump((config.copy_and_resolve_references().to_dict(), which, topology.name), pipe)
      while child.poll() is None and not _is_complete(folder):
        time.sleep(_POLL_SECONDS)
    finally:
      child.kill()
      child.wait()
    if (folder / ERROR_FILE).exists():
      raise ProgramTooLarge((folder / ERROR_FILE).read_text())
    if not _is_complete(folder):
      tail = log.read_text(errors='replace')[-_LOG_CHARACTERS:]
      raise RuntimeError(f'compiling ended with exit code {child.returncode} and no plan: {tail}')
    [text], [buffers] = folder.glob(_PLAN), folder.glob(_BUFFERS)
    return MemoryPlan(text.read_text(), **parse_buffers(buffers.read_text()))


def plan_of(compiled: jax.stages.Compiled) -> MemoryPlan:
  """Return the plan of a program that was compiled completely."""
  sizes = compiled.memory_analysis()
  return MemoryPlan(
      compiled.as_text(), sizes.argument_size_in_bytes, sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
      sizes.temp_size_in_bytes, sizes.generated_code_size_in_bytes)


def parse_buffers(text: str) -> dict[str, float]:
  """Sum the bytes of {'arguments', 'results', 'temporaries'} in XLA's buffer assignment.

  Memories with a color, which are not the main memory, do not count.
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
      return f.read().rstrip().endswith(b'}')
  return False
