"""A preparation that is killed ends like an undisturbed one."""

import itertools
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

from tests.data import own_files
from tests.helpers import processes

_NUM_IMAGES = 100


def write_rows(folder: pathlib.Path, num_rows: int) -> pathlib.Path:
  """Rows with a caption, a class of a hundred and a number; every image is in many rows."""
  for i in range(_NUM_IMAGES):
    own_files.write_image(folder / f'images/{i}.png', 'red', i, (16, 16))
  (folder / 'rows.jsonl').write_text(''.join(
      f'{{"image": "images/{i % _NUM_IMAGES}.png", "caption": "a caption of {i} in a few words", '
      f'"label": "class {i % 97}", "number": {i}}}\n' for i in range(num_rows)))
  return folder


def content(folder: pathlib.Path) -> dict[str, bytes]:
  """The files of a dataset."""
  return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def kills(folder: pathlib.Path, source: pathlib.Path, num_kills: int, seed: int) -> list[str]:
  """Kills preparations at random moments and starts them again; returns how they differ from an undisturbed one."""
  rng, findings = random.Random(seed), []
  command = [sys.executable, 'launch/prepare_data.py', f'--input={source}', '--name=rows', '--num_workers=2']
  run = lambda data: subprocess.Popen(
      [*command, f'--data_dir={data}'], cwd=processes.ROOT, env=processes.environment(1), stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, text=True)
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
