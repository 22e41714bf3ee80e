"""Export a trained work directory as a folder that runs without this package.

  uni-moe export --workdir=runs/quickstart --output=exported --num_examples=4
  python exported/example.py

Experts are merged permanently if the router allows it; --tasks and --bake_targets reduce the number of conditions and
so of kernels. --torch adds the published PyTorch layout of a model with one kernel per projection. README.md in the
folder is the model card. docs/guides/export_formats.md describes --onnx and --browser, and how another
run starts from the folder (--checkpoint), also from the Hugging Face Hub (--push_to_hub=OWNER/NAME).
"""

import functools

from absl import flags

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.io import hub, storage
from uni_moe_jax.utils.errors import UsageError

_WORKDIR = flags.DEFINE_string('workdir', None, 'Work directory of uni-moe train.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write, which must not exist.', required=True)
_BEST = flags.DEFINE_bool(
    'best', False, 'Export the checkpoint with the best config.train.best_metric, not the newest.')
_TASKS = flags.DEFINE_list('tasks', [], 'Tasks of the run to export; all by default.')
_BAKE_TARGETS = flags.DEFINE_bool(
    'bake_targets', False, 'Store encoded target sets: only their entries are answers; only retrieval encodes texts.')
_DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'],
                           'Type of matrix products; default: that of the run. Parameters stay float32.')
_NUM_EXAMPLES = flags.DEFINE_integer(
    'num_examples', 0, 'Examples per task to include, with answers, except for retrieval and masked words; the folder '
    'then contains data of the run.', lower_bound=0)
_TORCH = flags.DEFINE_bool(
    'torch', False, 'Add model.pth in the layout of the published dense model (one condition only).')
_ONNX = flags.DEFINE_bool('onnx', False, 'Add ONNX models of the programs, converted in an environment of its own.')
_BROWSER = flags.DEFINE_bool(
    'browser', False, 'Add the ONNX models and index.html, a page that runs them; needs npm once.')
_CHECKPOINT = flags.DEFINE_bool(
    'checkpoint', False, 'Add the parameters with all experts as a checkpoint, from which a run starts (train.init).')
_PUSH_TO_HUB = flags.DEFINE_string(
    'push_to_hub', None, 'Repository OWNER/NAME of the Hugging Face Hub for the folder; created private if new.')


def main() -> int:
  from uni_moe_jax.train import workdir as workdir_lib
  workdir = storage.path(_WORKDIR.value)
  config = workdir_lib.load_config(workdir)  # report mistakes before the slow imports below
  if storage.path(_OUTPUT.value).exists():
    raise UsageError(f'--output={_OUTPUT.value} exists; choose another folder or remove it.')
  if _PUSH_TO_HUB.value:
    hub.check_push(_PUSH_TO_HUB.value, _OUTPUT.value)
  from uni_moe_jax.eval import suite
  from uni_moe_jax.export import artifact, contents
  from uni_moe_jax.train import loop, trained_run
  run, params, step = trained_run.read(workdir, config, _BEST.value)
  formats = [flag.name for flag in (_TORCH, _ONNX, _BROWSER) if flag.value]
  artifact.prepare(formats, _DTYPE.value or run.spec.model.spec.dtype, run.data)
  exported = contents.make_contents(
      run.spec.model.spec, params, run.plan, run.data, tasks=_TASKS.value, bake_targets=_BAKE_TARGETS.value,
      dtype=_DTYPE.value, num_examples=_NUM_EXAMPLES.value)
  model = workdir_lib.model_fingerprint(workdir, config.train.init, step)
  rows = suite.finished_rows(workdir, run.plan, step, model=model)
  provenance = workdir_lib.provenance(workdir, step) | {
      'checkpoint (fingerprint)': model, 'exported by commit': loop.commit()}
  write_start = functools.partial(trained_run.write_start, params=params, step=step, provenance=provenance)
  weights = artifact.write(
      _OUTPUT.value, exported, provenance, rows, formats, write_start if _CHECKPOINT.value else None)
  print(f'{_OUTPUT.value}: step {step}, {exported.summary()}\n{weights}')
  if _PUSH_TO_HUB.value:
    print(f'pushed as {hub.push(storage.path(_OUTPUT.value), _PUSH_TO_HUB.value)}')
  return 0


if __name__ == '__main__':
  cli.run(main)
