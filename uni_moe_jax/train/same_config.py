"""Whether all processes of a run have one config, but for where their data is."""

import json

import ml_collections

from uni_moe_jax.io import hub
from uni_moe_jax.parallel.distributed import Cluster
from uni_moe_jax.train.workdir import differences
from uni_moe_jax.utils.errors import UsageError, first_few

_OF_HOST = 'data.dir', 'data.cache_dir', 'data.cache_gb', 'tokenizer.merges_path'  # fields that may differ


def check(config: ml_collections.ConfigDict, cluster: Cluster | None) -> None:
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
