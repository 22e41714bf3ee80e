"""Checks between the processes of a run: all see one folder, and have one config. Without a cluster, nothing slow."""

import errno
import functools
import json
import os
import secrets
import socket
import time

import ml_collections

from uni_moe_jax.io import hub, storage
from uni_moe_jax.parallel import distributed
from uni_moe_jax.parallel.distributed import Cluster
from uni_moe_jax.train.workdir import differences
from uni_moe_jax.utils.errors import RunError, UsageError, disk_is_full, first_few

_OF_HOST = 'data.dir', 'data.cache_dir', 'data.cache_gb', 'tokenizer.merges_path'  # fields that may differ
_NOT_WRITTEN, _UNAVAILABLE = bytes(16), bytes([1] * 16)  # in place of a token: a mistake of the user, or none
# Of a disk or a network, which may be there again when the same command is repeated.
_PASSING = {errno.EIO, errno.ESTALE, errno.EBUSY, errno.ENOLCK, errno.ENFILE, errno.ENOMEM, errno.ENOTCONN,
            errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}
_TIMEOUT = 30.0  # seconds until a file of another process must be visible; a mounted bucket needs some


def check_config(config: ml_collections.ConfigDict, cluster: Cluster | None) -> None:
  """Compares the configs of all processes, before one writes its own into the work directory.

  Args:
    config: of this process.
    cluster: the processes, which call this together; None, a single one, passes.

  Raises:
    UsageError: another process has another config than process 0; in every process.
  """
  if cluster is None:
    return
  from uni_moe_jax.parallel import multihost  # pylint: disable=g-import-not-at-top
  with multihost.exit_with_peers():
    texts = multihost.gather_texts(json.dumps(config.to_dict(), default=repr))
  first, *others = map(json.loads, texts)
  changed = {str(i): fields for i, other in enumerate(others, 1) if (fields := differences(first, other, _OF_HOST))}
  if changed:
    fields = first_few(next(iter(changed.values())), separator='; ')
    hint = ' Give an address on the Hub its revision.' if hub.SCHEME in fields else ''
    raise UsageError(f'process {", ".join(changed)} of {len(texts)} has another config than process 0 ({fields}). '
                     f'Start the same command, with the same files and package, in all of them.{hint}')


def check_folder(
    cluster: Cluster | None, workdir: str | os.PathLike[str], create: bool, timeout: float = _TIMEOUT) -> None:
  """Checks that all processes see what process 0 writes in `workdir`; each writes its part of a checkpoint there.

  Args:
    cluster: the processes, which call this together; None, a single one, passes.
    workdir: of the run.
    create: whether process 0 creates it if it is missing.
    timeout: seconds until every process must see a file that process 0 has written.

  Raises:
    UsageError: a process does not see it, or process 0 may not write it; in every process.
    RunError: process 0 cannot write it now, since its store does not answer or its disk is full; in every process.
  """
  if cluster is None:
    return
  from uni_moe_jax.parallel import multihost  # pylint: disable=g-import-not-at-top
  folder, token, reason = storage.path(workdir), _NOT_WRITTEN, f'{workdir}: its own output has the reason.'
  # A new name each time: a file system may remember for a minute that there was no such file.
  path = lambda token: folder / f'.shared-{token.hex()}'
  with multihost.exit_with_peers():
    if distributed.is_primary():
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
    if distributed.is_primary():
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
