"""Convert the authors' PyTorch checkpoints in both directions.

  uni-moe convert --checkpoint=model.pth --config=published --workdir=runs/converted \
      --config.tokenizer.merges_path=/path/to/bpe_simple_vocab_16e6.txt.gz
  uni-moe convert --workdir=runs/converted --output=ours.pth

The first command makes a work directory whose step 0 has the checkpoint's parameters; uni-moe train and
uni-moe evaluate continue from it with the same config. The second writes the newest parameters of a work directory in
the published layout (averaged ones if the run has them). Both print a report; the first also writes conversion.json.
"""

import dataclasses
import hashlib

from absl import flags

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.io import files, storage
from uni_moe_jax.utils.errors import UsageError

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Work directory to make, or, with --output, to read.', required=True)
_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'PyTorch file to read (torch or DeepSpeed layout).')
_OUTPUT = flags.DEFINE_string('output', None, 'PyTorch file to write, in the published layout; must not exist.')
_BEST = flags.DEFINE_bool(
    'best', False, 'With --output: the checkpoint with the best config.train.best_metric, not the newest.')


def main() -> int:
  if (_CHECKPOINT.value is None) != (_CONFIG.value is None) or (_CHECKPOINT.value is None) == (_OUTPUT.value is None):
    raise UsageError('use either --checkpoint=FILE --config=FILE (from PyTorch) or --output=FILE (to PyTorch).')
  if _BEST.value and _OUTPUT.value is None:
    raise UsageError('--best is for --output=FILE (to PyTorch): a PyTorch file has one checkpoint.')
  return _from_torch() if _CHECKPOINT.value else _to_torch()


def _from_torch() -> int:
  from uni_moe_jax.config.plan import make_plan
  from uni_moe_jax.convert import torch_file, torch_layout
  from uni_moe_jax.train import checkpoint, workdir
  from uni_moe_jax.train import run as train_run
  config, folder, step = cli.config_of(_CONFIG), storage.path(_WORKDIR.value), workdir.saved_step(_WORKDIR.value)
  if step or (folder / workdir.CONFIG_FILE).exists():
    raise UsageError(f'workdir {_WORKDIR.value} already has a run; choose another.')
  make_plan(config)  # mistakes are reported before the checkpoint is read
  state, remarks = torch_file.read(storage.path(_CHECKPOINT.value), config.model.modality_embedding)
  run = train_run.build(config)
  params, report = torch_layout.from_torch(state, run.spec.model.spec)
  with storage.path(_CHECKPOINT.value).open('rb') as file:
    origin = {'checkpoint': _CHECKPOINT.value, 'sha256': hashlib.file_digest(file, 'sha256').hexdigest()}
  storage.remove_folder(folder / workdir.CHECKPOINTS / '0')  # of a conversion that ended before it wrote the config
  with checkpoint.Checkpoints(_WORKDIR.value, config.train.max_to_keep) as checkpoints:
    checkpoints.save(0, run.state_from(params))
  files.write_json(folder / workdir.CONVERSION_FILE, {**origin, 'names': remarks, **dataclasses.asdict(report)})
  workdir.copy_tokenizer(_WORKDIR.value, run.data.tokenizer_file)
  # Last: what was interrupted before leaves no run that would be trained from fresh parameters.
  workdir.claim_workdir(_WORKDIR.value, config, run.data.fingerprint, class_digests=run.class_digests)
  for remark in sorted({r for r in remarks.values() if not r.startswith('older name')}):
    print(remark)
  print(f'{len(remarks)} names of an older layout, see {workdir.CONVERSION_FILE}\n' if remarks else '', end='')
  print(f'{report}\n{torch_layout.taken_from_config(run.spec.model.spec)}')
  return 0


def _to_torch() -> int:
  from uni_moe_jax.convert import torch_file, torch_layout
  from uni_moe_jax.train import trained_run, workdir
  config = workdir.load_config(_WORKDIR.value)
  if storage.path(_OUTPUT.value).exists():
    raise UsageError(f'--output={_OUTPUT.value} exists; choose another file or remove it.')
  run, params, step = trained_run.read(_WORKDIR.value, config, _BEST.value)
  state, report = torch_layout.to_torch(params, run.spec.model.spec)
  torch_file.write(storage.path(_OUTPUT.value), state)
  print(f'{_OUTPUT.value}: step {step}, {report}')
  return 0


if __name__ == '__main__':
  cli.run(main, local=('checkpoint', 'output'))
