"""A worker without a model: answers with the text of each item, and sleeps or dies on command."""

import os
import time
from multiprocessing.connection import Connection

from uni_moe_jax.serve.limits import Limits
from uni_moe_jax.serve.worker import Facts


def main(connection: Connection, folder: str, limits: Limits, cache: str) -> None:
  """Serves jobs as `worker.main` does.

  folder: 'broken' cannot be loaded, 'dead' ends at once, 'uncompiled' is loaded and does not compile, 'slow' takes a
  second to compile, 'killed' is loaded and dies while it compiles, 'fragile' when a request comes; a path is created
  by the first worker, and those that find it die while they compile.
  """
  if folder == 'broken':
    return connection.send(('failed', 'the folder is broken'))
  if folder == 'dead':
    os._exit(3)
  connection.send(('loaded', Facts({}, [], {}, {})))
  if folder == 'uncompiled':
    return connection.send(('failed', 'no program compiles'))
  if folder == 'killed' or os.path.exists(folder):
    os._exit(3)
  if os.path.isabs(folder):
    open(folder, 'x').close()
  time.sleep(folder == 'slow')
  connection.send(('warm', 'task', 'encode', 4))
  if folder == 'fragile':
    connection.recv()
    os._exit(3)
  connection.send(('ready',))
  while True:
    job, _, _, items = connection.recv()
    for item in items:
      if item.text == 'sleep':
        time.sleep(100)
      if item.text == 'crash':
        os._exit(3)
    connection.send(('part', job, {i: f'{item.text}…' for i, item in enumerate(items)}))
    connection.send(('done', job, [item.text for item in items]))
