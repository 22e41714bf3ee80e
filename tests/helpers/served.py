"""A tiny exported folder, and the service on it in a process of its own, at a free port of this machine."""

import base64
import contextlib
import functools
import http.client
import io
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from tests.helpers import fast_compile, processes, small_model, tiny
from uni_moe_jax import config as config_lib

START_TIMEOUT = 300.0  # seconds; a busy machine compiles slowly


@functools.cache
def folder() -> pathlib.Path:
  """An exported model with random parameters and a task of every type; made once per process."""
  from uni_moe_jax.export import artifact, contents
  from uni_moe_jax.train import run as train_run
  c = tiny.config('shape', 'motion', 'text', 'caption', 'pair', 'package', data_dir=tiny.data_dir())
  c.model.num_layers = 1
  c.model.max_text_len = c.tasks.pair.max_len = c.tasks.text.max_len  # as in the quickstart: one limit for all texts
  c.target_sets.answers = config_lib.target_set('glyphs/class', family='words')
  c.tasks.question = config_lib.task(
      'vqa', 'glyphs', batch_size=4, target_set='answers', label_column='class', template='{name} ? <spe> <eot>',
      max_len=12)
  c.evaluators.captions = config_lib.evaluator('caption', 'caption', split='train', beam_size=2, length_penalty=1.0)
  run = train_run.build(c, jax.devices()[:1])
  exported = contents.make_contents(
      run.spec.model.spec, small_model.params(run.spec.model.spec), run.plan, run.data, dtype='float32', num_examples=3)
  path = pathlib.Path(_folder().name) / 'model'
  artifact.write(path, exported, {'name': 'tiny'}, [])
  return path


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
  return tempfile.TemporaryDirectory(prefix='served_')


class Running:
  """A service that runs. output: lines it has printed so far."""

  def __init__(self, process: subprocess.Popen, port: int, output: list[str]):
    self.process, self.port, self.output = process, port, output

  def request(
      self, method: str, path: str, body: Any = None, timeout: float = 60, **headers: str) -> tuple[int, bytes, dict]:
    """Return (status, body, headers). body: bytes as they are, other values as JSON."""
    connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=timeout)
    with contextlib.closing(connection):
      data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
      names = {'Content-Type': 'application/json'} if data is not None else {}
      connection.request(method, path, data, names | {k.replace('_', '-'): v for k, v in headers.items()})
      response = connection.getresponse()
      return response.status, response.read(), {k.lower(): v for k, v in response.getheaders()}

  def post(self, path: str, **body: Any) -> dict[str, Any]:
    """Return the answer, which must have status 200."""
    status, content, _ = self.request('POST', path, body)
    assert status == 200, content
    return json.loads(content)

  def metric(self, name: str) -> float:
    """Return the sum of all metrics whose line starts with a name."""
    lines = self.request('GET', '/metrics')[1].decode().splitlines()
    return sum(float(line.rpartition(' ')[2]) for line in lines if line.startswith(name))

  def worker(self) -> int:
    """Return the process id of the worker: the child that runs Python's spawn."""
    [worker] = [pid for pid in processes.children(self.process.pid)
                if b'spawn_main' in pathlib.Path(f'/proc/{pid}/cmdline').read_bytes()]
    return worker

  def memory(self) -> tuple[int, int]:
    """Return the resident bytes of front and worker."""
    pages = [pathlib.Path(f'/proc/{pid}/statm').read_text().split()[1] for pid in (self.process.pid, self.worker())]
    return tuple(int(n) * os.sysconf('SC_PAGE_SIZE') for n in pages)

  def wait_idle(self) -> None:
    """Wait until the worker has compiled everything: its processor time stands still."""
    ticks = lambda: pathlib.Path(f'/proc/{self.worker()}/stat').read_text().rpartition(')')[2].split()[11:13]
    before, end = None, time.monotonic() + START_TIMEOUT
    while (now := ticks()) != before and time.monotonic() < end:
      before = now
      time.sleep(2)

  def wait_ready(self) -> None:
    """Wait until /healthz reports that the service is ready."""
    end = time.monotonic() + START_TIMEOUT
    while self.request('GET', '/healthz')[0] != 200:
      assert time.monotonic() < end and self.process.poll() is None, self.output
      time.sleep(0.05)


@contextlib.contextmanager
def running(*flags: str, model: pathlib.Path | None = None, **variables: str) -> Iterator[Running]:
  """Start launch/serve.py at a free port, with fast compilation. Kill it at the end if it still runs."""
  env = {**os.environ, 'PYTHONPATH': str(processes.ROOT), 'JAX_PLATFORMS': 'cpu', 'PYTHONUNBUFFERED': '1',
         'XLA_FLAGS': fast_compile.environment_flags(), 'XDG_CACHE_HOME': f'{_folder().name}/cache', **variables}
  command = [sys.executable, 'launch/serve.py', f'--model={model or folder()}', '--port=0', *flags]
  with started(command, processes.ROOT, env) as service:
    yield service


@contextlib.contextmanager
def started(command: Sequence[str], cwd: pathlib.Path, env: Mapping[str, str]) -> Iterator[Running]:
  """Start a command that serves, and wait until it is ready. Kill it at the end if it still runs."""
  process = subprocess.Popen(
      command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  lines, output = queue.Queue(), []

  def read() -> None:
    for line in process.stdout:
      output.append(line)
      lines.put(line)
    lines.put('')

  threading.Thread(target=read, daemon=True).start()
  try:
    while not (line := lines.get(timeout=START_TIMEOUT)).startswith('Open http://'):
      assert line, ''.join(output)
    service = Running(process, int(line.split()[1].rpartition(':')[2]), output)
    service.wait_ready()
    yield service
  finally:
    process.kill()
    process.wait()


def png(pixels: np.ndarray) -> str:
  """Base64 of a PNG of uint8 [H, W] or [H, W, 3]."""
  Image.fromarray(pixels).save(out := io.BytesIO(), 'PNG')
  return base64.b64encode(out.getvalue()).decode()


def images(number: int) -> np.ndarray:
  """Random gray images, uint8 [N, S, S]."""
  shape = number, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE
  return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)
