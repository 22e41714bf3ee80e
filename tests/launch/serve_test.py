"""uni-moe serve --workdir: which folder it exports to, with a stand-in for the export."""

import json
import os
import pathlib
import shutil
import time
import types
from collections.abc import Sequence

import pytest

from tests.helpers import in_process, processes
from uni_moe_jax import __version__
from uni_moe_jax.serve import exported
from uni_moe_jax.train import manifest
from uni_moe_jax.train.workdir import load_config, model_fingerprint


def _run(folder: pathlib.Path, *steps: int, init: str = '', content: str = 'of a model', seed: int = 0,
         losses: Sequence[float] = ()) -> pathlib.Path:
  """Writes the work directory of a run with checkpoints of one file. losses: by step."""
  folder.mkdir(exist_ok=True)
  train = {'init': init, 'best_metric': '' if init else 'loss/total'}
  (folder / 'config.json').write_text(
      json.dumps({'uni_moe_jax': __version__, 'config': {'seed': seed, 'train': train}}))
  metrics = {step: {'loss/total': loss} for step, loss in zip(steps, losses, strict=False)}
  for step in steps:
    checkpoint = folder / 'checkpoints' / str(step)
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / 'arrays').write_text(content)
    (checkpoint / '_CHECKPOINT_METADATA').write_text('{}')
    manifest.write(checkpoint, checkpoint, metrics.get(step, {}), {}, {})
    (checkpoint / 'commit_success.txt').write_text(f'Checkpoint commit was successful to {checkpoint}')
  return folder


@pytest.fixture(name='export')
def _export(monkeypatch):
  """Starts the service with a stand-in for the export; returns the step that is served, and whether it exported.

  reads: the step that the export reads. more: arguments. code: its exit code, which is returned. other: what another
  start exports.
  """
  def start(workdir, reads=None, *more, code=0, init='', other=None):
    exports, served = [], []

    def write(output, step, fingerprint):
      output.mkdir(parents=True)
      (output / 'SHA256SUMS').write_text(str(step))
      (output / 'manifest.json').write_text(json.dumps({'provenance': {
          'step': step, 'checkpoint (fingerprint)': fingerprint}}))

    def run(command, **_):
      [output] = [pathlib.Path(a.removeprefix('--output=')) for a in command if a.startswith('--output=')]
      exports.append(output)
      assert f'--best={"--best" in more}' in command
      write(output, reads, model_fingerprint(workdir, init, reads))
      if other is not None:
        digest = model_fingerprint(workdir, init, other)
        config = load_config(workdir).to_json(sort_keys=True)
        write(workdir / 'served' / exported.name(other, digest, config), other, digest)
      return types.SimpleNamespace(wait=lambda: code)

    with monkeypatch.context() as patch:
      patch.setattr(exported.signals, 'start', run)
      patch.setattr(exported, 'make', lambda *given: served.append(make(*given)) or served[0])
      try:
        started = in_process.run(processes.ROOT / 'launch/serve.py', f'--workdir={workdir}', '--export_only', *more)
      except SystemExit as stopped:
        started = stopped.code
    assert started == code and not any(output.parent.exists() for output in exports)
    return code or (int((served[0] / 'SHA256SUMS').read_text()), bool(exports))

  make = exported.make
  return start


_EXPORTED, _KEPT = True, False


def test_a_run_is_exported_once_per_checkpoint(tmp_path, export):
  run = _run(tmp_path / 'run', 3)
  assert export(run, 3) == (3, _EXPORTED) and export(run) == (3, _KEPT)
  assert export(_run(run, 5), 5) == (5, _EXPORTED)
  assert export(_run(run, 5, content='of another model'), 5) == (5, _EXPORTED)


def test_a_run_is_exported_again_with_another_config(tmp_path, export):
  run = _run(tmp_path / 'run', 3)
  assert export(run, 3) == (3, _EXPORTED)
  assert export(_run(run, seed=1), 3) == (3, _EXPORTED) and export(run) == (3, _KEPT)


def test_the_folder_of_an_export_depends_on_all_that_it_is_made_of():
  others = (4, 'a', 'c'), (3, 'b', 'c'), (3, 'a', 'd'), (3, 'a', 'c', ('9.0', 3)), (3, 'a', 'c', (__version__, 9))
  names = {exported.name(*given) for given in ((3, 'a', 'c'), *others)}
  assert len(names) == 6 and exported.name(3, 'a', 'c') in names


def test_while_the_newest_checkpoint_is_damaged_the_one_before_it_is_exported_once(tmp_path, export, capfd):
  run = _run(tmp_path / 'run', 3, 5)
  (run / 'checkpoints/5/arrays').write_text('of no model')
  assert export(run, reads=3) == (3, _EXPORTED) and export(run) == (3, _KEPT)
  assert f'{run}/checkpoints/5 is damaged: arrays has 11 bytes instead of 10' in capfd.readouterr().err
  assert export(_run(run, 5), 5) == (5, _EXPORTED) and export(run) == (5, _KEPT)
  (run / 'checkpoints/5/arrays').write_text('of a MODEL')  # it is not read where there is an export
  assert export(run) == (5, _KEPT)


def test_a_checkpoint_that_its_run_deletes_while_it_is_verified_is_not_damaged(tmp_path, export, monkeypatch, capfd):
  run, damage = _run(tmp_path / 'run', 3), manifest.damage
  assert export(run, 3) == (3, _EXPORTED)
  _run(run, 5)

  def trained_on(folder):
    if folder.name == '5' and folder.exists():
      shutil.rmtree(folder)
      _run(run, 7)
    return damage(folder)

  monkeypatch.setattr(manifest, 'damage', trained_on)
  assert export(run, 7) == (7, _EXPORTED)
  assert 'damaged' not in capfd.readouterr().err


def test_the_best_checkpoint_is_exported_beside_the_newest(tmp_path, export):
  run = _run(tmp_path / 'run', 3, 5, 7, losses=(2, 1, 3))
  assert export(run, 7) == (7, _EXPORTED)
  assert export(run, 5, '--best') == (5, _EXPORTED) and export(run, None, '--best') == (5, _KEPT)
  assert export(run) == (7, _KEPT)
  zero_shot = _run(tmp_path / 'zero_shot', init=str(_run(tmp_path / 'parent', 3, 5, losses=(1, 2))))
  assert export(zero_shot, 3, '--best', init=str(tmp_path / 'parent')) == (3, _EXPORTED)
  assert export(zero_shot, None, '--best') == (3, _KEPT)


def test_instead_of_the_best_checkpoint_that_is_damaged_no_other_is_served(tmp_path, export):
  run = _run(tmp_path / 'run', 3, losses=(2,))
  assert export(run, 3, '--best') == (3, _EXPORTED)
  _run(run, 5, 7, losses=(1, 3))
  (run / 'checkpoints/5/arrays').write_text('of no model')
  assert export(run, 5, '--best', code=1) == 1  # the export reports it


def test_while_the_newest_checkpoint_is_the_best_and_damaged_the_best_before_it_is_exported_once(tmp_path, export):
  run = _run(tmp_path / 'run', 3, 5, 7, losses=(2, 3, 1))
  (run / 'checkpoints/7/arrays').write_text('of no model')
  assert export(run, 3, '--best') == (3, _EXPORTED) and export(run, None, '--best') == (3, _KEPT)


def test_an_exported_folder_has_no_best_checkpoint():
  done = in_process.python('launch/serve.py', '--model=exported', '--best')
  assert done.returncode == 2 and '--best is for --workdir=RUN' in done.stderr


def test_an_export_that_was_killed_stops_no_other_and_is_removed_after_a_day(tmp_path, export):
  run = _run(tmp_path / 'run', 3)
  for folder, hours in ((old := run / 'served/.3-a.1', 25), (new := run / f'served/.3-a.{os.getpid()}', 1)):
    folder.mkdir(parents=True)
    os.utime(folder, (when := time.time() - hours * 3600, when))
  assert export(run, 3) == (3, _EXPORTED)
  assert new.exists() and not old.exists()


def test_of_two_starts_that_export_at_once_the_later_uses_what_the_other_has_made(tmp_path, export):
  assert export(_run(tmp_path / 'both', 3), 3, other=3) == (3, _EXPORTED)
  assert export(_run(tmp_path / 'alone', 3), 3, code=2) == 2


def test_a_run_that_trains_nothing_is_exported_once_per_checkpoint_of_the_run_whose_parameters_it_has(tmp_path, export):
  parent = _run(tmp_path / 'parent', 3)
  run, init = _run(tmp_path / 'run', init=str(parent)), str(parent)
  assert export(run, 3, init=init) == (3, _EXPORTED) and export(run, init=init) == (3, _KEPT)
  _run(parent, 3, content='of another model')
  assert export(run, 3, init=init) == (3, _EXPORTED)
  _run(parent, 5)
  assert export(run, 5, init=init) == (5, _EXPORTED)
  assert export(_run(run, 2, init=init), 2, init=init) == (2, _EXPORTED)  # a run that trains: its own
