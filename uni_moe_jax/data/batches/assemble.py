"""Data of a run, from its config: records, tokenizer, target sets, examples."""

import dataclasses
import hashlib
import itertools
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence

import ml_collections

from uni_moe_jax.config.plan import Evaluation, Plan, SetSpec, TaskSpec
from uni_moe_jax.data.batches.target_sets import TargetSet, build_target_set
from uni_moe_jax.data.examples.examples import ExampleBuilder, Examples
from uni_moe_jax.data.examples.features import text_columns
from uni_moe_jax.data.formats.rows import MEDIA_TYPES
from uni_moe_jax.data.shards import file_dataset, mirror
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.data.text import class_names
from uni_moe_jax.data.text.clip_tokenizer import ClipTokenizer
from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer, trained_parts
from uni_moe_jax.io import storage
from uni_moe_jax.utils.errors import MissingFileError, UsageError, disk_is_full
from uni_moe_jax.utils.suggest import nearest

# Records of a source from which a tokenizer is trained; reading a text with its image or video takes longer.
_MAX_TEXT_RECORDS, _MAX_MEDIA_RECORDS = 100_000, 20_000


class Sources:
  """Records, read once per (source, split), and entries of target sets: the data of a run without its tokenizer.

  Attributes:
    dir: folder of the prepared data, or the mirror of one in a bucket.
  """

  def __init__(self, config: ml_collections.ConfigDict, plan: Plan):
    """config, plan: of the run."""
    self.dir, self._plan = mirror.open_folder(config.data), plan
    self._records: dict[tuple[str, str], FileDataset] = {}

  def records(self, source: str, split: str) -> FileDataset:
    """One split of a source."""
    if (source, split) not in self._records:
      self._records[source, split] = file_dataset.load(source, self.dir, split)
    return self._records[source, split]

  def evaluation_fingerprints(self, evaluations: Sequence[Evaluation] | None = None) -> dict[str, str]:
    """Evaluator → digest of its records, of those of training, which baselines see, and of the entries of its set.

    evaluations: default: all of the plan.
    """
    sets = {s.name: s for s in (*self._plan.sets, *self._plan.probe_sets)}
    content = {e.name: (
        [self.records(e.task.source, s).fingerprint for s in (e.split, *([e.task.split] if e.baselines else []))],
        [self._entries(sets[e.task.target_set])] if e.task.target_set else [])
               for e in (self._plan.evaluations if evaluations is None else evaluations)}
    return {name: hashlib.sha256(repr(x).encode()).hexdigest()[:16] for name, x in content.items()}

  def _entries(self, spec: SetSpec) -> tuple[class_names.Entry, ...]:
    """Entries of a target set from the config, a file or 'source/column'; () for the vocabulary."""
    field = f'target_sets.{spec.name}'
    if spec.is_vocabulary:
      return ()
    if not isinstance(spec.entries, str):
      return class_names.parse_entries(spec.entries, field)
    if spec.entries.startswith(class_names.FILE_PREFIX):
      return class_names.read_entries(spec.entries, self.dir, field)
    source, _, column = spec.entries.rpartition('/')
    split = next((t.split for t in (*self._plan.tasks, *self._plan.probes) if t.source == source), 'train')
    classes = self.records(source, split).classes
    if column not in classes:
      raise UsageError(f'config.{field}: source {source!r} has no classes {column!r}; {nearest(column, classes)}.')
    return class_names.parse_entries(classes[column], field)


class Data(Sources):
  """The data of a run.

  Attributes:
    tokenizer: the published one, or one trained on the plan's training text and cached by content.
    tokenizer_file: its model or merges file.
    target_sets: by name.
    entry_keys: target set → what records call its entries, in order.
    fingerprint: hex sha256 of the training records and the tokenizer; of a tokenizer trained for the run, of its
      training text.
    inputs_fingerprint: hex sha256 of the fingerprint, a trained tokenizer's file, and the entries of training's target
      sets that are read from files.
  """

  def __init__(self, config: ml_collections.ConfigDict, plan: Plan, tokenizer_copy: storage.Path | None = None,
               is_new: bool = True):
    """Reads the data of a run.

    Args:
      config, plan: of the run.
      tokenizer_copy: read in place of the tokenizer file that the config names, of which it is a copy; ignored if the
        config names none.
      is_new: whether the run has no work directory; of one that has, fields without effect are accepted.

    Raises:
      MissingFileError: data is not prepared. UsageError: the config does not fit it.
    """
    super().__init__(config, plan)
    self._model = config.model
    records = [self.records(t.source, t.split) for t in plan.tasks]
    self.tokenizer, self.tokenizer_file, tokenizer_fingerprint = self._make_tokenizer(config, tokenizer_copy)
    specs = (*plan.sets, *plan.probe_sets)
    entries = {s.name: self._entries(s) for s in specs}
    self.target_sets: dict[str, TargetSet] = {
        s.name: build_target_set(
            s, tuple(names for _, names in entries[s.name]), self.tokenizer, self._model.max_text_len) for s in specs}
    self.entry_keys = {name: tuple(key for key, _ in pairs) for name, pairs in entries.items()}
    fingerprints = [*sorted({r.fingerprint for r in records}), tokenizer_fingerprint]
    self.fingerprint = hashlib.sha256('\n'.join(fingerprints).encode()).hexdigest()
    from_files = [(s.name, entries[s.name]) for s in plan.sets
                  if isinstance(s.entries, str) and s.entries.startswith(class_names.FILE_PREFIX)]
    inputs = self.fingerprint, self.tokenizer.fingerprint, from_files
    self.inputs_fingerprint = hashlib.sha256(repr(inputs).encode()).hexdigest()
    self._builder = ExampleBuilder(
        self.tokenizer, self.entry_keys, self._model.channels, self._model.image_size, False,
        config.data.random_special_tokens, config.seed, config.data.max_corrupt_fraction, config.data.resize, is_new)
    if isinstance(self.dir, mirror.Mirror):
      print(f'data: fetched {self.dir.describe()} into {self.dir.root}', flush=True)

  def check_space(self, evaluations: Sequence[Evaluation]) -> None:
    """Raises UsageError if what training, and evaluations in between, read from a bucket does not fit on this host."""
    if isinstance(self.dir, mirror.Mirror):
      self.dir.check_space({name for t in self._plan.tasks for name in self._files(t.source, t.split)},
                           {name for e in evaluations for name in self._files(e.task.source, e.split)})

  def _files(self, source: str, split: str) -> Sequence[str]:
    """Names of the record files of one split in a bucket."""
    return self.records(source, split).files

  def examples(self, task: TaskSpec, split: str | None = None, training: bool = False, num_views: int = 1,
               num_crops: int = 1) -> Examples:
    """A task's examples of its own split or another; num_views, num_crops: of video files in evaluation."""
    task = task if split is None else dataclasses.replace(task, split=split)
    records = self.records(task.source, task.split)
    if task.type.visual and (shape := records.shapes.get(records.media_column())):
      self._check_size(task, shape)
    builder = dataclasses.replace(self._builder, training=training, num_views=num_views, num_crops=num_crops)
    return builder.build(task, records)

  def _check_size(self, task: TaskSpec, shape: tuple[int, ...]) -> None:
    """Raises UsageError for arrays [T, H, W, C] that the model or the task does not accept."""
    T, H, W, _ = shape
    if task.num_frames not in (0, T):
      raise UsageError(
          f'config.tasks.{task.name}.num_frames={task.num_frames}: source {task.source!r} has arrays, all of whose '
          f'{T} frame(s) are seen; set it to 0.')
    size, max_frames = self._model.image_size, self._model.max_num_frames
    if (H, W) != (size, size) or T > max_frames:
      raise UsageError(
          f'config.tasks.{task.name}: source {task.source!r} has {T} frame(s) of {H} × {W} pixels; the model accepts '
          f'at most config.model.max_num_frames={max_frames} frames of config.model.image_size={size} pixels a side.')

  def _make_tokenizer(
      self, config: ml_collections.ConfigDict, copy: storage.Path | None) -> tuple[Tokenizer, pathlib.Path, str]:
    """(tokenizer, its file, fingerprint); one that is trained for this text and size is cached."""
    c = config.tokenizer
    if c.type == 'clip':
      tokenizer = ClipTokenizer(c.merges_path)
      return tokenizer, storage.path(c.merges_path), tokenizer.fingerprint
    # The initial parameters belong to the token ids of their run.
    init, inherited = config.train.init, os.path.join(config.train.init, 'tokenizer.model')
    if file := c.path or init and inherited:
      path = copy or storage.path(file)
      if not path.is_file():
        if not c.path:
          raise MissingFileError(
              f'config.train.init={init!r} has no tokenizer.model: restore it, or, if the tokenizer of that run is not '
              "of type 'sentencepiece', copy its config.tokenizer section.")
        raise MissingFileError(f'config.tokenizer.path={file!r} does not exist; give the tokenizer.model of a run.')
      own = storage.path(inherited) if init and c.path and not copy else path
      if own.is_file() and own.read_bytes() != path.read_bytes():
        raise UsageError(
            f'config.tokenizer.path={file!r} differs from the tokenizer of config.train.init={init!r}, to which the '
            "parameters of that run belong; set it to ''.")
      return (tokenizer := SentencePieceTokenizer(path)), path, tokenizer.fingerprint
    texts = sorted(set(self._training_texts()))
    size = f'{c.vocab_size} or fewer' if c.allow_smaller_vocab else str(c.vocab_size)
    parts = itertools.chain.from_iterable(map(trained_parts, texts))
    digest = hashlib.sha256('\0'.join([size, *parts]).encode()).hexdigest()[:24]
    path = copy or storage.path(self.dir) / 'tokenizers' / f'{digest}.model'  # the copy also if the data has changed
    if path.exists():
      return SentencePieceTokenizer(path), path, digest
    try:
      return *self._train_tokenizer(c, texts, path), digest
    except ValueError as e:
      raise UsageError(f'config.tokenizer.vocab_size={c.vocab_size}: {e}') from e

  def _training_texts(self) -> Iterator[str]:
    """Yields what a tokenizer is trained on: a sample of the texts that the tasks read."""
    for source, split in dict.fromkeys((t.source, t.split) for t in self._plan.tasks):
      records = self.records(source, split)
      sets = [s.entries for s in self._plan.sets if isinstance(s.entries, str)]
      columns = [column for entries in sets for start, _, column in [entries.rpartition('/')] if start == source]
      for t in self._plan.tasks:
        columns += text_columns(t) if (t.source, t.split) == (source, split) else ()
      has_media = records.columns.get(records.media_column()) in MEDIA_TYPES
      yield from records.sample_texts(columns, _MAX_MEDIA_RECORDS if has_media else _MAX_TEXT_RECORDS)

  def _train_tokenizer(
      self, c: ml_collections.ConfigDict, texts: list[str], path: storage.Path) -> tuple[Tokenizer, storage.Path]:
    """(tokenizer, its file), which is a temporary one if `path` cannot be written."""
    train = lambda path: SentencePieceTokenizer.train(texts, path, c.vocab_size, c.allow_smaller_vocab)
    try:
      return train(path), path
    except OSError as e:
      if disk_is_full(e):
        raise
      print(f'note: {path.parent} cannot be written ({e.strerror}), so the tokenizer is trained in a temporary '
            'folder.', file=sys.stderr, flush=True)
    self._own_folder = tempfile.TemporaryDirectory()  # for as long as this data is used
    path = pathlib.Path(self._own_folder.name, path.name)
    return train(path), path
