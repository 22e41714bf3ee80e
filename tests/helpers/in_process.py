"""A launch script without a process of its own, for what does not depend on one: starting Python and JAX takes seconds."""

import pathlib
import runpy

import pytest
from absl import flags

from uni_moe_jax.utils import cli


def run(script: pathlib.Path, *arguments: str) -> int:
  """The exit code of a script; what it says goes where this process writes. Its flags are gone afterwards."""
  argv, others, own = [str(script), *arguments], set(flags.FLAGS), set()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('sys.argv', argv)  # config files look for their fields' flags there
    try:
      try:
        main = runpy.run_path(str(script), run_name='launched')['main']
        flags.FLAGS(argv)
      finally:
        own = set(flags.FLAGS) - others  # and none of a library that `main` loads, which goes on reading its own
      return cli.guarded(main)
    finally:
      flags.FLAGS.remove_flag_values(own)
