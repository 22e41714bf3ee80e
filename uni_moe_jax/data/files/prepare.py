"""People's own data, prepared once: checked, split, written as a TFDS data set of array records, with what was skipped and why.

  data_dir/own/NAME/VERSION/      features and shards, as TFDS lays them out: tfds.builder_from_directory(…) reads them
                    prepared.json splits, columns, classes, statistics, what was skipped (first paths), the fingerprint
                    labels.npz    {split}/{column}: int32 [N], -1 for none; of texts bool [N], whether a row has one

Pictures and clips keep the bytes of their files, but for the few that `media.py` must rewrite. Every file is decoded once.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import re
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
from absl import logging

from uni_moe_jax.data.files import media
from uni_moe_jax.data.files.consistency import keep_consistent
from uni_moe_jax.data.files.formats import WHERE, Row, Skipped, read
from uni_moe_jax.data.pipeline import npz_records
from uni_moe_jax.utils.errors import UsageError

FOLDER, SUMMARY, LABELS = 'own', 'prepared.json', 'labels.npz'
VERSION = '1.0.0'
SPLITS = ('train', 'validation', 'test')
_SHOWN = 5  # paths per reason
_MOST_CLASSES = 10_000  # of a field; of more values it is text
_FIELDS = 20  # that are left out, by name
_AT_ONCE = 256  # rows whose files are looked at together


@dataclasses.dataclass(frozen=True)
class Checked:
  """A row whose file is sound. size: of its picture or clip, see `media.Media`. note: why its bytes are rewritten, or ''."""
  row: Row
  size: tuple[int, ...]
  note: str


def prepare(
    source: pathlib.Path, data_dir: pathlib.Path, name: str, version: str = VERSION, gif: str = 'image',
    test_fraction: float = 0.1, max_corrupt_fraction: float = 0.1) -> dict:
  """Prepares a folder or file; returns what prepared.json holds.

  Args:
    source: see `formats.read`.
    data_dir: of prepared data. name, version: of the data set; letters, digits and '_'; 'x.y.z'.
    gif: what a .gif in a folder by class is: 'image' (its first frame) or 'video'.
    test_fraction: share of the groups that becomes the split 'test' where the data names no split itself.
    max_corrupt_fraction: more skipped rows than this share are an error.

  Raises:
    MissingFileError, UsageError: nothing to read, a bad name, a version that is there, too many bad rows.
  """
  if not re.fullmatch('[a-z][a-z0-9_]*', name):
    raise UsageError(f'--name={name!r} must be small letters, digits and underscores, a letter first.')
  if not re.fullmatch(r'\d+\.\d+\.\d+', version):
    raise UsageError(f'--version={version!r} must look like {VERSION}.')
  place = pathlib.Path(data_dir) / FOLDER / name / version
  if place.is_dir():
    raise UsageError(f'{place} is there already; give another --version or --name, or remove it.')
  rows, skipped = read_checked_rows(source, gif, max_corrupt_fraction)
  root = source if source.is_dir() else source.parent
  splits = _split(rows, test_fraction, root)
  classes = _classes(rows)
  with npz_records.atomic_folder(place) as folder:
    prints = _write(folder, name, version, splits, classes)
    summary = _summary(
        name, version, splits, classes, skipped, prints, _warnings(splits, test_fraction), _in_several_splits(splits, root))
    known = {column: _present for column, kind in summary['columns'].items() if kind in ('text', 'texts')}
    known |= {column: functools.partial(_labels, names=names) for column, names in classes.items()}
    np.savez_compressed(folder / LABELS, **{
        f'{split}/{column}': of(members, column) for split, members in splits.items() for column, of in known.items()})
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1, ensure_ascii=False))
  return summary


def read_checked_rows(source: pathlib.Path, gif: str = 'image', max_corrupt_fraction: float = 0.1) -> tuple[list[Checked], dict[str, list[str]]]:
  """The sound rows of a folder or file, in order, and what was skipped: reason → where.

  Raises:
    MissingFileError, UsageError: nothing to read, or too many bad rows.
  """
  skipped: dict[str, list[str]] = collections.defaultdict(list)
  found, apart = keep_consistent(list(_distinct(read(source, gif), skipped)))
  for row in apart:
    skipped[row.reason].append(row.where)
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', module='PIL')  # what is wrong with a picture is counted, not printed in between
    rows = list(_checked(found, skipped))
  bad, total = sum(map(len, skipped.values())), len(rows) + sum(map(len, skipped.values()))
  if not rows or bad > max_corrupt_fraction * total:
    worst = max(skipped, key=lambda reason: len(skipped[reason]), default='')
    first = f', the first of them {skipped[worst][0]}' if worst else ''
    raise UsageError(f'{bad} of {total} rows of {source} are bad; most are {worst!r} ({len(skipped[worst]) if worst else 0}'
                     f'{first}). Mend them, or raise --max_corrupt_fraction={max_corrupt_fraction}.')
  return rows, skipped


def _distinct(found: Iterable[Row | Skipped], skipped: dict[str, list[str]]) -> Iterator[Row]:
  """Rows, each once: by their key where they have one, else by file and texts."""
  seen = set()
  for row in found:
    if isinstance(row, Skipped):
      skipped[row.reason].append(row.where)
      continue
    key = row.key or (row.media, str(row.path), row.frame_index, *sorted(row.texts.items()), *sorted(row.labels.items()))
    key = hashlib.sha256(repr(key).encode()).digest()
    if key in seen:
      skipped['duplicate key' if row.key else 'duplicate'].append(row.where)
      continue
    seen.add(key)
    yield row


def _checked(rows: Iterable[Row], skipped: dict[str, list[str]]) -> Iterator[Checked]:
  """Rows whose file is sound, in order."""
  arrays, rows = media.FrameArrays(), iter(rows)

  def look(row: Row) -> media.Media | str:
    try:
      return open_media(row, arrays)
    except media.CorruptFile as e:
      return str(e)

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    while True:
      part = [row for _, row in zip(range(_AT_ONCE), rows)]
      if not part:
        return
      # Arrays are opened one after the other: two threads would ask for two files in turn.
      looked = map(look, part) if any(r.frame_index is not None for r in part) else pool.map(look, part)
      for row, found in zip(part, looked):
        if isinstance(found, str):
          skipped[found].append(row.where)
        else:
          yield Checked(row, found.size, found.note)


def open_media(row: Row, arrays: media.FrameArrays) -> media.Media:
  """The picture or clip of a row; of a text nothing. Raises media.CorruptFile."""
  if not row.media:
    return media.Media(b'', ())
  if row.frame_index is not None:
    return arrays.read_video(row.path, row.frame_index)
  return media.read_image(row.path) if row.media == 'image' else media.read_video(row.path)


def _split(rows: list[Checked], test_fraction: float, folder: pathlib.Path) -> dict[str, list[Checked]]:
  """Rows by split; where none is named, whole groups are drawn by a hash of their name."""
  named = any(c.row.split for c in rows)
  out: dict[str, list[Checked]] = {s: [] for s in SPLITS}
  for c in rows:
    if named:
      out[c.row.split or 'train'].append(c)
      continue
    group = _group(c.row, folder).encode(errors='backslashreplace')
    drawn = int.from_bytes(hashlib.sha256(group).digest()[:8]) / 2**64
    out['test' if drawn < test_fraction else 'train'].append(c)
  if not out['train'] and not named and test_fraction < 1:
    out = {'train': out['test']}  # of so few groups none is left to train on
  return {s: members for s, members in out.items() if members}


def _group(row: Row, folder: pathlib.Path) -> str:
  """What must not be in two splits: a group, else the file, of which many rows may ask, else the row itself."""
  # Of a file all of its path below the input counts: many folders may each have an 'image.png'.
  file = row.path and f'{os.path.relpath(row.path, folder)}#{row.frame_index}'
  return row.group or file or row.key or row.where


def _in_several_splits(splits: dict[str, list[Checked]], folder: pathlib.Path) -> int:
  """How many groups are: only rows that name their splits themselves can say so."""
  first: dict[str, str] = {}
  return len({group for split, members in splits.items() for group in (_group(c.row, folder) for c in members)
              if first.setdefault(group, split) != split})


def _classes(rows: list[Checked]) -> dict[str, tuple[str, ...]]:
  """Class names of every field that names one: 'label', and fields whose values come twice or more on average."""
  values: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for c in rows:
    for name, value in c.row.labels.items():
      values[name][value] += 1
  out = {}
  for name, counts in values.items():
    if name == 'label' or len(counts) <= min(_MOST_CLASSES, sum(counts.values()) / 2):
      numbers = all(re.fullmatch(r'-?\d+', v) for v in counts)
      out[name] = tuple(sorted(counts, key=(lambda v: (int(v), v)) if numbers else None))
  return out


def _labels(members: list[Checked], column: str, names: tuple[str, ...]) -> np.ndarray:
  place = {name: i for i, name in enumerate(names)}
  return np.array([place.get(c.row.labels.get(column), -1) for c in members], np.int32)


def _present(members: list[Checked], column: str) -> np.ndarray:
  return np.array([bool(c.row.texts.get(column) or c.row.labels.get(column)) for c in members], bool)


def _columns(rows: list[Checked], classes: dict[str, tuple[str, ...]]) -> dict[str, str]:
  """Column → 'image' | 'video' | 'texts' | 'text' | 'class'."""
  out = {c.row.media: c.row.media for c in rows if c.row.media}
  for c in rows:
    out |= {name: 'texts' if isinstance(v, tuple) else 'text' for name, v in c.row.texts.items()}
    out |= {name: 'class' if name in classes else 'text' for name in c.row.labels}
  return dict(sorted(out.items()))


def _write(
    folder: pathlib.Path, name: str, version: str, splits: dict[str, list[Checked]],
    classes: dict[str, tuple[str, ...]]) -> dict[str, str]:
  """Writes shards and metadata; returns a hex sha256 of what each split holds."""
  import tensorflow_datasets as tfds
  tfds.disable_progress_bar()
  columns = _columns([c for members in splits.values() for c in members], classes)
  features = tfds.features
  of = {'image': features.Image, 'video': lambda: features.Scalar(np.object_), 'text': features.Text,
        'texts': lambda: features.Sequence(features.Text())}
  described = features.FeaturesDict({
      column: features.ClassLabel(names=list(classes[column])) if kind == 'class' else of[kind]()
      for column, kind in {**columns, WHERE: 'text'}.items()})
  digests = {split: hashlib.sha256() for split in splits}
  unfinished = folder / 'unfinished'
  with _quietly():
    tfds.dataset_builders.store_as_tfds_dataset(
        name, version, described, {s: _examples(members, columns, digests[s]) for s, members in splits.items()},
        data_dir=unfinished, description='Prepared by uni_moe_jax.', file_format='array_record', disable_shuffling=True)
  for path in (unfinished / name / version).iterdir():
    path.rename(folder / path.name)
  for path in sorted(unfinished.rglob('*'), reverse=True):
    path.rmdir()
  unfinished.rmdir()
  return {split: digest.hexdigest() for split, digest in digests.items()}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
  """Without TFDS's words about downloads and temporary folders."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(before)


def _examples(members: list[Checked], columns: dict[str, str], digest) -> Iterator[tuple[int, dict]]:
  arrays = media.FrameArrays()
  for i, c in enumerate(members):
    example = {WHERE: c.row.where}
    for column, kind in columns.items():
      if kind in ('image', 'video'):
        data = (c.row.path.read_bytes() if not c.note and c.row.frame_index is None else open_media(c.row, arrays).data)
        example[column] = io.BytesIO(data) if kind == 'image' else data
      elif kind == 'class':
        example[column] = c.row.labels.get(column, -1)
      else:
        value = c.row.texts.get(column, c.row.labels.get(column, () if kind == 'texts' else ''))
        example[column] = list(value) if kind == 'texts' else value
      part = example[column]
      digest.update(hashlib.sha256(data if kind in ('image', 'video') else repr(part).encode()).digest())
    yield i, example


def _warnings(splits: dict[str, list[Checked]], test_fraction: float) -> list[str]:
  """What a person should know of splits that came out empty."""
  if 'train' not in splits:
    return ['there is no split train, so that this data can only evaluate']
  if test_fraction and 'test' not in splits and not any(c.row.split for members in splits.values() for c in members):
    return [f'no group fell to the split test by --test_fraction={test_fraction}: the groups are too few; raise it, or give each row its split']
  return []


def _summary(name, version, splits, classes, skipped, prints, cautions, shared) -> dict:
  rows = [c for members in splits.values() for c in members]
  notes = collections.Counter(c.note for c in rows if c.note)
  left_out = collections.Counter(name for c in rows for name in c.row.left_out)
  return {
      'name': name, 'version': version, 'columns': _columns(rows, classes),
      'splits': {s: len(members) for s, members in splits.items()}, 'fingerprints': prints,
      'classes': {column: {'names': list(names), 'counts': {
          s: np.bincount(found[found >= 0], minlength=len(names)).tolist()
          for s, members in splits.items() for found in [_labels(members, column, names)]}}
                  for column, names in classes.items()},
      'sizes': _spread([c.size for c in rows if c.size]),
      'captions_per_example': _spread([(len(c.row.texts['captions']),) for c in rows if 'captions' in c.row.texts]),
      'rewritten': dict(notes.most_common()),
      'left_out': dict(left_out.most_common(_FIELDS)),
      'warnings': cautions,
      'groups_in_several_splits': shared,
      'skipped': {reason: {'count': len(paths), 'first': paths[:_SHOWN]}
                  for reason, paths in sorted(skipped.items(), key=lambda item: -len(item[1]))}}


def _spread(values: list[tuple[int, ...]]) -> dict[str, list[int]]:
  """{'least', 'median', 'most'} of every place of tuples of one length; {} of none."""
  if not values:
    return {}
  table = np.sort([v for v in values if len(v) == len(values[0])], axis=0)
  return {'least': table[0].tolist(), 'median': table[len(table) // 2].tolist(), 'most': table[-1].tolist()}


def describe(summary: dict) -> str:
  """prepared.json in a few lines for the person who waits."""
  lines = [f'{summary["name"]} {summary["version"]}: ' + ', '.join(f'{s} {n}' for s, n in summary['splits'].items()),
           'columns: ' + ', '.join(f'{c} ({kind})' for c, kind in summary['columns'].items())]
  for column, classes in summary['classes'].items():
    shown = ', '.join(classes['names'][:8]) + (', …' if len(classes['names']) > 8 else '')
    lines.append(f'{column}: {len(classes["names"])} classes: {shown}')
  for title, spread in (('size', summary['sizes']), ('captions', summary['captions_per_example'])):
    if spread:
      lines.append(f'{title}: ' + ', '.join(f'{k} {" × ".join(map(str, v))}' for k, v in spread.items()))
  lines += [f'warning: {warning}' for warning in summary['warnings']]
  lines += [f'rewritten, {note}: {count}' for note, count in summary['rewritten'].items()]
  lines += [f'left out, field {name} of another type or name than can be used: {count}'
            for name, count in summary['left_out'].items()]
  if summary['groups_in_several_splits']:
    lines.append(f'groups or files in several splits: {summary["groups_in_several_splits"]}: a test may know them from training')
  for reason, found in summary['skipped'].items():
    more = ', …' if found['count'] > len(found['first']) else ''
    lines.append(f'skipped, {reason}: {found["count"]} ({", ".join(found["first"])}{more})')
  return '\n'.join(lines)
