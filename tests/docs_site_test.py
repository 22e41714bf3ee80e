"""The site builds without a warning, and notebooks run."""

import os
import re
import sys

import nbclient
import nbformat
import pytest

from tests.helpers import fast_compile, in_process, processes

_NOTEBOOKS = sorted((processes.ROOT / 'docs/notebooks').glob('*.ipynb'))
_MAX_BYTES = 100_000  # of a notebook, with its figures


def test_there_are_three_notebooks():
  assert [path.stem for path in _NOTEBOOKS] == ['experts', 'own_images', 'run']


def test_the_site_builds_without_warnings(tmp_path):
  done = processes.python('-m', 'mkdocs', 'build', '--strict', '--site-dir', str(tmp_path), NO_MKDOCS_2_WARNING='1')
  assert done.returncode == 0, done.stderr
  docs = processes.ROOT / 'docs'
  pages = [str(page.relative_to(docs).with_suffix('')) for page in docs.rglob('*.md')]
  assert all((tmp_path / page.removesuffix('index') / 'index.html').is_file() for page in pages)


def test_a_broken_link_is_a_warning(tmp_path):
  for name in ('mkdocs.yml', 'docs', 'uni_moe_jax'):
    (tmp_path / name).symlink_to(processes.ROOT / name)
  (tmp_path / 'docs').unlink()
  (tmp_path / 'docs').mkdir()
  for path in (processes.ROOT / 'docs').iterdir():
    (tmp_path / 'docs' / path.name).symlink_to(path)
  (tmp_path / 'docs/index.md').unlink()
  (tmp_path / 'docs/index.md').write_text('[Data](guides/data.md#no-such-section)')
  done = processes.python('-m', 'mkdocs', 'build', '--strict', '--config-file', str(tmp_path / 'mkdocs.yml'),
                          '--site-dir', str(tmp_path / 'site'), NO_MKDOCS_2_WARNING='1')
  assert done.returncode != 0 and 'no-such-section' in done.stderr


@pytest.mark.parametrize('path', _NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_small_outputs_of_this_version(path):
  notebook = nbformat.read(path, 4)
  assert path.stat().st_size < _MAX_BYTES
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
  assert not re.search(r'Traceback|/root|/home|/tmp', path.read_text())


@pytest.mark.nightly
@pytest.mark.parametrize('path', _NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
  monkeypatch.setenv('NOTEBOOK_STEPS', '4')
  monkeypatch.setenv('XLA_FLAGS', fast_compile.environment_flags(1))
  monkeypatch.setenv('HOME', str(tmp_path))  # of data and tokenizers
  in_process.write_command(tmp_path / 'bin/uni-moe')
  path_of_python = os.path.dirname(sys.executable)
  monkeypatch.setenv('PATH', os.pathsep.join([str(tmp_path / 'bin'), path_of_python, os.environ['PATH']]))
  monkeypatch.setenv('PYTHONPATH', str(processes.ROOT))
  notebook = nbformat.read(path, 4)
  nbclient.NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(tmp_path)}}).execute()
  outputs = ''.join(output.get('text', '') for cell in notebook.cells if cell.cell_type == 'code'
                    for output in cell.outputs)
  assert 'trained 4 steps' in outputs and 'warning' not in outputs.lower()
