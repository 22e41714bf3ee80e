"""Exported models on the Hugging Face Hub, as addresses hf:OWNER/NAME[@REVISION][/FILE].

`huggingface_hub` transfers, caches and authenticates; HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are its
settings. A download is used only if every file but the card has the digest in the folder's own SHA256SUMS.
"""

import contextlib
import functools
import glob
import hashlib
import importlib.util
import os
import pathlib
import re
import shlex
from collections.abc import Iterator

from uni_moe_jax.utils.errors import RunError, UsageError

SCHEME = 'hf:'
_REPOSITORY = r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*'
_ADDRESS = re.compile(rf'hf:({_REPOSITORY})(?:@([^@/\s]+))?(?:/(.+))?')
_SUMS = 'SHA256SUMS'


def pinned(address: str, name: str) -> str:
  """Return an address with its revision replaced by the commit that it names now; others are returned as they are."""
  if not address.startswith(SCHEME):
    return address
  repository, revision, file = _parts(address, name)
  commit = _snapshot(repository, revision, name).name
  return f'{SCHEME}{repository}@{commit}' + (f'/{file}' if file else '')


def folder(address: str, name: str) -> pathlib.Path:
  """Return the local copy of an address, which is downloaded if there is none.

  name: of the flag or field, for errors.

  Raises:
    UsageError: it is no such address, or the repository, the revision or the right to read it is missing.
    RunError: the Hub does not answer, or a file differs from SHA256SUMS.
  """
  repository, revision, file = _parts(address, name)
  return _snapshot(repository, revision, name) / (file or '')


def push(source: pathlib.Path, repository: str) -> str:
  """Write an exported folder to a repository, which is created private if there is none; return its pinned address.

  It replaces the model that the repository has: files of that one which the new one lacks are deleted, others stay.

  Raises:
    UsageError: it is no name of a repository, or the right to write it is missing.
    RunError: the Hub does not answer.
  """
  check_push(repository, source)
  import huggingface_hub  # pylint: disable=g-import-not-at-top
  try:
    with _errors_of(repository, None, '--push_to_hub'):
      api = huggingface_hub.HfApi()
      api.create_repo(repository, private=True, exist_ok=True)
      # A checkpoint that stayed could be newer than that of the new model, and would be taken for it.
      former = (_digests(pathlib.Path(api.hf_hub_download(repository, _SUMS)))
                if api.file_exists(repository, _SUMS) else {})
      commit = api.upload_folder(repo_id=repository, folder_path=source, commit_message='Exported model',
                                 delete_patterns=[glob.escape(file) for file in former])
  except (UsageError, RunError) as e:
    raise type(e)(f'{e} The export itself is complete: remove {source} before you repeat the command, or upload it by '
                  f'`hf upload {repository} {shlex.quote(str(source))}`.') from e
  return f'{SCHEME}{repository}@{commit.oid}'


def check_push(repository: str, source: str | os.PathLike[str]) -> None:
  """Raise UsageError unless a folder can be written to a repository of that name."""
  _check(repository, '--push_to_hub')
  if '://' in str(source):
    raise UsageError(f'--push_to_hub uploads from a disk, and --output={str(source)!r} is in a bucket; give a local '
                     'folder.')


def _check(repository: str, name: str) -> None:
  """Raise UsageError unless it can be the name of a repository and `huggingface_hub` is installed."""
  if not re.fullmatch(_REPOSITORY, repository):
    raise UsageError(f'{name}={repository!r} is no repository of the Hub; write OWNER/NAME.')
  if importlib.util.find_spec('huggingface_hub') is None:
    raise UsageError(f"{name}={repository!r} needs the package huggingface_hub: pip install 'uni-moe-jax[hub]'.")
  from huggingface_hub import errors, utils  # pylint: disable=g-import-not-at-top
  try:
    utils.validate_repo_id(repository)
  except errors.HFValidationError:  # its sentences are about Python's arguments
    raise UsageError(f'{name}={repository!r} is no repository of the Hub: OWNER and NAME have at most 96 characters, '
                     "do not end with '-' or '.', and contain no '--' and no '..'; NAME does not end with '.git'."
                     ) from None


def _parts(address: str, name: str) -> tuple[str, str | None, str | None]:
  """Return (repository, revision, file) of an address."""
  match = _ADDRESS.fullmatch(address)
  if match is None or '..' in (match[3] or '').split('/'):
    raise UsageError(f'{name}={address!r} is no address of the Hub; write hf:OWNER/NAME or hf:OWNER/NAME@REVISION.')
  _check(match[1], name)
  return match[1], match[2], match[3]


@functools.cache
def _snapshot(repository: str, revision: str | None, name: str) -> pathlib.Path:
  """Return the verified local folder of a revision, named by its commit."""
  import huggingface_hub  # pylint: disable=g-import-not-at-top
  with _errors_of(repository, revision, name):
    local = pathlib.Path(huggingface_hub.snapshot_download(repository, revision=revision))
  sums = local / _SUMS
  if not sums.is_file():
    raise UsageError(f'{name}: {repository} has no {_SUMS}, so it is no exported model; give one that launch/export.py '
                     '--push_to_hub wrote.')
  for file, digest in _digests(sums).items():
    with contextlib.suppress(OSError), open(local / file, 'rb') as content:
      if hashlib.file_digest(content, 'sha256').hexdigest() == digest:
        continue
    raise RunError(f'{name}: {file} of {repository} differs from {_SUMS} of commit {local.name}: it was changed or '
                   f'damaged. Use another revision, or delete {local.parents[1]} and download it again.')
  return local


def _digests(sums: pathlib.Path) -> dict[str, str]:
  """Return the digest of every file that SHA256SUMS lists."""
  return dict(line.split('  ', 1)[::-1] for line in sums.read_text(errors='replace').splitlines() if '  ' in line)


@contextlib.contextmanager
def _errors_of(repository: str, revision: str | None, name: str) -> Iterator[None]:
  """Report errors of huggingface_hub as one sentence."""
  import httpx2  # pylint: disable=g-import-not-at-top
  from huggingface_hub import constants, errors  # pylint: disable=g-import-not-at-top
  where, token = f'{name}: {repository}', 'set HF_TOKEN, or run hf auth login'
  try:
    yield
  except errors.GatedRepoError as e:
    raise UsageError(f'{where} is gated: accept its conditions on its page, and {token}.') from e
  except errors.RevisionNotFoundError as e:
    raise UsageError(f'{where} has no revision {revision!r}; give a branch, a tag or a commit of it.') from e
  except errors.RepositoryNotFoundError as e:
    raise UsageError(f'{where} does not exist, or it is private and the token may not read it; check the name, or '
                     f'{token}.') from e
  except errors.LocalTokenNotFoundError as e:
    raise UsageError(f'{where} cannot be written without a token; {token}.') from e
  except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx2.HTTPError) as e:
    response = getattr(e, 'response', None)
    if response is not None and response.status_code in (401, 403):
      raise UsageError(f'{where}: the token is missing, has expired or lacks the right; {token}.') from e
    raise RunError(f'{where}: {constants.ENDPOINT} does not answer, or only with errors, and there is no local copy. '
                   'Check the network, and repeat the same command.') from e
