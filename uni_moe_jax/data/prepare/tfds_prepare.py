"""Preparation of TFDS datasets: what would fail after minutes of retries is reported at once."""

import concurrent.futures
import os
import pathlib
import socket
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from uni_moe_jax.data.shards import file_dataset, mirror
from uni_moe_jax.io.files import check_renames_folders
from uni_moe_jax.utils.errors import RunError, UsageError

_TIMEOUT = 5.0  # seconds until a host answers
_PORTS = {'http': 80, 'ftp': 21}  # others: 443


def prepare(name: str, data_dir: str | os.PathLike[str]) -> str:
  """Downloads a dataset NAME[/CONFIG][:VERSION] and writes it as array records; returns its splits in one line.

  Raises:
    UsageError: its archives must be downloaded by the user, and are not there, or are not the right ones.
    RunError: it cannot be downloaded.
  """
  source = file_dataset.TFDS + name
  builder = file_dataset.tfds_builder(source, data_dir)
  folder = pathlib.Path(builder.data_dir)
  with mirror.preparing(data_dir, folder) as is_complete:
    builder = file_dataset.tfds_builder(source, data_dir)  # another process may have prepared it meanwhile
    downloads = pathlib.Path(builder.data_dir_root) / 'downloads'
    if not builder.is_prepared():
      check_renames_folders(pathlib.Path(data_dir), '--data_dir')
      _check_manual_folder(builder, source, downloads / 'manual')
      _check_network(builder, source, downloads)
    try:
      builder.download_and_prepare()
    except Exception as e:  # TFDS passes on the errors of its builders, of requests and of TensorFlow
      if error := _error(e, builder, source, downloads):
        raise error from e
      raise
    if not is_complete:
      names = [name for info in builder.info.splits.values() for name in info.filenames]
      mirror.publish(data_dir, folder, folder, names)
  return f'{builder.info.full_name}: ' + ', '.join(f'{s} {i.num_examples}' for s, i in builder.info.splits.items())


def _check_manual_folder(builder: Any, source: str, folder: pathlib.Path) -> None:
  if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not (folder.is_dir() and any(folder.iterdir())):
    raise UsageError(f'{source} must be downloaded by you: put its archives into {folder} ({_instructions(builder)}).')


def _instructions(builder: Any) -> str:
  """The instructions of a dataset, in one line of at most 300 characters."""
  text = ' '.join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split()).rstrip('.')
  return text if len(text) <= 300 else f'{text[:299]}…'


def _check_network(builder: Any, source: str, downloads: pathlib.Path) -> None:
  """Raises RunError if nothing was downloaded before and no host answers; TFDS would try again for minutes."""
  from tensorflow_datasets.core.download import resource
  urls = builder.url_infos or {}
  files = [downloads / resource.get_dl_fname(url, info.checksum) for url, info in urls.items()]
  files += [downloads / 'manual' / info.filename for info in urls.values() if info.filename]
  hosts = {(u.hostname, u.port or _PORTS.get(u.scheme, 443)) for u in map(urllib.parse.urlsplit, urls) if u.hostname}
  has_proxy = urllib.request.getproxies().keys() - {'no'}  # which may reach hosts that cannot be reached from here
  if not hosts or has_proxy or any(file.exists() for file in files):
    return
  with concurrent.futures.ThreadPoolExecutor(len(hosts)) as pool:
    failures = list(pool.map(_connect, hosts))
  if all(failures):
    names = ' and '.join(sorted(host for host, _ in hosts)[:3])
    raise _not_downloaded(source, f'{names} cannot be reached: {failures[0]}', builder)


def _connect(address: tuple[str, int]) -> OSError | None:
  """Why a host does not answer; None if it does."""
  try:
    socket.create_connection(address, _TIMEOUT).close()
  except OSError as e:
    return e
  return None


def _not_downloaded(source: str, reason: str, builder: Any) -> RunError:
  folder = pathlib.Path(builder.data_dir_root) / builder.name
  return RunError(f'{source} cannot be downloaded ({reason}); prepare it on a machine with network and copy {folder}.')


def _error(e: Exception, builder: Any, source: str, downloads: pathlib.Path) -> Exception | None:
  """The error to report for one of TFDS that is for want of network or archives; None for others."""
  import requests
  import tensorflow as tf
  from tensorflow_datasets.core.download.util import DownloadError
  first_line = str(e).partition('\n')[0]
  if isinstance(e, (requests.RequestException, urllib.error.URLError, socket.gaierror, DownloadError)):
    return _not_downloaded(source, first_line, builder)
  if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and isinstance(
      e, (AssertionError, FileNotFoundError, tf.errors.NotFoundError)):
    return UsageError(f'{source}: {downloads / "manual"} does not contain its archives ({first_line}). '
                      f'{_instructions(builder)}.')
  return None
