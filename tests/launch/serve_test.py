"""uni-moe serve --workdir: which folder it exports to, with a stand-in for the export."""

import json
import pathlib
import types

import pytest

from tests.helpers import in_process, processes
from uni_moe_jax import __version__


def _run(folder: pathlib.Path, *steps: int, init: str = '') -> pathlib.Path:
  """Writes the work directory of a run with empty checkpoints."""
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps({'uni_moe_jax': __version__, 'config': {'train': {'init': init}}}))
  for step in steps:
    checkpoint = folder / 'checkpoints' / str(step)
    checkpoint.mkdir(parents=True)
    (checkpoint / 'commit_success.txt').write_text('finished')
  return folder


@pytest.fixture(name='export')
def _export(monkeypatch):
  """Starts the service with a stand-in for the export; returns its exit code, and the folders of exports."""
  def start(workdir, code=0, writes=True):
    outputs = []

    def run(command, **_):
      [output] = [pathlib.Path(a.removeprefix('--output=')) for a in command if a.startswith('--output=')]
      outputs.append(output.relative_to(workdir).as_posix())
      if writes:
        output.mkdir(parents=True)
        (output / 'SHA256SUMS').touch()
      return types.SimpleNamespace(returncode=code)

    with monkeypatch.context() as patch:
      patch.setattr('subprocess.run', run)
      try:
        return in_process.run(processes.ROOT / 'launch/serve.py', f'--workdir={workdir}', '--export_only'), outputs
      except SystemExit as stopped:
        return stopped.code, outputs
  return start


def test_a_run_is_exported_once_per_step(tmp_path, export):
  run = _run(tmp_path / 'run', 3)
  assert export(run) == (0, ['served/3']) and export(run) == (0, [])
  assert export(_run(run, 5)) == (0, ['served/5'])


def test_of_two_starts_that_export_at_once_the_later_uses_what_the_other_has_made(tmp_path, export):
  assert export(_run(tmp_path / 'both', 3), code=2) == (0, ['served/3'])
  assert export(_run(tmp_path / 'alone', 3), code=2, writes=False) == (2, ['served/3'])


def test_a_run_that_trains_nothing_is_exported_once_per_step_of_the_run_whose_parameters_it_has(tmp_path, export):
  parent = _run(tmp_path / 'parent', 3)
  run = _run(tmp_path / 'run', init=str(parent))
  assert export(run) == (0, ['served/3']) and export(run) == (0, [])
  _run(parent, 5)
  assert export(run) == (0, ['served/5'])
  assert export(_run(run, 2, init=str(parent))) == (0, ['served/2'])  # a run that trains: its own
