"""What libtpu plans for a program: its instructions in their order, and where in memory their results lie.

Nine tenths of a compile make the chip's own code of that plan, about which preflight asks nothing, and libtpu has no way to leave it out.
But XLA writes the plan down when it is asked to. So another process compiles, and is stopped as soon as the plan lies there.
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

_ROOT = pathlib.Path(__file__).resolve().parents[3]
REFUSED = 'refused.txt'  # what the compiler said of a program that is too large
_PLAN, _PLACES = '*after_optimizations_after_buffer_assignment.txt', '*after_optimizations-buffer-assignment.txt'
_ALLOCATION = re.compile(r'^allocation \d+: size (\d+), (.*)$', re.MULTILINE)
_POLL = 0.1  # seconds
_LAST_WORDS = 4000  # characters of what a process said that failed


@dataclasses.dataclass(frozen=True)
class Plan:
  """Of one device.

  Attributes:
    text: the scheduled module.
    arguments, results, temporaries: bytes in the device's main memory; of results those that take no argument's place.
    code: of the program; None where it was not made.
  """
  text: str
  arguments: float
  results: float
  temporaries: float
  code: float | None = None


class Refused(Exception):
  """The program needs more memory than the device has; as the compiler says it."""


def plan(config: ml_collections.ConfigDict, which: Any, where: Topology) -> Plan:
  """The plan of a program of a run.

  Args:
    config: of the run. which: see `programs.lowered`. where: TPUs.

  Raises:
    Refused: it does not fit. RuntimeError: the other process failed otherwise.
  """
  with tempfile.TemporaryDirectory() as name:
    folder, said = pathlib.Path(name), pathlib.Path(name) / 'said.txt'
    with said.open('wb') as out:
      environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(_ROOT), os.environ.get('PYTHONPATH', '')])}
      child = subprocess.Popen([sys.executable, '-m', 'uni_moe_jax.tools.preflight.libtpu_process', name], stdin=subprocess.PIPE, stdout=out,
                               stderr=out, env=environment)
    try:
      with child.stdin as pipe:
        pickle.dump((config.copy_and_resolve_references().to_dict(), which, where.name), pipe)
      while child.poll() is None and not _whole(folder):
        time.sleep(_POLL)
    finally:
      child.kill()
      child.wait()
    if (folder / REFUSED).exists():
      raise Refused((folder / REFUSED).read_text())
    if not _whole(folder):
      last = said.read_text(errors='replace')[-_LAST_WORDS:]
      raise RuntimeError(f'compiling ended with exit code {child.returncode} and no plan: {last}')
    [text], [places] = folder.glob(_PLAN), folder.glob(_PLACES)
    return Plan(text.read_text(), **places_of(places.read_text()))


def of_compiled(compiled: jax.stages.Compiled) -> Plan:
  """The plan of a program that was compiled to its end."""
  sizes = compiled.memory_analysis()
  return Plan(compiled.as_text(), sizes.argument_size_in_bytes, sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
              sizes.temp_size_in_bytes, sizes.generated_code_size_in_bytes)


def places_of(text: str) -> dict[str, float]:
  """{'arguments', 'results', 'temporaries'} in bytes, of XLA's account of its buffers. Colours are memories beside the main one."""
  found = dict(arguments=0., results=0., temporaries=0.)
  for size, what in _ALLOCATION.findall(text):
    if not what.startswith('color'):
      kind = 'arguments' if what.startswith('parameter') else 'results' if 'maybe-live-out' in what else 'temporaries'
      found[kind] += float(size)
  return found


def _whole(folder: pathlib.Path) -> bool:
  """Whether the plan lies there to its end; it is written after the account of the buffers."""
  for file in folder.glob(_PLAN):
    with file.open('rb') as f:
      f.seek(max(0, file.stat().st_size - 16))
      return f.read().rstrip().endswith(b'}')
  return False
