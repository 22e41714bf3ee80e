"""Prepare data once: the embedded data, your own files, or a TFDS dataset.

Embedded data:    uni-moe prepare-data
Your own data:    uni-moe prepare-data --input=photos --name=pets
A TFDS dataset:   uni-moe prepare-data --tfds=coco_captions

Your own data is a folder [split/]class/*.jpg (or videos), or files of rows: .jsonl (with an .npz of frames beside it),
.tar of WebDataset, .parquet, .csv, .tsv or .txt. It becomes the source 'own:pets' of configs; its folder contains
prepared.json: splits, statistics, and skipped rows with the reason. Rerun a killed command to continue. A TFDS dataset
is downloaded by TFDS and becomes 'tfds:coco_captions'.
"""

from absl import flags

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.config.schema import DataConfig
from uni_moe_jax.data.shards import mirror
from uni_moe_jax.data.shards.record_format import EMBEDDED
from uni_moe_jax.io import storage
from uni_moe_jax.utils import cores
from uni_moe_jax.utils.errors import UsageError

_DATA_DIR = flags.DEFINE_string('data_dir', DataConfig().dir, 'Folder of prepared data, also gs://… or s3://….')
_CACHE_DIR = flags.DEFINE_string('cache_dir', DataConfig().cache_dir, 'Local folder for data on its way to a bucket.')
_INPUT = flags.DEFINE_string(
    'input', None, 'Folder or file of your own data, also gs://…, or {00000..01242}.tar; default: the embedded data.')
_EMBEDDED = flags.DEFINE_list('embedded', list(EMBEDDED), 'Embedded datasets to make, such as digits; default: all.')
_NAME = flags.DEFINE_string('name', None, 'Name of your dataset: lower-case letters, digits, underscores.')
_TFDS = flags.DEFINE_string('tfds', None, 'TFDS dataset NAME[/CONFIG][:VERSION], written as array records.')
_VERSION = flags.DEFINE_string('version', '1.0.0', 'Version of your dataset; runs read the newest one.')
_GIF = flags.DEFINE_enum('gif', 'image', ['image', 'video'], 'Media type of .gif files in a folder by class.')
_ALLOW_OUTSIDE = flags.DEFINE_bool('allow_outside', False, 'Also pack files outside of --input that a .jsonl names.')
_TEST_FRACTION = flags.DEFINE_float(
    'test_fraction', 0.1, 'Fraction that becomes the test split if the data names no splits.', 0, 1)
_MAX_CORRUPT_FRACTION = flags.DEFINE_float(
    'max_corrupt_fraction', 0.1, 'Largest fraction of rows that may be skipped; more is an error.', 0, 1)
_NUM_WORKERS = flags.DEFINE_integer(
    'num_workers', cores.available(), 'Processes for the embedded and your own data.', 1)


def main() -> int:
  config = DataConfig(dir=str(storage.path(_DATA_DIR.value, '--data_dir')), cache_dir=_CACHE_DIR.value)
  directory = mirror.open_folder(config)
  if (_INPUT.value is None) != (_NAME.value is None):
    raise UsageError('--input and --name go together; give the path of your data and a name for it.')
  if _TFDS.value is not None:
    from uni_moe_jax.data.prepare import tfds_prepare
    print(tfds_prepare.prepare(_TFDS.value, directory))
  elif _INPUT.value is not None:
    from uni_moe_jax.data.prepare import input_copy, prepare, summary
    with input_copy.opened(_INPUT.value, _CACHE_DIR.value) as source:
      prepared = prepare.prepare(
          source, directory, _NAME.value, _VERSION.value, _GIF.value, _TEST_FRACTION.value, _MAX_CORRUPT_FRACTION.value,
          _ALLOW_OUTSIDE.value, _NUM_WORKERS.value)
    print(summary.describe(prepared))
  else:
    from uni_moe_jax.data.embedded import build
    build.build(config, _NUM_WORKERS.value, _EMBEDDED.value)
  return 0


if __name__ == '__main__':
  cli.run(main)
