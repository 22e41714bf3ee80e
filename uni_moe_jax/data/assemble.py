"""Everything a run reads, from its config: records, tokenizer, target sets, examples."""

import dataclasses
import hashlib
import os
import pathlib
import tempfile

import ml_collections
import numpy as np

from uni_moe_jax.config.plan import Plan, SetSpec, TaskSpec
from uni_moe_jax.data import sources
from uni_moe_jax.data.files.file_dataset import FileDataset
from uni_moe_jax.data.files.file_dataset_examples import FileExampleBuilder
from uni_moe_jax.data.pipeline import class_names
from uni_moe_jax.data.pipeline.clip_tokenizer import ClipTokenizer
from uni_moe_jax.data.pipeline.examples import Builder, Examples
from uni_moe_jax.data.pipeline.records import Records
from uni_moe_jax.data.pipeline.target_sets import TargetSet, build_target_set
from uni_moe_jax.data.pipeline.tokenizer import SentencePieceTokenizer, Tokenizer
from uni_moe_jax.utils.errors import MissingFileError, UsageError
from uni_moe_jax.utils.suggest import nearest

# Records of a source in files whose texts teach a tokenizer; with a text comes its picture, which costs time to read.
_SAMPLED, _SAMPLED_VISUAL = 100_000, 20_000


class Data:
  """The data of a run; records are read once per (source, split).

  Attributes:
    tokenizer: trained on the training text of the plan's sources and cached by content, or the published one.
    tokenizer_file: its model file, or its merges.
    sets: target sets by name. keys: of each, in order, what records call its entries.
    fingerprint: hex sha256 over the training records and the tokenizer; of one that was trained here, over the text that taught it.
    inputs: hex sha256 over the fingerprint, what a trained tokenizer's file holds, and entries of training's sets that come from files.
  """

  def __init__(self, config: ml_collections.ConfigDict, plan: Plan):
    """Raises MissingFileError for data that is not prepared, UsageError for a config that does not fit it."""
    self._dir, self._model, self._plan = config.data.dir, config.model, plan
    self._records: dict[tuple[str, str], Records | FileDataset] = {}
    trained = [self.records(t.source, t.split) for t in plan.tasks]
    file = config.tokenizer.path
    if config.train.init and not file:  # the parameters of another run mean that run's words
      file = str(pathlib.Path(config.train.init) / 'tokenizer.model')
    self.tokenizer, self.tokenizer_file, tokenizer_print = self._make_tokenizer(config.tokenizer, file, trained)
    every = (*plan.sets, *plan.probe_sets, *plan.answer_sets)
    entries = {s.name: self._entries(s) for s in every}
    self.sets: dict[str, TargetSet] = {
        s.name: build_target_set(s, tuple(names for _, names in entries[s.name]), self.tokenizer) for s in every}
    self.keys = keys = {name: tuple(key for key, _ in found) for name, found in entries.items()}
    self._check_answers()
    prints = sorted({r.fingerprint for r in trained}) + [tokenizer_print]
    self.fingerprint = hashlib.sha256('\n'.join(prints).encode()).hexdigest()
    model = tokenizer_print if config.tokenizer.type == 'clip' else hashlib.sha256(self.tokenizer_file.read_bytes()).hexdigest()
    listed = [(s.name, entries[s.name]) for s in plan.sets if isinstance(s.entries, str) and s.entries.startswith(class_names.FILE_PREFIX)]
    self.inputs = hashlib.sha256(repr((self.fingerprint, model, listed)).encode()).hexdigest()
    self._builders = {
        training: Builder(self.tokenizer, keys, self._model.channels, training, config.data.random_special_tokens, config.seed)
        for training in (True, False)}
    self._file_builders = {
        training: FileExampleBuilder(self.tokenizer, keys, self._model.image_size, self._model.channels, training,
                                config.data.random_special_tokens, config.seed, config.data.max_corrupt_fraction)
        for training in (True, False)}

  def _check_answers(self) -> None:
    """Raises UsageError for an answer that is longer than the captions among which it is asked for."""
    for e in self._plan.evaluations:
      for text in self.sets[e.constrain_to].names if e.constrain_to else ():
        if (tokens := len(self.tokenizer.encode(text)) + 1) > e.task.max_len:
          raise UsageError(
              f'config.tasks.{e.task.name}.max_len={e.task.max_len} is too short for answer {text!r} of config.evaluators.'
              f'{e.name}.constrain_to={e.constrain_to!r}, which has {tokens} tokens, the end included; raise it to {tokens}, or leave '
              'the answer out.')

  def records(self, source: str, split: str) -> Records | FileDataset:
    """One split of a source."""
    if (source, split) not in self._records:
      self._records[source, split] = sources.load(source, self._dir, split)
    return self._records[source, split]

  def examples(self, task: TaskSpec, split: str | None = None, training: bool = False, num_views: int = 1, num_crops: int = 1) -> Examples:
    """A task's examples over its own or another split; of clips of files num_views × num_crops at evaluation."""
    task = task if split is None else dataclasses.replace(task, split=split)
    records = self.records(task.source, task.split)
    if isinstance(records, FileDataset):
      return dataclasses.replace(self._file_builders[training], num_views=num_views, num_crops=num_crops).build(task, records)
    if task.type.visual and 'pixels' in records.columns:
      self._check_size(task, records.columns['pixels'].shape[1:])
    return self._builders[training].build(task, records)

  def _check_size(self, task: TaskSpec, shape: tuple[int, ...]) -> None:
    """Raises UsageError for pictures [H, W] or clips [T, H, W] that the model does not take."""
    *frames, H, W = shape
    T = frames[0] if frames else 1
    if (H, W) != (self._model.image_size,) * 2 or T > self._model.max_num_frames:
      raise UsageError(
          f'config.tasks.{task.name}: source {task.source!r} has {T} frame(s) of {H} × {W} pixels; the model takes at most '
          f'config.model.max_num_frames={self._model.max_num_frames} of config.model.image_size={self._model.image_size} pixels a side.')

  def _entries(self, spec: SetSpec) -> tuple[class_names.Entry, ...]:
    """Entries of a target set: its own, those of a file, or the classes of 'source/column'; () for the vocabulary."""
    field = f'target_sets.{spec.name}'
    if spec.is_vocabulary:
      return ()
    if not isinstance(spec.entries, str):
      return class_names.parse_entries(spec.entries, field)
    if spec.entries.startswith(class_names.FILE_PREFIX):
      return class_names.read_entries(spec.entries, self._dir, field)
    source, _, column = spec.entries.rpartition('/')
    split = next((t.split for t in (*self._plan.tasks, *self._plan.probes) if t.source == source), 'train')
    classes = self.records(source, split).classes
    if column not in classes:
      raise UsageError(f'config.{field}: source {source!r} has no classes {column!r}; {nearest(column, classes)}.')
    return class_names.parse_entries(classes[column], field)

  def _make_tokenizer(
      self, config: ml_collections.ConfigDict, file: str, trained: list[Records | FileDataset]) -> tuple[Tokenizer, pathlib.Path, str]:
    """(tokenizer, its file, fingerprint of what that file says)."""
    if config.type == 'clip':
      tokenizer = ClipTokenizer(config.merges_path)
      return tokenizer, pathlib.Path(os.path.expanduser(config.merges_path)), tokenizer.fingerprint
    if file:
      path = pathlib.Path(os.path.expanduser(file))
      if not path.is_file():
        raise MissingFileError(f'config.tokenizer.path={file!r} is not there; give the tokenizer.model of a run.')
      return SentencePieceTokenizer(path), path, hashlib.sha256(path.read_bytes()).hexdigest()
    path = self._train_tokenizer(trained, config.vocab_size, config.allow_smaller_vocab)
    return SentencePieceTokenizer(path), path, path.stem

  def _train_tokenizer(self, trained: list[Records | FileDataset], vocab_size: int, fewer: bool) -> pathlib.Path:
    """Model file for this text and size; trained once."""
    texts = np.unique([text for r in trained for text in _texts(r)]).tolist()
    size = f'{vocab_size} or fewer' if fewer else str(vocab_size)
    digest = hashlib.sha256('\0'.join([size, *texts]).encode()).hexdigest()[:24]
    path = pathlib.Path(os.path.expanduser(self._dir)) / 'tokenizers' / f'{digest}.model'
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = pathlib.Path(folder) / path.name
        try:
          SentencePieceTokenizer.train(texts, unfinished, vocab_size, fewer)
        except ValueError as e:
          raise UsageError(f'config.tokenizer.vocab_size={vocab_size}: {e}') from e
        unfinished.rename(path)
    return path


def _texts(records: Records | FileDataset) -> list[str]:
  """What a tokenizer learns from: every text in memory, or a sample of those in files."""
  if isinstance(records, FileDataset):
    return records.sample_texts(_SAMPLED_VISUAL if records.media() else _SAMPLED)
  return [text for c in records.columns.values() if c.dtype.kind == 'U' for text in np.unique(c).tolist()]
