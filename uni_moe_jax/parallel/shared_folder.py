"""Whether all processes of a run see one folder, into which each writes its part of a checkpoint."""

import errno
import functools
import os
import secrets
import socket
import time

from uni_moe_jax.io import storage
from uni_moe_jax.parallel.distributed import Cluster
from uni_moe_jax.utils.errors import RunError, UsageError, disk_is_full, first_few

_NOT_WRITTEN, _UNAVAILABLE = bytes(16), bytes([1] * 16)  # in place of a token: a mistake of the user, or none
# Of a disk or a network, which may be there again when the same command is repeated.
_PASSING = {errno.EIO, errno.ESTALE, errno.EBUSY, errno.ENOLCK, errno.ENFILE, errno.ENOMEM, errno.ENOTCONN,
            errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}
_TIMEOUT = 30.0  # seconds until a file of another process must be visible; a mounted bucket needs some


def check(cluster: Cluster | None, workdir: str | os.PathLike[str], create: bool, timeout: float = _TIMEOUT) -> None:
  """Checks that every process sees what process 0 writes in `workdir`. The processes call this together.

  Args:
    cluster: that they have joined; None, a single process, passes.
    workdir: of the run.
    create: whether process 0 creates it if it is missing.
    timeout: seconds until every process must see a file that process 0 has written.

  Raises:
    UsageError: a process does not see it, or process 0 may not write it; in every process.
    RunError: process 0 cannot write it now, since its store does not answer or its disk is full; in every process.
  """
  if cluster is None:
    return
  import jax  # pylint: disable=g-import-not-at-top

  from uni_moe_jax.parallel import multihost  # pylint: disable=g-import-not-at-top
  folder, token, reason = storage.path(workdir), _NOT_WRITTEN, f'{workdir}: its own output has the reason.'
  # A new name each time: a file system may remember for a minute that there was no such file.
  path = lambda token: folder / f'.shared-{token.hex()}'
  with multihost.exit_with_peers():
    if jax.process_index() == 0:
      try:
        if create:
          storage.make_folder(folder)
        storage.write_bytes(path(token := secrets.token_bytes(len(_NOT_WRITTEN))), b'')
      except Exception as e:
        in_store = storage.explain(e, str(workdir)) if storage.is_remote(workdir) else None
        if in_store:
          passes = storage.does_not_answer(e)
        elif isinstance(e, OSError):
          passes = e.errno in _PASSING or disk_is_full(e) or isinstance(
              e, (TimeoutError, ConnectionError, BlockingIOError))
        else:
          raise
        token = _UNAVAILABLE if passes else _NOT_WRITTEN
        fix = ('Give a folder where it may write.' if not passes else
               f'{"Free some space" if disk_is_full(e) else "Check that its disk is reachable"}; the same command '
               'continues.')
        reason = in_store or f'{workdir}: {getattr(e, "strerror", None) or e}. {fix}'
    token = multihost.broadcast_bytes_from_primary(token)  # also waits until the file is written
    if token in (_NOT_WRITTEN, _UNAVAILABLE):
      error = UsageError if token == _NOT_WRITTEN else RunError
      raise error(f'process 0 cannot write in workdir {reason}')
    facts = multihost.gather_texts(f'{_appears(path(token), timeout):d}{socket.gethostname()}')
    if jax.process_index() == 0:
      path(token).unlink()
  names = [f'process {i} ({fact[1:]})' for i, fact in enumerate(facts)]
  blind = [name for name, fact in zip(names, facts, strict=True) if fact[0] == '0']
  if blind:
    raise UsageError(
        f'workdir {workdir} is not shared: what {names[0]} writes there does not appear for '
        f'{first_few(blind)} within {timeout:g} s. Every process writes its part of a checkpoint: give all '
        'of them one folder (a bucket, Filestore, NFS), for example --workdir=gs://bucket/run.')


def _appears(path: storage.Path, timeout: float) -> bool:
  end = time.monotonic() + timeout
  look = path.exists if storage.is_remote(path) else functools.partial(os.path.exists, path)
  while not (exists := look()) and time.monotonic() < end:  # False also if it may not look there
    time.sleep(0.2)
  return exists
