"""The lock of a folder: of several processes, on one host or many, one has it.

On a disk it is the kernel's lock of a file, which ends with its process. In a bucket it is an object that is created
only if absent, and that its owner rewrites every few seconds. Locks of a bucket are numbered, and the newest one
counts: who creates the next number has taken over, which only one process can. An owner that has ended says so in its
object; one that has died stops rewriting it.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time

from uni_moe_jax.io import storage
from uni_moe_jax.utils.exit_codes import ERROR

FILE = '.lock'  # in the folder; in a bucket, a folder of objects
_PERIOD = 15.0  # seconds between two heartbeats of an owner
_MISSED = 4  # heartbeats after which it counts as dead
_DIGITS = 6


def lock(folder: str | os.PathLike[str], stack: contextlib.ExitStack, period: float = _PERIOD) -> str | None:
  """Lock a folder until `stack` closes or the process ends.

  Two trainers in one directory would delete each other's checkpoints. A file system without locks is noted, and nothing
  is locked.

  Args:
    folder: that exists, or a place in a bucket.
    stack: whose end releases the lock.
    period: seconds between two heartbeats; a bucket's owner without `_MISSED` of them counts as dead.

  Returns:
    The owner, if another process has it; None: this process has.
  """
  folder = storage.path(folder)
  return _lock_objects(folder / FILE, stack, period) if storage.is_remote(folder) else _lock_file(folder / FILE, stack)


def _lock_file(path: storage.Path, stack: contextlib.ExitStack) -> str | None:
  # A folder was copied from a bucket. No number is the name of a file in it, so that it may be copied back.
  file = stack.enter_context(open(path / 'file' if path.is_dir() else path, 'a'))
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return 'another process'
  except OSError as e:
    print(f'note: {path.parent} cannot be locked ({e.strerror}); make sure that no other process writes '
          'there.', file=sys.stderr, flush=True)
  return None


def _lock_objects(folder: storage.Path, stack: contextlib.ExitStack, period: float) -> str | None:
  number = _newest(folder)
  if number and (owner := _living_owner(folder, number, period)):
    return owner
  mine = _ObjectLock(folder, number + 1, period)
  if not mine.acquire():
    return _read(folder, number + 1).get('owner', 'another process')
  stack.callback(mine.release)
  return None


def _living_owner(folder: storage.Path, number: int, period: float) -> str:
  """Return the owner of a lock, as soon as it shows that it lives; '' if it has ended, or has not in time."""
  first, end = _read(folder, number), time.monotonic() + _MISSED * period
  if not first.get('released', not first):
    print(f'note: {folder.parent} is locked by {first["owner"]}; waiting up to {_MISSED * period:g} s for a sign of '
          'life.', file=sys.stderr, flush=True)
    while time.monotonic() < end:
      time.sleep(period / 5)
      if (content := _read(folder, number)) != first:
        return '' if content.get('released', not content) else content['owner']
  return ''


def _newest(folder: storage.Path) -> int:
  """Return the highest number of a lock; 0 if there is none."""
  return max((int(name) for name in storage.files_in(folder) if name.isdecimal()), default=0)


def _read(folder: storage.Path, number: int) -> dict:
  """Return the content of a lock; {} if it was removed, because there is a newer one."""
  try:
    return json.loads(storage.read_bytes(folder / f'{number:0{_DIGITS}}'))
  except FileNotFoundError:
    return {}


class _ObjectLock:
  """A numbered lock in a bucket, with the thread that renews it."""

  def __init__(self, folder: storage.Path, number: int, period: float):
    self._folder, self._number, self._period = folder, number, period
    self._path = folder / f'{number:0{_DIGITS}}'
    self._owner = f'{socket.gethostname()}, process {os.getpid()}'
    self._token, self._beats, self._ended = secrets.token_hex(8), 0, threading.Event()
    self._thread = threading.Thread(target=self._renew, name='heartbeat', daemon=True)

  def acquire(self) -> bool:
    """Create the lock. False if another process was faster."""
    if not storage.create(self._path, self._content()):
      return False
    # One that has looked for the newest number long ago may create a number that was used, and removed, since.
    if (newest := _newest(self._folder)) != self._number:
      self._path.unlink(missing_ok=True)
      return False
    for number in range(1, newest):
      (self._folder / f'{number:0{_DIGITS}}').unlink(missing_ok=True)
    self._thread.start()
    return True

  def release(self) -> None:
    """Say that the owner has ended. The object stays, so that its number is not used again."""
    self._ended.set()
    self._thread.join()
    with contextlib.suppress(Exception):  # then the next owner waits for heartbeats that do not come
      storage.write_bytes(self._path, self._content(released=True))

  def _content(self, released: bool = False) -> bytes:
    return json.dumps({'owner': self._owner, 'token': self._token, 'beat': self._beats, 'released': released}).encode()

  def _renew(self) -> None:
    while not self._ended.wait(self._period):
      self._beats += 1
      try:
        if _newest(self._folder) != self._number:
          break
        storage.write_bytes(self._path, self._content())
      except Exception as e:  # the store does not answer: the next heartbeat may succeed
        print(f'warning: the lock of {self._folder.parent} could not be renewed ({type(e).__name__}: {e}).',
              file=sys.stderr, flush=True)
    else:
      return
    print(f'\nerror: another process has taken over {self._folder.parent}, because this one has not renewed its lock '
          f'for {_MISSED * self._period:g} s. Nothing more is written.', file=sys.stderr, flush=True)
    os._exit(ERROR)  # at once: a save may be under way
