"""Every test in this folder is nightly: it kills, starves and damages runs, or generates bad input."""

import pathlib

import pytest


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(items):
  for item in items:
    if item.path.is_relative_to(pathlib.Path(__file__).parent):
      item.add_marker(pytest.mark.nightly)
