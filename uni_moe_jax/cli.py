"""The boundary between the command line and the library: a person's mistake ends in one sentence and exit code 2."""

import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from uni_moe_jax.tasks import nearest

ERROR, USAGE = 1, 2
_PACKAGE = pathlib.Path(__file__).resolve().parent


class UsageError(ValueError):
  """A mistake that a launch script itself finds."""


def define_config(name: str = 'config') -> flags.FlagHolder:
  """--config=FILE.py[:argument], with --config.field=value overrides."""
  return config_flags.DEFINE_config_file(name, help_string='config file, for example configs/quickstart.py')


def run(main: Callable[[], int]) -> None:
  """Parses flags, runs `main` and exits with the code that it returns.

  Mistakes in flags and config, and the `ValueError` and `FileNotFoundError` that this package raises on purpose, are
  printed as one sentence (exit code 2). Anything else is a defect and keeps its traceback (exit code 1).
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # TensorFlow only feeds data here, and would announce oneDNN
  logging.set_verbosity(logging.WARNING)  # the libraries' own progress is not ours
  app.run(lambda _: sys.exit(_guarded(main)), flags_parser=_parse)


def _guarded(main: Callable[[], int]) -> int:
  try:
    return main()
  except (ValueError, FileNotFoundError) as e:
    if not isinstance(e, UsageError) and not _is_ours(e):
      raise
    return _complain(e)


def _is_ours(e: BaseException) -> bool:
  """Whether the exception was raised by a line of this package, not by a library that it called."""
  frames = traceback.extract_tb(e.__traceback__)
  return bool(frames) and _PACKAGE in pathlib.Path(frames[-1].filename).resolve().parents


def _complain(e: BaseException) -> int:
  print(f'error: {" ".join(str(e).split())}', file=sys.stderr, flush=True)
  return USAGE


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, ValueError, TypeError, FileNotFoundError, ImportError) as e:
    print(f'error: {_flag_error(e, argv)}', file=sys.stderr, flush=True)
    sys.exit(USAGE)
  if len(rest) > 1:
    print(f'error: unexpected argument {rest[1]!r}; flags look like --name=value.', file=sys.stderr, flush=True)
    sys.exit(USAGE)
  return rest


def _flag_error(e: BaseException, argv: Sequence[str]) -> str:
  """One sentence for what the flag parser said; names the nearest fields of the config."""
  config = flags.FLAGS['config'].value if 'config' in flags.FLAGS else None
  for argument in argv[1:]:
    name = argument.lstrip('-').partition('=')[0]
    if config is None or not name.startswith('config.'):
      continue
    here, path = config, name.split('.')[1:]
    for i, part in enumerate(path):
      if not hasattr(here, 'keys'):
        break
      if part not in here:
        return f'config has no field {".".join(path[:i + 1])!r}; {nearest(part, here.keys())}.'
      here = here[part]
  return ' '.join(str(e).split())
