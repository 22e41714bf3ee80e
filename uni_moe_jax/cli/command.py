"""The command uni-moe: runs a launch script by name. Only the standard library is imported before the script is."""

import pathlib
import sys
import types
from collections.abc import Sequence

import uni_moe_jax
from uni_moe_jax.cli import shipped
from uni_moe_jax.utils import exit_codes
from uni_moe_jax.utils.suggest import nearest

GROUPS = {
    'Train and evaluate': ('prepare-data', 'train', 'evaluate', 'report', 'keep-running'),
    'Use a trained run': ('serve', 'export', 'convert'),
    'Analyze': ('interference', 'experts', 'sweep'),
    'Plan': ('preflight',)}
_HEAD = """Train, adapt, analyze and export sparse generalist models.

Usage: uni-moe COMMAND [--FLAG=VALUE ...]
       uni-moe help NAME                    flags of a command, or arguments of a config
"""
_EXAMPLE = """A first run, in about twenty minutes on two CPU cores:
  uni-moe prepare-data
  uni-moe train --config=quickstart --workdir=runs/quickstart --compile_separately
  uni-moe evaluate --workdir=runs/quickstart

Exit codes: 0 finished, 75 stopped by a signal (the same command continues), 1 error, 2 wrong usage."""


def main(arguments: Sequence[str] | None = None) -> None:
  """Run `uni-moe COMMAND …`, by default with the arguments of this process."""
  arguments = sys.argv[1:] if arguments is None else arguments
  name, scripts = arguments[0] if arguments else '', shipped.scripts()
  if name in scripts:
    run(scripts[name], arguments[1:])
  elif name in ('help', '--help', '-h', '--version'):
    _help(arguments)
  elif name:
    print(f'error: uni-moe: command {name!r} is unknown; {nearest(name, scripts)}.', file=sys.stderr)
    sys.exit(exit_codes.USAGE)
  else:
    print(_overview(), file=sys.stderr)
    sys.exit(exit_codes.USAGE)


def run(file: pathlib.Path, arguments: Sequence[str], module: str = '__main__') -> None:
  """Execute the script of a command as the named module, as `python launch/NAME.py` would."""
  main_module = types.ModuleType(module)
  main_module.__file__ = str(file)  # from which processes that this one spawns import it
  sys.modules[module], sys.argv = main_module, [f'uni-moe {shipped.command_name(file)}', *arguments]
  exec(compile(file.read_text(encoding='utf-8'), file, 'exec'), vars(main_module))


def _help(arguments: Sequence[str]) -> None:
  """Print help of `uni-moe help [NAME]`, --help or --version."""
  name, configs, scripts = ''.join(arguments[1:2]), shipped.configs(), shipped.scripts()
  if arguments[0] == '--version':
    print(f'uni-moe {uni_moe_jax.__version__}')
  elif not name:
    print(_overview())
  elif name not in configs and name not in scripts:
    print(f'error: uni-moe help: {name!r} is unknown; {nearest(name, {**scripts, **configs})}.', file=sys.stderr)
    sys.exit(exit_codes.USAGE)
  if name in configs:  # a command may have the same name
    print(shipped.docstring(configs[name]), end='\n\n')
  if name in scripts:
    run(scripts[name], ['--help'])


def _overview() -> str:
  """Return the text of `uni-moe --help`: one line per command and config, from its docstring."""
  scripts = shipped.scripts()
  parts = [_HEAD]
  for title, names in GROUPS.items():
    parts += [f'{title}:', *(_line(name, scripts[name]) for name in names if name in scripts), '']
  parts += ['Configs, for --config=NAME or --config=NAME:ARGUMENT=VALUE,… (or the path of a file of your own):',
            *(_line(name, file) for name, file in shipped.configs().items()), '', _EXAMPLE]
  return '\n'.join(parts)


def _line(name: str, file) -> str:
  return f'  {name:14}{shipped.docstring(file).partition(chr(10))[0].rstrip(".:")}'
