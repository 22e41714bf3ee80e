"""The modules in an exported folder."""

import importlib.util
import pathlib
import types


def module(folder: pathlib.Path, name: str = 'load') -> types.ModuleType:
  """Import load.py or texts.py of a folder."""
  spec = importlib.util.spec_from_file_location(name, folder / f'{name}.py')
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded
