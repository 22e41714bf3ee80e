"""Launch scripts that run in this process, because starting Python and JAX takes seconds; `uni-moe` for shells."""

import contextlib
import pathlib
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator

import pytest
from absl import flags

from tests.helpers import processes
from uni_moe_jax.utils import cli


@contextlib.contextmanager
def loaded(script: pathlib.Path, *arguments: str) -> Iterator[Callable[[], int]]:
  """Load a script and parse its flags; its `main`, which is not called. The flags exist until the block ends."""
  argv, others, own = [str(script), *arguments], set(flags.FLAGS), set()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('sys.argv', argv)  # config files read their overrides there
    try:
      try:
        main = runpy.run_path(str(script), run_name='launched')['main']
        flags.FLAGS(argv)
      finally:
        own = set(flags.FLAGS) - others  # without flags of libraries that `main` imports, which still read them
      yield main
    finally:
      flags.FLAGS.remove_flag_values(own)


def run(script: pathlib.Path, *arguments: str) -> int:
  """Run a script with the output of this process. Remove its flags. Return the exit code."""
  with loaded(script, *arguments) as main:
    return cli.guarded(main)


def write_command(path: pathlib.Path, **variables: str) -> None:
  """Write an executable `uni-moe` of this working tree, as an installation would, with these environment variables."""
  path.parent.mkdir(parents=True, exist_ok=True)
  settings = ''.join(f'{k}={shlex.quote(v)} ' for k, v in {'PYTHONPATH': str(processes.ROOT), **variables}.items())
  code = 'from uni_moe_jax.utils.command import main; main()'
  path.write_text(f'#!/bin/sh\n{settings}exec {sys.executable} -c "{code}" "$@"\n')
  path.chmod(0o755)
