"""Prepares data once.

The embedded data:  python launch/prepare_data.py
Your own:           python launch/prepare_data.py --input=photos --name=pets
A TFDS data set:    python launch/prepare_data.py --tfds=coco_captions

Your own data is a folder [split/]class/*.jpg (or clips), a .jsonl file or a folder of them, a .npz of frames beside its .jsonl,
or .txt files. README.md shows the formats. It becomes the source 'own:pets' of configs, and its folder has prepared.json:
splits, statistics, and what was skipped and why. A TFDS data set is downloaded by TFDS, and becomes 'tfds:coco_captions'.
"""

import os
import pathlib
import time

from absl import flags

from uni_moe_jax.utils import cli
from uni_moe_jax.utils.errors import UsageError

_DATA_DIR = flags.DEFINE_string('data_dir', '~/.cache/uni_moe_jax', 'Where prepared data is kept.')
_INPUT = flags.DEFINE_string('input', None, 'Folder or file of your own data; none: the embedded data.')
_NAME = flags.DEFINE_string('name', None, 'What your data will be called: small letters, digits, underscores.')
_TFDS = flags.DEFINE_string('tfds', None, 'TFDS data set, NAME[/CONFIG][:VERSION]: written where it can be read at random.')
_VERSION = flags.DEFINE_string('version', '1.0.0', 'Of your data; the newest one is read.')
_GIF = flags.DEFINE_enum('gif', 'image', ['image', 'video'], 'What a .gif in a folder by class is.')
_HOLDOUT = flags.DEFINE_float('test_fraction', 0.1, 'Share that becomes the test split where the data names none.', 0, 1)
_BAD = flags.DEFINE_float('max_corrupt_fraction', 0.1, 'More rows that must be skipped are an error.', 0, 1)


def main() -> int:
  directory = pathlib.Path(os.path.expanduser(_DATA_DIR.value))
  if (_INPUT.value is None) != (_NAME.value is None):
    raise UsageError('--input and --name go together: where your data lies, and what to call it.')
  if _TFDS.value is not None:
    from uni_moe_jax.data.files import file_dataset
    builder = file_dataset.tfds_builder(file_dataset.TFDS + _TFDS.value, directory)
    builder.download_and_prepare()
    print(f'{builder.info.full_name}: {", ".join(f"{s} {of.num_examples}" for s, of in builder.info.splits.items())}')
    return 0
  if _INPUT.value is not None:
    from uni_moe_jax.data.files import prepare
    summary = prepare.prepare(pathlib.Path(os.path.expanduser(_INPUT.value)), directory, _NAME.value, _VERSION.value, _GIF.value,
                              _HOLDOUT.value, _BAD.value)
    print(prepare.describe(summary))
    return 0
  from uni_moe_jax.data.embedded import docstring_texts, glyph_videos, glyphs
  for source in (glyphs, glyph_videos, docstring_texts):
    start = time.perf_counter()
    source.build(directory)
    print(f'{source.__name__.rpartition(".")[2]}: {time.perf_counter() - start:.0f} s', flush=True)
  return 0


if __name__ == '__main__':
  cli.run(main)
