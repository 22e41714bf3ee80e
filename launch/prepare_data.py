"""Prepares the embedded data once: python launch/prepare_data.py --data_dir=~/.cache/uni_moe_jax"""

import os
import time

from absl import flags

from uni_moe_jax import cli

_DATA_DIR = flags.DEFINE_string('data_dir', '~/.cache/uni_moe_jax', 'Where prepared data is kept.')


def main() -> int:
  from uni_moe_jax.data import clips, glyphs, texts
  directory = os.path.expanduser(_DATA_DIR.value)
  for source in (glyphs, clips, texts):
    start = time.perf_counter()
    source.build(directory)
    print(f'{source.__name__.rpartition(".")[2]}: {time.perf_counter() - start:.0f} s', flush=True)
  return 0


if __name__ == '__main__':
  cli.run(main)
