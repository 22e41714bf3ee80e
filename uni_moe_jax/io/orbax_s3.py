"""Checkpoints on S3: Orbax has no driver of TensorStore for s3://, and TensorStore has one.

Orbax 0.12 chooses the driver of an array in one function, by the prefix gs://; any other address must be an absolute
path of a disk. This module wraps that function: it is given an absolute path, and the driver of files in what it
returns is replaced. Everything else of a checkpoint, Orbax writes by `epath`.
"""

import functools
import os
import re
from collections.abc import Callable
from typing import Any

# No public hook: neither an option nor a type handler of Orbax reaches the driver of the files that it merges.
from orbax.checkpoint._src.serialization import tensorstore_utils

from uni_moe_jax.io import storage


@functools.cache
def support() -> None:
  """Make Orbax write and read arrays on s3://, in this process."""
  tensorstore_utils.build_kvstore_tspec = _with_s3(tensorstore_utils.build_kvstore_tspec)


def _with_s3(build: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:

  @functools.wraps(build)
  def build_kvstore_tspec(directory: str, *args, **kwargs) -> dict[str, Any]:
    if not directory.startswith('s3:'):
      return build(directory, *args, **kwargs)
    bucket, key = storage.split(re.sub('^s3:/+', 's3://', directory))  # Orbax may have joined its slashes
    return _replace_driver(build(f'/{key}', *args, **kwargs), {'driver': 's3', 'bucket': bucket, **_settings()})

  return build_kvstore_tspec


def _settings() -> dict[str, Any]:
  """What AWS's variables say: server and region, which TensorStore does not read ({}: those of the bucket), and keys.

  Without the last, it logs errors about files of credentials that are not there, though it finds the keys.
  """
  server = os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL')
  region = os.environ.get('AWS_REGION') or os.environ.get('AWS_DEFAULT_REGION') or (server and 'us-east-1')
  keys = {'aws_credentials': {'type': 'environment'}} if os.environ.get('AWS_ACCESS_KEY_ID') else {}
  return ({'endpoint': server} if server else {}) | ({'aws_region': region} if region else {}) | keys


def _replace_driver(spec: Any, s3: dict[str, Any]) -> Any:
  """A spec in which files below / are objects of a bucket."""
  if not isinstance(spec, dict):
    return spec
  if spec.get('driver') == 'file':
    return {**s3, 'path': spec['path'].removeprefix('/')}
  return {k: _replace_driver(v, s3) for k, v in spec.items()}
