"""The modules that lie in an exported folder."""

import importlib.util
import pathlib
import types


def module(folder: pathlib.Path, name: str = 'load') -> types.ModuleType:
  """load.py or texts.py of a folder."""
  spec = importlib.util.spec_from_file_location(name, folder / f'{name}.py')
  found = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(found)
  return found
