"""The error boundary of the commands: a mistake of the user ends in one sentence and exit code 2."""

import atexit
import contextlib
import os
import pathlib
import re
import shlex
import signal
import sys
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from uni_moe_jax.cli import output, shipped
from uni_moe_jax.io import files, hub, storage
from uni_moe_jax.utils import errors, heap, signals
from uni_moe_jax.utils.errors import RunError, UsageError
from uni_moe_jax.utils.exit_codes import ERROR, FINISHED, USAGE
from uni_moe_jax.utils.suggest import nearest

_MAX_PATH = 200  # characters of a path in a message
# Errors of parsing flags, which loads the config file.
_PARSE_ERRORS = flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError, ImportError
_MISTAKE_FILE = 'UNI_MOE_MISTAKE_FILE'  # environment: a file that is created where a command ends with code 2
_endings: list[Callable[[int], None]] = []
# Given a config and its overridden fields, raise UsageError; `uni_moe_jax.config`, which imports this, adds its own.
override_checks: list[Callable[[ml_collections.ConfigDict, Collection[str]], Any]] = []

flags.disclaim_key_flags()  # --help of a script lists the flags that it defines through this module


class _ConfigParser(ConfigFileFlagParser):
  """Parser of the value of --config, which may be the name of a config."""

  def parse(self, path: str) -> Any:
    return super().parse(shipped.config_path(path))


def define_config(default: str | None = None) -> flags.FlagHolder:
  """Define --config=NAME[:arguments] or FILE.py[:arguments], with --config.field=value overrides."""
  return _define_config(flags.FLAGS, default, help_string=(
      f'A config ({", ".join(shipped.configs())}) or FILE.py, and its arguments, if any: NAME:ARGUMENT=VALUE,…; '
      'uni-moe help NAME describes them. --config.FIELD=VALUE overrides a field, for example '
      '--config.train.steps=100.'))


def _define_config(values: flags.FlagValues, default: str | None, **options) -> flags.FlagHolder:
  holder = config_flags.DEFINE_config_file('config', flag_values=values, **options)
  values['config'].parser = _ConfigParser('config')  # DEFINE_config_file takes no parser
  if default is not None:
    values.set_default('config', default)
  return holder


def config_of(holder: flags.FlagHolder, values: flags.FlagValues = flags.FLAGS) -> ml_collections.ConfigDict:
  """Return the config of a flag; in `train.init`, a revision of the Hub is replaced by its commit.

  Raise UsageError if the file does not exist or an override is wrong, OSError if the file raised it.
  """
  try:
    holder.value.keys()
  except OSError as e:  # ml_collections keeps an OSError until the first access to the config
    raise _loading_error(e) from None
  config = holder.value
  if overrides := config_flags.get_override_values(values[holder.name]):
    for check in override_checks:
      check(config, overrides)
  if isinstance(init := config.get('train', {}).get('init'), str):
    config.train.init = hub.pinned(init, 'config.train.init')
  return config


def _loading_error(e: OSError) -> BaseException:
  """Return the error of a config file that does not exist or that raised an OSError."""
  cause = e.__cause__
  if not str(cause).startswith('Failed loading config file'):
    return cause or e
  path = pathlib.Path(str(cause).split()[-1].strip("'"))
  files_near = [f.name for f in path.parent.glob('*.py')]
  return UsageError(f"config file '{path}' does not exist; {nearest(path.name, files_near or shipped.configs())}.")


def config_from(file: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
  """Return the config of --config=`file` with --config.`o` for each o = 'field=value' of `overrides`.

  Raises:
    UsageError: the file raises an error, or an override has an unknown field or a wrong value.
  """
  argv, values = ['', f'--config={file}', *(f'--config.{o}' for o in overrides)], flags.FlagValues()
  holder = _define_config(values, None, sys_argv=argv)
  try:
    values(argv)
    return config_of(holder, values)
  except _PARSE_ERRORS as e:
    raise UsageError(_flag_error(e, argv)) from None


def run(main: Callable[[], int], local: Sequence[str] = ()) -> None:
  """Parse flags, run `main` and exit with the code that it returns.

  Mistakes in flags, and every `UsageError`, are printed as one sentence (exit code 2); so are `RunError`, a full disk
  and a path that cannot be accessed (exit code 1), and Ctrl-C, which ends the process by SIGINT. Any other exception is
  a defect and keeps its traceback (exit code 1).

  Args:
    main: the command.
    local: names of its flags that must be paths of a disk; others may be addresses in buckets.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # TensorFlow only feeds data; oneDNN would print a notice
  # Batches and their parts are made in parallel; splitting ops as well made 0.8 times as many JPEGs on two cores.
  os.environ.setdefault('TF_NUM_INTRAOP_THREADS', '1')
  heap.keep_memory()
  output.outlive_readers()
  logging.set_verbosity(logging.WARNING)  # no progress messages of libraries
  _silence_repeated_errors()
  sys.excepthook = _report_exception
  app.run(lambda _: sys.exit(guarded(main)), flags_parser=lambda argv: _parse(argv, local))


def command_line() -> str:
  """Return the command of this process as a person would repeat it."""
  program = sys.argv[0] if sys.argv[0].startswith('uni-moe ') else shlex.join(['python', sys.argv[0]])
  return ' '.join([program, *map(shlex.quote, sys.argv[1:])])


@contextlib.contextmanager
def exit_on_signals(code: int) -> Iterator[None]:
  """End the process at once with `code` on SIGINT and SIGTERM, unless code inside handles them."""
  def end(number, _) -> None:
    output.write_error(f'\n{signal.Signals(number).name}: stopped; the same command continues.\n')
    os._exit(code)

  with signals.handled(end, signal.SIGINT, signal.SIGTERM):
    yield


def _silence_repeated_errors() -> None:
  """Silence Orbax's log of errors in its threads, which are raised again and reported in the main thread."""
  logging.get_absl_handler().addFilter(
      lambda record: not (record.exc_info and ('orbax' in record.pathname or record.name == 'asyncio')))

  def unraisable(unraised) -> None:  # of pending reads and writes, after one of them failed
    if str(unraised.exc_value) != 'Event loop is closed':
      sys.__unraisablehook__(unraised)

  sys.unraisablehook = unraisable


def _report_exception(cls: type[BaseException], e: BaseException, traceback: types.TracebackType | None) -> None:
  """Print an exception that ends the command; Ctrl-C without the lines that happened to run."""
  if issubclass(cls, KeyboardInterrupt):
    with contextlib.suppress(OSError, ValueError):  # whatever reads them may have ended by the same Ctrl-C
      sys.stdout.flush()
      print('\nSIGINT: stopped.', file=sys.stderr, flush=True)
    # At once: Python would end by this signal, too, but only when threads that compute have finished.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
  else:
    sys.__excepthook__(cls, e, traceback)


def at_failure(end: Callable[[int], None]) -> None:
  """Call `end` with the exit code where an error ends the command, once it is reported."""
  _endings.append(end)


def guarded(main: Callable[[], int]) -> int:
  """Return the exit code of `main`. Errors are printed as one sentence, see `run`."""
  try:
    return main()
  except Exception as e:
    message, code = (str(e), USAGE) if isinstance(e, UsageError) else (_sentence(e), ERROR)
    if message is None:
      for end in _endings:
        atexit.register(end, ERROR)  # after the traceback
      raise
    _report(message, code)
    for end in _endings:
      end(code)
    return code


def _sentence(e: Exception) -> str | None:
  """Return what an error that no change of the command would avoid means; None for a defect."""
  if isinstance(e, RunError):
    return str(e)
  if errors.disk_is_full(e):
    file = getattr(e, 'filename', None)
    what = f': {file} could not be written' if file else ''
    return f'the disk is full{what}. Free some space and repeat the same command; it continues.'
  if isinstance(e, OSError) and e.filename is not None:
    return (f'{str(e.filename)[:_MAX_PATH]}: {e.strerror}. Check that the path is correct, that its disk is reachable '
            'and that you have permission to read and write it.')
  buckets = dict.fromkeys(re.findall(r'(?:gs|s3)://[^\s,]+', ' '.join(sys.argv)))
  return storage.explain(e, ' or '.join(buckets)) if buckets else None


def _report(message: str, code: int) -> int:
  """Print an error as one line. Return the exit code."""
  print(f'error: {" ".join(message.split())}', file=sys.stderr, flush=True)
  if code == USAGE and (file := os.environ.get(_MISTAKE_FILE)):
    with contextlib.suppress(OSError):
      pathlib.Path(file).touch()
  return code


def _parse(argv: Sequence[str], local: Sequence[str] = ()) -> list[str]:
  try:
    for before, argument in zip(argv, argv[1:]):
      flag, _, value = argument.partition('=')
      path, name = (value, flag) if value and argument.startswith('-') else (argument, before)
      # Fields and arguments of a config are checked later; not all are paths, and some may be in buckets.
      if re.match(r'--?(\w+\.|config$)', name):
        continue
      if name.lstrip('-') in local:
        files.check_local(path, name)
      elif name.startswith('-'):
        storage.check_access(storage.path(path, name), name)
    rest = flags.FLAGS(argv)
  except SystemExit:  # --help, for which absl exits with 1
    sys.exit(FINISHED)
  except (UsageError, RunError) as e:
    sys.exit(_report(str(e), USAGE if isinstance(e, UsageError) else ERROR))
  except _PARSE_ERRORS as e:
    sys.exit(_report(_flag_error(e, argv), USAGE))
  if len(rest) > 1:
    sys.exit(_report(f'unexpected argument {rest[1]!r}; flags look like --name=value.', USAGE))
  return rest


def _flag_error(e: BaseException, argv: Sequence[str]) -> str:
  """Return one sentence for an error of the flag parser."""
  if isinstance(e, OSError):
    return str(_loading_error(e))
  if isinstance(e, flags.DuplicateFlagError):  # the flags of its fields: each --config that has overrides defines them
    return '--config is given twice; give it once.'
  message = ' '.join(str(e.args[0] if e.args else e).split())
  if isinstance(e, (KeyError, AttributeError)):  # ml_collections: 'widht' Did you mean "width" instead of "widht"?
    [field, *_], hint = re.findall(r'\w+', message), ''.join(re.findall(r'Did you mean [^?]*\?', message)[:1])
    arguments = [a for a in argv[1:] if field in a.lstrip('-').partition('=')[0].split('.')]
    flag = arguments[0].partition('=')[0] if arguments else field
    return f'{flag}: the config has no field {field!r}. {hint}'.strip()
  # ml_collections puts the traceback of a config file that raised an error into the message.
  raised = re.search(r'Error whilst parsing config file: .*Error: (.*)', message)
  message = raised.group(1) if raised else message
  if re.match(r'get_config\(\) takes 0 positional arguments', message):
    config = next((a.partition('=')[2] for a in argv if re.match('--?config=', a)), 'NAME:…')
    return f'--config={config}: this config has no arguments; write --config={config.partition(":")[0]}.'
  return message
