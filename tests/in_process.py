"""A launch script without a process of its own, for what does not depend on one: starting Python and JAX takes seconds."""

import pathlib
import runpy

from absl import flags
import pytest

from uni_moe_jax import cli


def run(script: pathlib.Path, *arguments: str) -> int:
  """The exit code of a script; what it says goes where this process writes. Its flags are gone afterwards."""
  argv, others = [str(script), *arguments], set(flags.FLAGS)
  try:
    main = runpy.run_path(str(script), run_name='launched')['main']
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr('sys.argv', argv)  # config files look for their fields' flags there
      flags.FLAGS(argv)
      return cli.guarded(main)
  finally:
    flags.FLAGS.remove_flag_values(set(flags.FLAGS) - others)
