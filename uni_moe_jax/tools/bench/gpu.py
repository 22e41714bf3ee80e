"""Suite `gpu`: everything that only a GPU can show, on one card, in less than half an hour.

Each section runs in a process of its own: it ends at its time limit, and a kernel that breaks the card's state breaks
no other section. What fails is a row with its message.
"""

import dataclasses
import multiprocessing
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection

import jax

from uni_moe_jax.tools.bench import gpu_sections, settings
from uni_moe_jax.tools.bench.cases import Context
from uni_moe_jax.tools.bench.gpu_sections import NotAvailableError, row
from uni_moe_jax.tools.bench.results_table import FAILED, Row
from uni_moe_jax.tools.bench.settings import GpuSizes
from uni_moe_jax.utils import signals

_MINUTES = {'models': 12, 'attention': 2, 'grouped products': 7, 'captions': 3}
_DIGEST_MINUTES = 2  # of each of two processes
_MESSAGE = 300  # characters of an error


def on_gpu(context: Context) -> list[Row]:
  """Measure every section on the first device."""
  sizes = settings.QUICK_ON_GPU if context.sizes.reduced else settings.ON_GPU
  rows = [r for section, minutes in _MINUTES.items() for r in in_process(section, sizes, minutes)]
  return rows + same_bits(*(in_process('digests', sizes, _DIGEST_MINUTES) for _ in range(2)))


def same_bits(first: list[Row], second: list[Row]) -> list[Row]:
  """Compare the digests of two processes; rows without one stay as they are."""
  failed = [r for r in first + second if r.figure is None]
  digests = {r.name: r for r in second}
  rows = []
  for r in first:
    if r.figure is not None and r.name in digests and digests[r.name].figure is not None:
      same = r.note == digests[r.name].note
      note = f'SHA-256 of all parameters in two processes: {r.note}' + ('' if same else f', {digests[r.name].note}')
      rows.append(dataclasses.replace(r, note=note) if same else row(r.name, None, '', note=note, missing=FAILED))
  return rows + failed


def in_process(section: str, sizes: GpuSizes, minutes: float) -> list[Row]:
  """Return the rows of a section, which a new process measures; a last one reports a time limit or a crash."""
  spawn, start, rows = multiprocessing.get_context('spawn'), time.monotonic(), []
  receiver, sender = spawn.Pipe(duplex=False)
  process = spawn.Process(target=_send_rows, args=(section, sizes, sender), daemon=True)
  process.start()
  sender.close()
  try:
    while receiver.poll(max(0, 60 * minutes + start - time.monotonic())):
      rows.append(receiver.recv())
    rows.append(row(section, None, '', note=f'ended at its limit of {minutes} minutes', missing=FAILED))
  except EOFError:
    process.join()
    if process.exitcode:
      note = f'the process ended with code {process.exitcode}; its output is in the terminal'
      rows.append(row(section, None, '', note=note, missing=FAILED))
  finally:
    process.kill()
    process.join()
  print(f'{section} {time.monotonic() - start:.0f} s,', end=' ', file=sys.stderr, flush=True)
  return rows


def _send_rows(section: str, sizes: GpuSizes, sender: Connection) -> None:
  signals.end_with_parent(multiprocessing.parent_process().pid, signal.SIGKILL)
  context = Context(sizes, None, 'bfloat16', 0., jax.devices()[:1])
  for measurement in gpu_sections.SECTIONS[section](context):
    for r in attempt(*measurement):
      sender.send(r)


def attempt(name: str, measure: gpu_sections.Measure) -> list[Row]:
  """Return the rows of a measurement, or one that says why there are none."""
  try:
    return measure()
  except Exception as e:  # pylint: disable=broad-exception-caught
    missing = {ImportError: 'not installed', NotAvailableError: 'not available'}
    reason = next((text for error, text in missing.items() if isinstance(e.__cause__ or e, error)), FAILED)
    if reason == FAILED:
      traceback.print_exc()
    return [row(name, None, '', note=gpu_sections.describe(e, _MESSAGE), missing=reason)]
