"""Makes all embedded data: images and videos in one process while another reads texts."""

import functools
import importlib
import time

from uni_moe_jax.config.schema import DataConfig
from uni_moe_jax.data.prepare import workers
from uni_moe_jax.data.shards import mirror

_TOGETHER = ('docstring_texts',), ('glyphs', 'glyph_videos')  # the longest first; videos show the images


def build(config: DataConfig, num_workers: int) -> None:
  """Makes what the data directory lacks. Raises UsageError for fonts or packages that are missing."""
  tasks = [functools.partial(_build, names, config) for names in _TOGETHER]
  workers.run(tasks, len(tasks), None, num_workers)


def _build(names: tuple[str, ...], config: DataConfig) -> int:
  directory = mirror.open_folder(config)  # a mirror of a bucket belongs to its process
  for name in names:
    start = time.perf_counter()
    source = importlib.import_module(f'{__package__}.{name}')
    source.build(directory, functools.partial(print, flush=True))
    print(f'{name}: {time.perf_counter() - start:.0f} s', flush=True)
  return len(names)
