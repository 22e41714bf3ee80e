"""Preparation of many rows: what it takes, and that one that is killed ends like an undisturbed one.

  python -m tests.stress.preparation --num_rows=1000000 --num_workers=1

prints the memory of all processes for every 100,000 rows, and rows/s. The rows name a few shared images.
"""

import argparse
import itertools
import json
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from tests.data import own_files
from tests.helpers import processes

_NUM_IMAGES, _LINES_PER_FILE = 100, 1_000_000
_REPORTED = 100_000  # rows
_PERIOD = 0.5  # seconds between looks at memory


def write_rows(folder: pathlib.Path, num_rows: int) -> pathlib.Path:
  """Rows with a caption, a class of a hundred and a number; every image is in many rows."""
  for i in range(_NUM_IMAGES):
    own_files.write_image(folder / f'images/{i}.png', 'red', i, (16, 16))
  for start in range(0, num_rows, _LINES_PER_FILE):
    with (folder / f'rows-{start // _LINES_PER_FILE:04}.jsonl').open('w') as file:
      for i in range(start, min(start + _LINES_PER_FILE, num_rows)):
        file.write(f'{{"image": "images/{i % _NUM_IMAGES}.png", "caption": "a caption of {i} in a few words", '
                   f'"label": "class {i % 97}", "number": {i}}}\n')
  return folder


def command(source: pathlib.Path, data: pathlib.Path, num_workers: int, *flags: str) -> list[str]:
  return [sys.executable, str(processes.ROOT / 'launch/prepare_data.py'), f'--input={source}', '--name=rows',
          f'--data_dir={data}', f'--num_workers={num_workers}', *flags]


def measure(source: pathlib.Path, data: pathlib.Path, num_workers: int) -> None:
  """Prepares rows, and prints memory and rate."""
  start, reported = time.monotonic(), 0
  work = data / 'own/rows/.1.0.0.unfinished/shards'
  process = subprocess.Popen(command(source, data, num_workers), env=processes.environment(1))
  peak = 0
  while process.poll() is None:
    time.sleep(_PERIOD)
    memory = _memory(process.pid)
    peak = max(peak, memory)
    num_rows = 2000 * sum(1 for _ in work.iterdir()) if work.is_dir() else 0
    if num_rows // _REPORTED > reported // _REPORTED:
      reported = num_rows
      print(f'{num_rows:,} rows: {memory >> 10} MB, {num_rows / (time.monotonic() - start):,.0f} rows/s', flush=True)
  seconds = time.monotonic() - start
  if process.returncode:
    sys.exit(f'the preparation ended with exit code {process.returncode}')
  summary = json.loads((data / 'own/rows/1.0.0/prepared.json').read_text())
  total = sum(summary['splits'].values())
  print(f'{total:,} rows with {num_workers} workers: {seconds:.0f} s, {total / seconds:,.0f} rows/s, at most '
        f'{peak >> 10} MB; {summary["fingerprints"]}', flush=True)


def _memory(pid: int) -> int:
  """kB of a process and its children that no file has."""
  try:
    children = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    own = int(re.search(r'RssAnon:\s+(\d+)', pathlib.Path(f'/proc/{pid}/status').read_text())[1])
  except (OSError, TypeError):
    return 0
  return own + sum(_memory(int(child)) for child in children)


def content(folder: pathlib.Path) -> dict[str, bytes]:
  """The files of a dataset."""
  return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def kills(folder: pathlib.Path, source: pathlib.Path, num_kills: int, seed: int) -> list[str]:
  """Kills preparations at random moments and starts them again; returns how they differ from an undisturbed one."""
  rng, findings = random.Random(seed), []
  run = lambda data: subprocess.Popen(command(source, data, 2), env=processes.environment(1),
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  start, undisturbed = time.monotonic(), folder / 'undisturbed'
  output = (process := run(undisturbed)).communicate()[0]
  duration = time.monotonic() - start
  if process.returncode:
    return [f'the undisturbed preparation: exit code {process.returncode}: {output}']
  expected, killed = content(undisturbed / 'own/rows'), 0
  for attempt in itertools.count():
    data = folder / f'killed_{attempt}'
    while True:
      process = run(data)
      try:
        output = process.communicate(timeout=rng.uniform(0, 1.2 * duration) if killed < num_kills else None)[0]
      except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()  # ends when the workers have ended, too, which have the same pipe
        killed += 1
        versions = data / 'own/rows'
        if not (versions / '1.0.0').is_dir() or (versions / '.1.0.0.unfinished').exists():
          continue  # otherwise it was killed when all was done
      break
    if process.returncode not in (0, -signal.SIGKILL):
      findings.append(f'{data}: exit code {process.returncode}: {output[-500:]}')
    elif (files := content(data / 'own/rows')) != expected:
      findings.append(f'{data}: {sorted(n for n in files.keys() | expected if files.get(n) != expected.get(n))} differ')
    else:
      shutil.rmtree(data)
    if killed >= num_kills:
      return findings


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--num_rows', type=int, default=1_000_000)
  parser.add_argument('--num_workers', type=int, nargs='+', default=[1])
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix='preparation_') as folder:
    source = write_rows(pathlib.Path(folder, 'in'), args.num_rows)
    for i, num_workers in enumerate(args.num_workers):
      data = pathlib.Path(folder, f'data_{i}')
      measure(source, data, num_workers)
      shutil.rmtree(data)


if __name__ == '__main__':
  main()
