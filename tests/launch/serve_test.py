"""uni-moe serve --workdir: which folder it exports to, with a stand-in for the export."""

import json
import pathlib
import types

import pytest

from tests.helpers import in_process, processes
from uni_moe_jax import __version__
from uni_moe_jax.serve import exported
from uni_moe_jax.train import manifest
from uni_moe_jax.train.workdir import model_fingerprint


def _run(folder: pathlib.Path, *steps: int, init: str = '', content: str = 'of a model') -> pathlib.Path:
  """Writes the work directory of a run with checkpoints of one file."""
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps({'uni_moe_jax': __version__, 'config': {'train': {'init': init}}}))
  for step in steps:
    checkpoint = folder / 'checkpoints' / str(step)
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / 'commit_success.txt').write_text('finished')
    manifest._write(checkpoint, {'files': {'file': {'sha256': content}}})
  return folder


@pytest.fixture(name='export')
def _export(monkeypatch):
  """Starts the service with a stand-in for the export; returns the step that is served, and whether it exported.

  reads: the step that the export reads. code: its exit code, which is returned. other: what another start exports.
  """
  def start(workdir, reads=None, code=0, init='', other=None):
    exports, served = [], []

    def write(output, step):
      output.mkdir(parents=True)
      (output / 'SHA256SUMS').write_text(str(step))
      (output / 'manifest.json').write_text(json.dumps({'provenance': {
          'step': step, 'checkpoint (fingerprint)': model_fingerprint(workdir, init, step)}}))

    def run(command, **_):
      [output] = [pathlib.Path(a.removeprefix('--output=')) for a in command if a.startswith('--output=')]
      exports.append(output)
      if not code:
        write(output, reads)
      if other is not None:
        write(workdir / f'served/{other}-{model_fingerprint(workdir, init, other)}', other)
      return types.SimpleNamespace(wait=lambda: code)

    with monkeypatch.context() as patch:
      patch.setattr(exported.signals, 'start', run)
      patch.setattr(exported, 'make', lambda *given: served.append(make(*given)) or served[0])
      try:
        started = in_process.run(processes.ROOT / 'launch/serve.py', f'--workdir={workdir}', '--export_only')
      except SystemExit as stopped:
        return stopped.code
    assert started == 0 and not any(output.exists() for output in exports)
    return int((served[0] / 'SHA256SUMS').read_text()), bool(exports)

  make = exported.make
  return start


_EXPORTED, _KEPT = True, False


def test_a_run_is_exported_once_per_checkpoint(tmp_path, export):
  run = _run(tmp_path / 'run', 3)
  assert export(run, 3) == (3, _EXPORTED) and export(run) == (3, _KEPT)
  assert export(_run(run, 5), 5) == (5, _EXPORTED)
  assert export(_run(run, 5, content='of another model'), 5) == (5, _EXPORTED)


def test_a_checkpoint_that_was_damaged_is_exported_when_it_is_intact_again(tmp_path, export):
  run = _run(tmp_path / 'run', 3, 5)
  assert export(run, reads=3) == (3, _EXPORTED)
  assert export(run, reads=5) == (5, _EXPORTED) and export(run) == (5, _KEPT)


def test_of_two_starts_that_export_at_once_the_later_uses_what_the_other_has_made(tmp_path, export):
  assert export(_run(tmp_path / 'both', 3), 3, other=3) == (3, _EXPORTED)
  assert export(_run(tmp_path / 'alone', 3), code=2) == 2


def test_a_run_that_trains_nothing_is_exported_once_per_checkpoint_of_the_run_whose_parameters_it_has(tmp_path, export):
  parent = _run(tmp_path / 'parent', 3)
  run, init = _run(tmp_path / 'run', init=str(parent)), str(parent)
  assert export(run, 3, init=init) == (3, _EXPORTED) and export(run, init=init) == (3, _KEPT)
  _run(parent, 3, content='of another model')
  assert export(run, 3, init=init) == (3, _EXPORTED)
  _run(parent, 5)
  assert export(run, 5, init=init) == (5, _EXPORTED)
  assert export(_run(run, 2, init=init), 2, init=init) == (2, _EXPORTED)  # a run that trains: its own
