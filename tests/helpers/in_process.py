"""Launch scripts that run in this process, because starting Python and JAX takes seconds; `uni-moe` for shells."""

import contextlib
import io
import pathlib
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
from absl import flags

from tests.helpers import processes
from uni_moe_jax.cli import boundary as cli


@contextlib.contextmanager
def loaded(script: pathlib.Path, *arguments: str,
           parse: Callable[[Sequence[str]], object] = flags.FLAGS) -> Iterator[Callable[[], int]]:
  """Load a script and parse its flags; its `main`, which is not called. The flags exist until the block ends."""
  argv, others, own = [str(script), *arguments], set(flags.FLAGS), set()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('sys.argv', argv)  # config files read their overrides there
    try:
      try:
        main = runpy.run_path(str(script), run_name='launched')['main']
        parse(argv)
      finally:
        own = set(flags.FLAGS) - others  # without flags of libraries that `main` imports, which still read them
      yield main
    finally:
      flags.FLAGS.remove_flag_values(own)


def run(script: pathlib.Path, *arguments: str) -> int:
  """Run a script with the output of this process. Remove its flags. Return the exit code."""
  with loaded(script, *arguments) as main:
    return cli.guarded(main)


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
  """Run a script as `processes.python` would, for mistakes that do not concern the settings of a process."""
  with (contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors,
        contextlib.chdir(processes.ROOT)):
    try:
      with loaded(processes.ROOT / script, *map(str, arguments), parse=cli._parse) as main:
        code = cli.guarded(main)
    except SystemExit as stopped:
      code = stopped.code
  return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def write_command(path: pathlib.Path, **variables: str) -> None:
  """Write an executable `uni-moe` of this working tree, as an installation would, with these environment variables."""
  path.parent.mkdir(parents=True, exist_ok=True)
  settings = ''.join(f'{k}={shlex.quote(v)} ' for k, v in {'PYTHONPATH': str(processes.ROOT), **variables}.items())
  code = 'from uni_moe_jax.cli.command import main; main()'
  path.write_text(f'#!/bin/sh\n{settings}exec {sys.executable} -c "{code}" "$@"\n')
  path.chmod(0o755)
