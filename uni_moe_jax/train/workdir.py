"""The folder of a run, which belongs to one config.

It stores the config with package versions and the data's fingerprint. A second start of the same command resumes the
run; another config is refused. This module imports nothing slow, so that a wrong folder is reported at once.
"""

import importlib.metadata
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from uni_moe_jax import __version__
from uni_moe_jax.config.fields import with_floats
from uni_moe_jax.config.schema import PATHS, Config, apply_choices, base, parse_config
from uni_moe_jax.data.text import class_names
from uni_moe_jax.io import hub, storage
from uni_moe_jax.io.files import read_json, write_json
from uni_moe_jax.train import manifest
from uni_moe_jax.utils.errors import MissingFileError, UsageError, first_few

CONFIG_FILE = 'config.json'
RUN_FILE = 'run.json'
CONVERSION_FILE = 'conversion.json'  # of a converted checkpoint: where each array went
CHECKPOINTS = 'checkpoints'  # with one folder per checkpoint, named by its step
DAMAGED = 'damaged'  # where damaged checkpoints are moved
TOKENIZER_STEM = 'tokenizer'
# Packages that compute, and that read data; `av` is an extra.
VERSIONED = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tensorflow', 'numpy', 'tensorflow-datasets',
             'array_record', 'av')
_PACKAGE = 'uni_moe_jax'  # key of the version that created the work directory
_ABSENT = 'absent'
_CLASSES = 'classes (fingerprints)'  # of `class_digests` in the provenance of an export
# Fields that may change when a run continues: logging and saving, paths of the data, layout on devices and kernels. The
# content of tokenizer.merges_path is part of the data's fingerprint.
MAY_CHANGE = (
    'train.log_every', 'train.checkpoint_every', 'train.max_to_keep', 'train.keep_every', 'train.best_metric',
    'train.evaluate_every', 'train.max_nonfinite_steps', 'train.hang_timeout', 'train.deterministic',
    'data.dir', 'data.cache_dir', 'data.cache_gb', 'data.max_corrupt_fraction', 'preflight', 'mesh',
    'model.attention_impl', 'moe.gmm', 'evaluators', 'tokenizer.merges_path')
_NO_PROTOCOL = ('batch_size', 'baselines', 'during_training')  # fields of an evaluator that change no score
_OTHER_DATA = ('a source was prepared again or has a newer version (the newest is read), the data directory or '
               'tokenizer file has changed, or an older version of this package trained the tokenizer.')


def saved_steps(workdir: str | os.PathLike[str]) -> list[int]:
  """Steps of the finished checkpoints in a work directory, in order, not verified; [] if it does not exist."""
  return sorted(int(p.name) for p in _step_folders(workdir) if not manifest.is_unfinished(p))


def unfinished_folders(workdir: str | os.PathLike[str]) -> list[storage.Path]:
  """Folders of checkpoints that are being written in place, or that a process left which has ended."""
  return [p for p in _step_folders(workdir) if manifest.is_unfinished(p)]


def _step_folders(workdir: str | os.PathLike[str]) -> list[storage.Path]:
  folders = (storage.path(workdir) / CHECKPOINTS).glob('*')
  return [p for p in folders if p.name.isdecimal() and p.is_dir()]


def saved_step(workdir: str | os.PathLike[str]) -> int | None:
  """The newest of `saved_steps`."""
  return max(saved_steps(workdir), default=None)


def trained_in(workdir: str | os.PathLike[str], init: str) -> str | os.PathLike[str]:
  """The work directory whose checkpoints a run has: of one that trains nothing, the run in `init`, its `train.init`."""
  return init if init and saved_step(workdir) is None else workdir


def model_fingerprint(workdir: str | os.PathLike[str], init: str, step: int) -> str:
  """Digest of a checkpoint of a run; see `trained_in`."""
  return manifest.fingerprint(storage.path(trained_in(workdir, init)) / CHECKPOINTS / str(step))


def is_finished(workdir: str | os.PathLike[str], steps: int) -> bool:
  """Whether a work directory has a checkpoint of so many steps, not verified."""
  return (saved_step(workdir) or 0) >= steps


def versions() -> dict[str, str]:
  """Installed versions of the packages that a checkpoint depends on."""
  out = {}
  for name in VERSIONED:
    try:
      out[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      out[name] = importlib.metadata.version('tensorflow-cpu') if name == 'tensorflow' else _ABSENT
  return out


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  if not isinstance(tree, dict) or not tree:
    return {prefix: tree}
  return {k: v for key, sub in tree.items() for k, v in _flat(sub, f'{prefix}.{key}' if prefix else key).items()}


def differences(old: dict[str, Any], new: dict[str, Any], ignored: tuple[str, ...] = MAY_CHANGE) -> list[str]:
  """'field: old → new' for every field that differs. ignored: prefixes of fields that may."""
  a, b = _flat(old), _flat(new)
  return [f'{name}: {a.get(name, _ABSENT)!r} → {b.get(name, _ABSENT)!r}' for name in sorted({*a, *b})
          if a.get(name, _ABSENT) != b.get(name, _ABSENT) and not name.startswith(ignored)]


def _extends(workdir: str | os.PathLike[str], old: dict[str, Any], new: dict[str, Any]) -> bool:
  """Whether a config continues the run of another to more steps, and differs in nothing else.

  Raises:
    UsageError: it has fewer steps, or it does not say where a schedule ends that would have ended with the old run.
  """
  changed, flat = {d.partition(':')[0] for d in differences(old, new)}, _flat(old)
  steps, decay_steps = flat.get('train.steps'), flat.get('optim.decay_steps')
  if 'train.steps' not in changed or not changed <= {'train.steps', 'optim.decay_steps'} or not (
      type(steps) is type(decay_steps) is int):
    return False
  optim, more = new['optim'], new['train']['steps']
  if more < steps:
    raise UsageError(f'workdir {workdir} has a run of {steps} steps, which config.train.steps={more} cannot shorten; '
                     'give at least as many, or another --workdir.')
  end, schedule, flag = decay_steps or steps, optim['schedule'], '--config.optim.decay_steps'
  if schedule != 'constant' and not optim['decay_steps'] and end != more:
    last = optim['learning_rate'] * optim['final_lr_fraction']
    hold = f'{flag}={end}, which keeps the rate at its last value, {last:g}, or ' if schedule == 'cosine' else ''
    raise UsageError(
        f'workdir {workdir} has a run whose learning rate schedule ends at step {end}, and config.train.steps={more} '
        f'extends it. Add {hold}{flag}={more}, which spreads the schedule over all steps, so the rate rises where the '
        'run continues.')
  return True


def _check_best(
    workdir: str | os.PathLike[str], old: dict[str, Any], new: dict[str, Any], evaluations: Mapping[str, str]) -> None:
  """Raises UsageError if checkpoints have the `train.best_metric` by another protocol or on other data.

  Such scores do not compare. evaluations: see `claim_workdir`.
  """
  metric = new['train']['best_metric']
  name = metric.removeprefix('eval/').rpartition('/')[0]
  prefix = f'evaluators.{name}.'
  before, now = ({k.removeprefix(prefix): v for k, v in _flat(c).items() if k.startswith(prefix)} for c in (old, new))
  changed = [d for d in differences(before, now) if before and d.partition(':')[0] not in _NO_PROTOCOL]
  steps = saved_steps(workdir) if changed or name in evaluations else []
  folders = [storage.path(workdir) / CHECKPOINTS / str(step) for step in steps]
  scored = [folder for folder in folders if metric in manifest.metrics(folder)]
  digests = {manifest.evaluation_data(folder).get(name) for folder in scored if name in evaluations}
  changed += ['its data, by the fingerprint'] if digests - {evaluations.get(name), None} else []
  if changed and scored:
    raise UsageError(
        f'workdir {workdir} has checkpoints with config.train.best_metric={metric!r} of another evaluator '
        f'({first_few(changed, separator="; ")}), so scores are not comparable. Restore that evaluator, or rename the '
        'new one, also in best_metric.')


def check_workdir(workdir: str | os.PathLike[str], config: ml_collections.ConfigDict, extends: bool = False) -> None:
  """Checks, before data is read, that a work directory is new or has a run with this config. Writes nothing.

  See `claim_workdir` for its arguments and errors.
  """
  _compare(workdir, config, None, None, extends, {})


def claim_workdir(
    workdir: str | os.PathLike[str], config: ml_collections.ConfigDict, fingerprint: str, writes: bool = True,
    inputs: str | None = None, extends: bool = False, evaluations: Mapping[str, str] | None = None,
    class_digests: Mapping[str, str] | None = None) -> None:
  """Creates a work directory for this run, or checks that it is this run's.

  Args:
    workdir, config: of the run.
    fingerprint: of its data.
    writes: whether this process creates it; one of several does.
    inputs: digest of the data and of the files it depends on, see `Data.inputs_fingerprint`; None: not compared.
    extends: whether the run continues with this config: fields in `MAY_CHANGE` are recorded as they are now, since
      other commands read them here, and with more `train.steps` it is extended: with any config if the rate is
      constant, else with one whose `optim.decay_steps` says where the schedule ends.
    evaluations: digests of the data of evaluators that run during training, by name; None: not compared.
    class_digests: of `warm_start.class_digests`, for runs that start from this one; recorded when it is created.

  Raises:
    UsageError: it belongs to a run with another config or other data; names the fields. Or a field is wrong, or it
      has checkpoints without a config, and `extends`.
  """
  path = storage.path(workdir) / CONFIG_FILE
  plain, old, extended = _compare(workdir, config, fingerprint, inputs, extends, evaluations or {})
  if not writes:
    return
  if old is None:
    storage.make_folder(path.parent)
    write_json(path, {_PACKAGE: __version__, 'config': plain, 'data': fingerprint, 'inputs': inputs,
                      'class_digests': class_digests or {}, 'versions': versions()})
  elif extends and plain != old['config']:
    steps = old['config']['train']['steps']
    write_json(path, {**old, 'config': plain, 'extended': [*old['extended'], *([steps] if extended else [])]})
    if extended:
      print(f'{workdir} is extended from {steps} to {plain["train"]["steps"]} steps', flush=True)


def _compare(
    workdir: str | os.PathLike[str], config: ml_collections.ConfigDict, fingerprint: str | None, inputs: str | None,
    extends: bool, evaluations: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any] | None, bool]:
  """(config as JSON, what config.json has, whether the run gets more steps); see `claim_workdir`."""
  path = storage.path(workdir) / CONFIG_FILE
  parse_config(config)
  plain = json.loads(json.dumps(apply_choices(config).to_dict()))  # as JSON stores it: tuples become lists
  if not path.exists():
    if extends and saved_steps(workdir):
      raise UsageError(f'workdir {workdir} has checkpoints, but no {CONFIG_FILE}, for example because uni-moe convert '
                       'was interrupted: repeat that command, copy the file back, or give another --workdir.')
    return plain, None, False
  old = _read(path)
  extended = extends and _extends(workdir, old['config'], plain)
  changed = [] if extended else differences(old['config'], plain)
  if fingerprint is not None and old['data'] != fingerprint and not changed:
    raise UsageError(
        f'workdir {workdir} belongs to a run with different data, by its fingerprint: {_OTHER_DATA} Restore the old '
        'data, for example by moving the newer version elsewhere, or give another --workdir.')
  if inputs is not None and old['inputs'] not in (None, inputs) and not changed:
    changed = ['the content of the tokenizer file, or of a file of class names']
  if changed:
    raise UsageError(f'workdir {workdir} belongs to a run with another config '
                     f'({first_few(changed, separator="; ")}); give another --workdir, or the config of that run.'
                     f'{_hint_of_init(workdir, old["config"], changed)}')
  if extends:
    _check_best(workdir, old['config'], plain, evaluations)
  return plain, old, extended


def note_other_data(workdir: str | os.PathLike[str], fingerprint: str) -> None:
  """Prints a note if the data of a saved run is not what it was in training; a command may read it all the same."""
  path = storage.path(workdir) / CONFIG_FILE
  if path.exists() and _read(path)['data'] != fingerprint:  # it is measured before training, too
    print(f'note: {workdir} was trained on different data, by its fingerprint: {_OTHER_DATA}', file=sys.stderr,
          flush=True)


def _hint_of_init(
    workdir: str | os.PathLike[str], old: Mapping[str, Any], changed: Sequence[str]) -> str:
  """How a run continues when the one that it started from, which it no longer reads, has another address now."""
  if not any(field.startswith('train.init:') for field in changed) or saved_step(workdir) is None:
    return ''
  return (' If it is the same run at another address, or another revision of it, add '
          f'--config.train.init={shlex.quote(old["train"]["init"])}.')


def check_versions(workdir: str | os.PathLike[str], allow_mismatch: bool = False, writes: bool = True) -> None:
  """Checks that a run continues with its package versions; notes other patch versions. A new folder passes.

  Args:
    workdir: of the run.
    allow_mismatch: record the installed versions as the run's instead.
    writes: whether this process records them; one of several does, when no other trains in the folder.

  Raises:
    UsageError: a package's major or minor version differs, so that the run might not continue as it started.
  """
  path = storage.path(workdir) / CONFIG_FILE
  if not path.exists():
    return
  content, installed = _read(path), versions()
  recorded = content['versions']
  pairs = {name: (recorded[name], installed[name]) for name in VERSIONED if name in recorded}
  changed = {name: (old, new) for name, (old, new) in pairs.items() if old != new and _ABSENT not in (old, new)}
  if not changed:
    return
  if allow_mismatch:
    if writes:
      earlier = [*content.get('earlier_versions', []), recorded]
      write_json(path, {**content, 'versions': installed, 'earlier_versions': earlier})
    return
  listed = ', '.join(f'{name}: {old} → {new}' for name, (old, new) in changed.items())
  breaking = {name: old for name, (old, new) in changed.items() if old.split('.')[:2] != new.split('.')[:2]}
  if breaking:
    required = ' '.join(f"'{name}=={old}'" for name, old in breaking.items())
    raise UsageError(
        f'workdir {workdir} was started with different package versions ({listed}), so numbers and data order may '
        f'change. Install the old ones (pip install {required}), start a new run from its parameters '
        f"(config.train.init='{workdir}'), or continue anyway: uni-moe train --allow_version_mismatch.")
  print(f'note: workdir {workdir} was started with different package versions ({listed}); numbers may differ in their '
        'last digits.', file=sys.stderr, flush=True)


def copy_tokenizer(workdir: str | os.PathLike[str], file: storage.Path, writes: bool = True) -> None:
  """Copies a run's tokenizer file into its folder, since runs that start from this one need the same ids.

  writes: whether this process copies; one of several does.

  Raises:
    UsageError: the folder has another tokenizer, with which its parameters would mean other words.
  """
  path = storage.path(workdir) / (TOKENIZER_STEM + file.suffix)
  if path.exists():
    # Published merges may be compressed differently; their content is part of the data's fingerprint.
    if file.suffix == '.model' and path.read_bytes() != file.read_bytes():
      raise UsageError(f'the tokenizer of workdir {workdir} differs from {file}, which another version of '
                       f'sentencepiece trained on the same text. Copy {path} over that file, or give another '
                       '--workdir.')
  elif writes:
    storage.write_bytes(path, file.read_bytes())


def tokenizer_copy(workdir: str | os.PathLike[str]) -> storage.Path | None:
  """The copy of a run's sentencepiece model in its folder, see `copy_tokenizer`; None if there is none."""
  path = storage.path(workdir) / f'{TOKENIZER_STEM}.model'
  return path if path.is_file() else None


def provenance(workdir: str | os.PathLike[str], step: int) -> dict[str, Any]:
  """Origin of a run's parameters, as JSON for an export. Files and folders of this machine appear only by name."""
  stored, trained, converted = (
      read_json(storage.path(workdir) / name, {}) for name in (CONFIG_FILE, RUN_FILE, CONVERSION_FILE))
  config, defaults = stored['config'], base().to_dict()
  for section, field in PATHS:
    if field in config.get(section, {}):
      address = config[section][field]
      is_public = address.startswith(hub.SCHEME) or address == defaults[section][field]  # the same on every machine
      config[section][field] = address if is_public else pathlib.Path(address).name
  prefix = class_names.FILE_PREFIX
  for target_set in config['target_sets'].values():
    entries = target_set['entries']
    if isinstance(entries, str) and entries.startswith(prefix):
      target_set['entries'] = prefix + pathlib.Path(entries.removeprefix(prefix)).name
  init = config['train'].get('init')
  origin = {'started from': init} if init else {}
  if extended := stored.get('extended'):
    origin['extended from'] = f'{", ".join(map(str, extended))} steps'
  if converted:
    name = pathlib.Path(converted['checkpoint']).name
    origin['converted from'] = f'{name} (sha256 {converted.get("sha256", "unknown")})'
  return {'name': storage.path(workdir).resolve().name, **origin, 'step': step, 'seed': config['seed'],
          'trained by commit': ', '.join([*trained.get('earlier_commits', []), trained.get('commit', 'unknown')]),
          'data (fingerprint)': stored['data'],
          **({_CLASSES: stored['class_digests']} if stored['class_digests'] else {}),
          'versions in training': stored['versions'], 'config': config}


def write_config(workdir: storage.Path, origin: Mapping[str, Any]) -> None:
  """Writes the config of a run into another folder; origin: its `provenance`."""
  write_json(workdir / CONFIG_FILE, {
      _PACKAGE: __version__, 'config': origin['config'], 'data': origin['data (fingerprint)'],
      'class_digests': origin.get(_CLASSES, {}), 'versions': origin['versions in training']})


def class_digests(workdir: str | os.PathLike[str]) -> dict[str, str]:
  """Those that were recorded when a run was claimed; {} in runs of older versions."""
  return _read(storage.path(workdir) / CONFIG_FILE)['class_digests']


def load_config(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict:
  """The config of a work directory. Raises MissingFileError if there is no run."""
  path = storage.path(workdir) / CONFIG_FILE
  if not path.exists():
    storage.check_access(path.parent, 'workdir')  # the bucket may be missing
    raise MissingFileError(f'workdir {workdir} holds no run ({CONFIG_FILE} is missing); train first: '
                           f'uni-moe train --config=quickstart --workdir={workdir}')
  content = _read(path)
  try:
    return ml_collections.ConfigDict(with_floats(Config, _tuples(content['config'])))
  except ValueError as e:  # of ml_collections: a name with a dot
    raise UsageError(f'{path} is damaged ({e}); restore an intact copy, or give another --workdir.') from None


def _read(path: storage.Path) -> dict[str, Any]:
  """Content of config.json. Raises UsageError if it is damaged or of another version of the package."""
  try:
    content = json.loads(storage.read_bytes(path))
    if not (isinstance(content, dict) and isinstance(content.get('config'), dict)):
      raise UsageError('it lacks the config')
    content = {'data': None, 'inputs': None, 'class_digests': {}, 'versions': {}, 'extended': [], **content}
    if not isinstance(content['class_digests'], dict):
      raise UsageError('its class_digests are not by name')
    recorded = content['versions']
    if not (isinstance(recorded, dict) and all(isinstance(v, str) for v in recorded.values()) and
            isinstance(content.get('earlier_versions', []), list) and isinstance(content.get(_PACKAGE, ''), str)):
      raise UsageError('its versions are not strings by package')
    if not (isinstance(content['extended'], list) and all(type(steps) is int for steps in content['extended'])):
      raise UsageError('its earlier numbers of steps are not whole')
  except (ValueError, RecursionError) as e:
    raise UsageError(f'{path} is damaged ({e}); copy an intact one back, or give another --workdir.') from None
  if content.get(_PACKAGE, '').split('.')[:2] != __version__.split('.')[:2]:
    raise UsageError(
        f'{path.parent} was written by uni_moe_jax {content.get(_PACKAGE) or "0.1"}, and this is {__version__}, which '
        'cannot read its config: give another --workdir, or install the version that wrote it.')
  return content


def _tuples(value: Any) -> Any:
  """Turns the lists of JSON back into the tuples of configs."""
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
