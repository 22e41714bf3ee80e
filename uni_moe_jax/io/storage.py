"""Paths that may be addresses: a local path, gs://BUCKET/NAME, s3://BUCKET/NAME or hf:OWNER/NAME@REVISION (see `hub`).

A bucket has no folders that are created or renamed: a folder exists while an object has its name as a prefix. One
object is written at once or not at all. gcsfs and s3fs repeat requests that fail for a moment (429, 5xx, resets, time
limits, truncated bodies), with longer and longer pauses.
"""

import base64
import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

from etils import epath

from uni_moe_jax.io import hub
from uni_moe_jax.utils.errors import RunError, UsageError, chain
from uni_moe_jax.utils.suggest import nearest

os.environ['EPATH_USE_TF'] = 'false'  # TensorFlow's own reader of buckets is not in its packages
Path = pathlib.Path | epath.Path
_PACKAGES = {'gs': ('gcsfs', 'gcs'), 's3': ('s3fs', 's3')}  # scheme → package, extra that installs it
_BUCKET = re.compile(r'[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]')
_LEFTOVER = re.compile(r'\.[0-9a-f]{16}\.tmp')
_UNFIT = re.compile(r'[\x00-\x1f\x7f#?*\[\]\\]|\s')  # patterns and versions for some libraries
_CONNECT_TIMEOUT, _READ_TIMEOUT = 20, 60  # seconds without any progress until a request is repeated
_ATTEMPTS = 8
_PAGE = 1000  # objects of a request for a listing; the most that GCS returns
_PAUSES = 1.0, 2.0, 4.0  # seconds until credentials are looked for again
_COPY_PERIOD = 30.0  # seconds; GCS refuses more than one write of an object per second
_CREDENTIALS = {
    'gs': 'Run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS to the key of a service '
          'account',
    's3': 'Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run aws sso login'}
# (what 'TYPE: MESSAGE' of an error of a library matches, what that means), tried in order.
_ERRORS = (
    (r'Anonymous caller|HttpError: .*, 401$|Invalid Credentials|UNAUTHENTICATED: |^(Refresh|DefaultCredentials)Error|'
     r'^TokenRetrievalError|^SSOTokenLoadError|^NoCredentialsError|(?i:token .*expired|ExpiredToken|InvalidAccessKeyId|'
     r'SignatureDoesNotMatch|access key id you provided)',
     _NO_CREDENTIALS := 'the credentials are missing or have expired. {credentials}'),
    (r'^OSError: Forbidden: |HttpError: .*, 403$|PERMISSION_DENIED: |^PermissionError: |\((AccessDenied|403)\) when',
     'permission is denied. Give the account the right to list, read, write and delete objects in this bucket'),
    (r'NoSuchBucket|bucket does not exist', 'the bucket does not exist. Check its name, or create it'),
    (r'^(Client(Connector|OS|Payload)|EndpointConnection|(Server|Socket|Connection|Connect|Read|FS)Timeout|'
     r'ServerDisconnected|IncompleteRead|ConnectionClosed|Proxy)\w*: |HttpError: .*, (408|429|5\d\d)$|'
     r'\((SlowDown|ServiceUnavailable|InternalError|429|5\d\d)\) when|'
     r'(UNAVAILABLE|DEADLINE_EXCEEDED): .*(gs|s3|https?)://',
     _NO_ANSWER := 'the store does not answer, or only with errors, also to repeated requests. Check the network; the '
     'same command continues'))


def is_remote(address: str | os.PathLike[str]) -> bool:
  """Return whether an address is one of a bucket."""
  return str(address).startswith(tuple(f'{scheme}://' for scheme in _PACKAGES))


def path(address: str | os.PathLike[str], name: str = 'path') -> Path:
  """Return the path of an address: a `pathlib.Path`, or an `epath.Path` in a bucket, from which nothing is read.

  Args:
    address: a local path, gs://BUCKET/NAME or s3://BUCKET/NAME; a slash at its end is ignored. hf:OWNER/NAME@REVISION
      is downloaded, and the path is that of the copy. A string may start with ~, which shells leave as it is in
      --flag=~/folder.
    name: of the flag or field, for errors.

  Raises:
    UsageError: the scheme, the bucket or the name cannot be one, or the package for the scheme is not installed.
  """
  text = os.fspath(address)
  if isinstance(address, pathlib.PurePath) and not re.match('(gs|s3):/', text):
    return pathlib.Path(address)
  if text.startswith(hub.SCHEME):
    return hub.folder(text, name)
  wrong = functools.partial(_wrong, text, name)
  if typo := re.match(r'(?!(?:gs|s3)://)\s*(gs|s3)(?::|//)', text):
    raise wrong(f'is no address of a bucket; write {typo[1]}://BUCKET/NAME')
  matches = re.match(r'([A-Za-z][\w+.-]*)://(.*)', text, re.DOTALL)
  if matches is None:
    return pathlib.Path(os.path.expanduser(text))
  scheme, rest = matches.groups()
  if scheme not in _PACKAGES:
    raise wrong(f'has the unknown scheme {scheme!r}; {nearest(scheme, _PACKAGES)}, or a local path')
  bucket, _, key = rest.rstrip('/').partition('/')
  if not bucket:
    raise wrong(f'lacks the name of a bucket; write {scheme}://BUCKET/NAME')
  if not _BUCKET.fullmatch(bucket):
    raise wrong(f'has the bucket {bucket!r}, but a bucket is named with 3 to 222 of a-z, 0-9, dot, hyphen and '
                'underscore')
  parts = key.split('/') if key else []
  if {'..', '.', ''} & {*parts}:
    raise wrong('has an empty name, . or .. between slashes, which a bucket takes literally; write the name in full')
  if unfit := _UNFIT.search(key):
    raise wrong(f'has the character {unfit[0]!r}; give a name without spaces and without # ? * [ ] \\')
  package, extra = _PACKAGES[scheme]
  if importlib.util.find_spec(package) is None:
    raise wrong(f"needs the package {package}: pip install 'uni-moe-jax[{extra}]'")
  _configure(scheme)
  return epath.Path(f'{scheme}://{bucket}', *parts)


def absolute(address: str | os.PathLike[str]) -> Path:
  """Return `path`, independent of the current folder."""
  return path(address) if is_remote(address) else path(address).absolute()


def _wrong(address: str, name: str, what: str) -> UsageError:
  return UsageError(f'{name}={address!r} {what}.')


@functools.cache
def _configure(scheme: str) -> None:
  """Set what all users of the libraries in this process share, Orbax and TensorFlow Datasets among them."""
  import aiohttp  # pylint: disable=g-import-not-at-top
  import fsspec.config  # pylint: disable=g-import-not-at-top
  for name in ('gcsfs', 'fsspec'):  # they log the traceback of what they raise
    logging.getLogger(name).setLevel(logging.CRITICAL)
  # Zonal buckets: gcsfs would query another service about every bucket, over gRPC, and wait where it is not reachable.
  os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT, sock_read=_READ_TIMEOUT)
  # Listings are not kept: other processes write, too.
  fsspec.config.conf.setdefault('gs', {}).update(use_listings_cache=False, requests_timeout=timeout)
  fsspec.config.conf.setdefault('s3', {}).update(use_listings_cache=False, config_kwargs=dict(
      connect_timeout=_CONNECT_TIMEOUT, read_timeout=_READ_TIMEOUT,
      retries=dict(mode='standard', max_attempts=_ATTEMPTS)))
  if scheme == 's3':  # answers without a body have a status that botocore does not repeat by itself
    from s3fs import core  # pylint: disable=g-import-not-at-top
    core.set_custom_error_handler(lambda e: re.search(r'\((429|5\d\d)\) when calling', str(e)) is not None)


def filesystem(address: str | os.PathLike[str]) -> Any:
  """Return the fsspec file system of a remote address."""
  import fsspec  # pylint: disable=g-import-not-at-top
  scheme = str(address).partition(':')[0]
  _configure(scheme)
  return fsspec.filesystem(scheme)


def split(address: str | os.PathLike[str]) -> tuple[str, str]:
  """Return (bucket, name in it) of a remote address."""
  bucket, _, key = str(address).partition('://')[2].partition('/')
  return bucket, key


def check_access(folder: Path, name: str, pauses: Sequence[float] = _PAUSES) -> None:
  """Check that a remote folder can be listed; one request.

  Args:
    folder: to list; one of a disk passes.
    name: of the flag or field whose value it is.
    pauses: seconds until credentials that are missing are looked for again, one after the other.

  Raises:
    UsageError: it cannot. RunError: the store does not answer.
  """
  if not is_remote(folder):
    return
  for pause in pauses:  # on a machine that has just started, the server of its credentials may start later
    try:
      return _list(folder, name)
    except UsageError as e:
      if _meaning(e) != _NO_CREDENTIALS:
        raise
    time.sleep(pause)
    type(filesystem(folder)).clear_instance_cache()  # which keeps the credentials that it has found
  _list(folder, name)


def _list(folder: Path, name: str) -> None:
  """See `check_access`."""
  files, (bucket, key) = filesystem(folder), split(folder)
  try:
    if str(folder).startswith('gs:'):
      files.call('GET', 'b/{}/o', bucket, prefix=key, maxResults=1, json_out=True)
    else:
      files.call_s3('list_objects_v2', Bucket=bucket, Prefix=key, MaxKeys=1)
  except FileNotFoundError:
    raise _wrong(str(folder), name, f'names the bucket {bucket!r}, which does not exist; check its name, or create '
                                    'it') from None
  except Exception as e:
    if (reason := explain(e, str(folder))) is None:
      raise
    raise (RunError if does_not_answer(e) else UsageError)(f'{name}={reason}') from e


def explain(e: BaseException | None, address: str) -> str | None:
  """Return one sentence with the address if an exception, or one that caused it, is of a store; else None."""
  if (meaning := _meaning(e)) is None:
    return None
  return f'{address}: {meaning.format(credentials=_CREDENTIALS.get(address.partition(":")[0], ""))}.'


def does_not_answer(e: BaseException | None) -> bool:
  """Return whether an exception, or one that caused it, is of a store that does not answer, so that waiting helps."""
  return _meaning(e) == _NO_ANSWER


def _meaning(e: BaseException | None) -> str | None:
  texts = [f'{type(c).__name__}: {c}' for c in chain(e) if not isinstance(c, UsageError)]
  return next((meaning for pattern, meaning in _ERRORS if any(re.search(pattern, text) for text in texts)), None)


def write_bytes(target: Path, content: bytes) -> None:
  """Write a file or an object atomically; of several writers one is the last.

  A process that is killed leaves the old content, and on a disk perhaps a hidden file, see `is_leftover`.
  """
  if is_remote(target):
    filesystem(target).pipe_file(str(target), content)
    return
  temporary = target.with_name(f'.{secrets.token_hex(8)}.tmp')  # of this call alone: another may write the same file
  try:
    temporary.write_bytes(content)
    temporary.rename(target)
  except BaseException as e:
    if isinstance(e, OSError):  # a full disk names no file, other errors the temporary one
      e.filename = str(target)
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise


def is_leftover(file: Path) -> bool:
  """Return whether a file is one that `write_bytes` had begun when its process was killed; it may be deleted."""
  return _LEFTOVER.fullmatch(file.name) is not None


def read_bytes(target: Path) -> bytes:
  """Read what one `write_bytes` wrote. A file object of a bucket needs two requests, and another may be between."""
  return filesystem(target).cat_file(str(target)) if is_remote(target) else target.read_bytes()


def move_file(source: str | os.PathLike[str], target: Path) -> None:
  """Move a local file, on the same disk atomically, or into a bucket."""
  if is_remote(target):
    filesystem(target).put_file(str(source), str(target))
    os.unlink(source)
  else:
    shutil.move(source, target)


def create(target: Path, content: bytes) -> bool:
  """Write an object only if there is none. Of several writers one gets True.

  Args:
    target: in a bucket.
    content: no two writers may give the same: it shows whose object it is where the answer to a request was lost.
  """
  try:
    filesystem(target).pipe_file(str(target), content, mode='create')
    return True
  except FileExistsError:
    return read_bytes(target) == content


def make_folder(folder: Path) -> None:
  """Create a folder and its parents; a bucket needs none."""
  if not is_remote(folder):
    folder.mkdir(parents=True, exist_ok=True)


def move_folder(source: Path, target: Path) -> None:
  """Move a folder over another one. In a bucket its objects are copied by the store, then deleted."""
  remove_folder(target)
  if is_remote(source):
    for name in files_in(source):
      filesystem(source).cp_file(str(source / name), str(target / name))
    remove_folder(source)
  else:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)


def remove_folder(folder: Path) -> None:
  """Delete a folder with its content; nothing happens if it does not exist."""
  if is_remote(folder):
    with contextlib.suppress(FileNotFoundError):
      filesystem(folder).rm(str(folder), recursive=True)
  else:
    epath.Path(folder).rmtree(missing_ok=True)


def files_in(folder: Path) -> dict[str, tuple[int, str | None]]:
  """Return {name relative to the folder: (size in bytes, MD5 or None)} of every file below it, in order.

  The MD5, in hexadecimal, is that of the content as the store has it; nothing is read. A disk knows none. A folder
  that does not exist has no files; one that may not be listed raises OSError.
  """
  if not is_remote(folder):
    paths = sorted(pathlib.Path(root, name) for root, _, names in os.walk(folder, onerror=_raise) for name in names)
    return {str(p.relative_to(folder)): (p.stat().st_size, None) for p in paths if p.is_file()}
  if str(folder).startswith('gs:'):
    return dict(sorted(_gcs_objects(folder)))
  prefix = '/'.join(filter(None, split(folder))) + '/'  # a whole bucket has no name in it
  entries = filesystem(folder).find(str(folder), detail=True)
  return {name.removeprefix(prefix): (entry['size'], _md5(entry)) for name, entry in sorted(entries.items())
          if entry['type'] == 'file' and name.startswith(prefix)}


def _gcs_objects(folder: Path) -> Iterator[tuple[str, tuple[int, str | None]]]:
  """Yield the items of `files_in`, page by page. gcsfs would silently leave out all but ten million objects."""
  bucket, key = split(folder)
  prefix, token = key and f'{key}/', {}
  while True:
    page = filesystem(folder).call('GET', 'b/{}/o', bucket, prefix=prefix, maxResults=_PAGE, json_out=True, **token)
    for entry in page.get('items', ()):
      if not entry['name'].endswith('/'):  # of a folder
        yield entry['name'].removeprefix(prefix), (int(entry['size']), _md5(entry))
    if 'nextPageToken' not in page:
      return
    token = dict(pageToken=page['nextPageToken'])


def _raise(e: OSError) -> None:
  if not isinstance(e, FileNotFoundError):
    raise e


def _md5(entry: Mapping[str, Any]) -> str | None:
  """Return the MD5 in an entry of a listing; S3 has it as the tag of an object that one request wrote."""
  if 'md5Hash' in entry:
    return base64.b64decode(entry['md5Hash']).hex()
  tag = entry.get('ETag', '').strip('"')
  return tag if re.fullmatch('[0-9a-f]{32}', tag) else None


class GrowingFolder:
  """A folder of files that grow, which objects cannot: in a bucket it is a copy, brought up to date now and then.

  Attributes:
    local: the folder to write in; the folder itself, if that is on a disk.
  """

  def __init__(self, folder: Path, period: float = _COPY_PERIOD):
    """period: seconds between copies."""
    self._folder, self._period, self._copied = folder, period, {}
    self._temporary = tempfile.TemporaryDirectory() if is_remote(folder) else None
    self._pool, self._pending, self._last = futures.ThreadPoolExecutor(1), None, time.monotonic()
    self.local = pathlib.Path(self._temporary.name) if self._temporary else folder

  def copy(self, wait: bool = False) -> None:
    """Copies files that have grown: with `wait` now, else in the background when the period has passed."""
    if self._temporary is None or not wait and (
        time.monotonic() - self._last < self._period or self._pending and not self._pending.done()):
      return
    self._last, self._pending = time.monotonic(), self._pool.submit(self._copy)
    if wait:
      self._pending.result()

  def _copy(self) -> None:
    for name, (size, _) in files_in(self.local).items():
      if self._copied.get(name) != size:
        write_bytes(self._folder / name, (self.local / name).read_bytes())
        self._copied[name] = size

  def close(self) -> None:
    """Copies what has grown, and deletes the local folder."""
    try:
      self.copy(wait=True)
    finally:
      self._pool.shutdown()
      if self._temporary:
        self._temporary.cleanup()


@contextlib.contextmanager
def uploaded(folder: Path) -> Iterator[pathlib.Path]:
  """Yield a local folder whose files are written to a folder of a bucket when the block ends, manifest.json last."""
  with tempfile.TemporaryDirectory() as name:
    yield pathlib.Path(name)
    for file in sorted(files_in(pathlib.Path(name)), key=lambda file: file == 'manifest.json'):
      move_file(pathlib.Path(name, file), folder / file)  # in parts: may be gigabytes
