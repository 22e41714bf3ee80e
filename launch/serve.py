"""Serve an exported model: a page in the browser and a JSON API.

  uni-moe serve --model=exported
  uni-moe serve --workdir=runs/quickstart                # exports first; opens http://127.0.0.1:8000
  uni-moe serve --model=exported --gallery=photos --port=9000

GET /docs describes the API, docs/guides/serve.md the service. It accepts only local connections unless --host is
given, and opens no path or URL from a request. On Ctrl-C or SIGTERM it finishes running requests and exits with code 0.
"""

import asyncio
import dataclasses
import os
import pathlib
import sys

from absl import flags

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.io import storage
from uni_moe_jax.serve.limits import Limits
from uni_moe_jax.utils import exit_codes, heap
from uni_moe_jax.utils.errors import UsageError

_MODEL = flags.DEFINE_string('model', None, 'Folder of uni-moe export, or hf:OWNER/NAME@REVISION.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Work directory to export first, once per checkpoint and config.')
_BEST = flags.DEFINE_bool(
    'best', False, 'With --workdir: the checkpoint with the best config.train.best_metric, not the newest.')
_EXPORT_ONLY = flags.DEFINE_bool('export_only', False, 'With --workdir: end after the export, so that a start is fast.')
_GALLERY = flags.DEFINE_string('gallery', None, 'Folder of images and videos to search; default: the examples.')
_HOST = flags.DEFINE_string('host', '127.0.0.1', "Address to listen on; 0.0.0.0: all of this machine's.")
_PORT = flags.DEFINE_integer('port', 8000, 'Port; 0: a free one.', lower_bound=0, upper_bound=65535)
_TOKEN_FILE = flags.DEFINE_string(
    'token_file', None, 'File with the bearer token that requests must send; or set UNI_MOE_TOKEN.')
_DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
_LIMITS = {f.name: _DEFINE[f.type](f.name, f.default, f.metadata['help'], lower_bound=f.metadata['at_least'])
           for f in dataclasses.fields(Limits)}
_NUM_EXAMPLES = 12  # per task


def main() -> int:
  heap.share_arena()
  if (_MODEL.value is None) == (_WORKDIR.value is None):
    raise UsageError('give either --model=FOLDER of uni-moe export or --workdir=RUN of uni-moe train.')
  if _BEST.value and _WORKDIR.value is None:
    raise UsageError('--best is for --workdir=RUN: an exported folder has one checkpoint.')
  limits = Limits(**{name: flag.value for name, flag in _LIMITS.items()})
  if limits.max_batch & (limits.max_batch - 1):
    raise UsageError(f'--max_batch={limits.max_batch} is not a power of two; give 1, 2, 4, 8, 16, 32 or 64.')
  try:
    from uni_moe_jax.serve import gallery, server
  except ModuleNotFoundError as e:
    raise UsageError(f"the service needs {e.name}; run: pip install 'uni-moe-jax[serve]'") from None
  token = server.read_token(_TOKEN_FILE.value, os.environ.get('UNI_MOE_TOKEN', ''))
  bound = None if _EXPORT_ONLY.value else server.bind(_HOST.value, _PORT.value)
  gallery_files = [] if _GALLERY.value is None else gallery.files_of(_GALLERY.value)
  model, workdir = _MODEL.value, _WORKDIR.value
  folder = _exported(storage.path(workdir, '--workdir')) if model is None else storage.path(model, '--model')
  if not (folder / 'SHA256SUMS').is_file():
    raise UsageError(f'{folder} is not a folder of uni-moe export, or it is incomplete; export the model again.')
  if bound is not None:
    asyncio.run(server.serve(folder, limits, bound, _HOST.value, token, gallery_files))
  return exit_codes.FINISHED


def _exported(workdir: pathlib.Path) -> pathlib.Path:
  """The export of a run's newest or best checkpoint, in its work directory; makes it unless it exists."""
  from uni_moe_jax.serve import exported
  from uni_moe_jax.train import checkpoint_choice
  from uni_moe_jax.train.workdir import load_config
  config = load_config(workdir)
  checkpoints = checkpoint_choice.intact(workdir, config, _BEST.value)
  return exported.make(workdir / 'served', checkpoints, config.to_json(sort_keys=True), [
      sys.executable, str(pathlib.Path(__file__).with_name('export.py')), f'--workdir={workdir}',
      f'--num_examples={_NUM_EXAMPLES}', f'--best={_BEST.value}'])


if __name__ == '__main__':
  cli.run(main, local=('model', 'workdir', 'gallery', 'token_file'))
