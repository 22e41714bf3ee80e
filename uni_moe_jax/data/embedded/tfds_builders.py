"""The embedded data as TFDS data sets, so that it is prepared, versioned and loaded like any other.

    import tensorflow_datasets as tfds
    from uni_moe_jax.data.embedded import tfds_builders  # registers embedded_glyphs, _videos and _text

    builder = tfds.builder('embedded_glyphs', data_dir=..., file_format='array_record')
    builder.download_and_prepare(download_dir=DATA_DIR)
    source = builder.as_data_source('train')  # example i is row i of glyphs.load(DATA_DIR, 'train')

Nothing is downloaded: `download_dir` is the folder where `launch/prepare_data.py` made the records;
where it has not, they are made there first. A data source gives a clip as a list of its frames.
"""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from uni_moe_jax.data.embedded import docstring_texts, glyph_classes, glyph_videos, glyphs
from uni_moe_jax.data.pipeline.records import Records

_NO_LABEL = -1  # as TFDS writes it


@dataclasses.dataclass(eq=False)
class SubsetConfig(tfds.core.BuilderConfig):
  """How much of every split is taken.

  Attributes:
    limit: at most this many records, evenly spaced over the split; 0 takes all.
  """
  limit: int = 0


class _EmbeddedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Writes the columns of Records, in their order; a subclass says where they come from."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}

  @property
  @abc.abstractmethod
  def _splits(self) -> tuple[str, ...]:
    """The names of all splits."""

  @abc.abstractmethod
  def _records(self, directory: str, split: str) -> Records:
    """The records of a split, made in `directory` first if they are not there."""

  def _describe(
      self, description: str, features: dict[str, Any], supervised_keys: tuple[str, str]
  ) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        description=description,
        features=tfds.features.FeaturesDict(features),
        supervised_keys=supervised_keys,
        metadata=tfds.core.MetadataDict(),
        # Example i stays example i: the order of training is drawn over ids, not over files.
        disable_shuffling=True,
    )

  def _split_generators(
      self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    generators = {}
    for split in self._splits:
      records = self._records(str(dl_manager.download_dir), split)
      # What the records hold follows from the installed packages: a version says too little.
      self.info.metadata[f'fingerprint_{split}'] = records.fingerprint
      generators[split] = self._generate_examples(records)
    return generators

  def _generate_examples(self, records: Records) -> Iterator[tuple[int, dict[str, Any]]]:
    count = len(next(iter(records.columns.values())))
    limit = min(self.builder_config.limit or count, count)
    for index in np.linspace(0, count - 1, limit).astype(int).tolist():
      example = {}
      for name, column in records.columns.items():
        value = column[index]
        if name in records.classes:
          example[name] = str(value) or _NO_LABEL
        elif column.dtype.kind == 'U':
          example[name] = str(value)
        else:
          example[name] = value[..., None]  # grey: a last axis of one channel
      yield index, example


class EmbeddedGlyphs(_EmbeddedBuilder):
  """Pictures of characters with their names, faces and classes: see `data/embedded/glyphs.py`."""

  BUILDER_CONFIGS = [SubsetConfig('full')]
  _splits = glyphs.SPLITS

  def _info(self) -> tfds.core.DatasetInfo:
    return self._describe(
        'Named Unicode characters, drawn in the faces of DejaVu and STIX.',
        {
            'pixels': tfds.features.Image(
                shape=(glyphs.SIZE, glyphs.SIZE, 1), encoding_format='png'),
            'name': tfds.features.Text(),
            'face': tfds.features.Text(),
            'class': tfds.features.ClassLabel(names=glyph_classes.CLASSES),
        },
        supervised_keys=('pixels', 'class'),
    )

  def _records(self, directory: str, split: str) -> Records:
    glyphs.build(directory)
    return glyphs.load(directory, split)


class EmbeddedVideos(_EmbeddedBuilder):
  """Clips of characters in motion with their names, faces and motions: see `data/embedded/glyph_videos.py`."""

  BUILDER_CONFIGS = [SubsetConfig('full')]
  _splits = glyphs.SPLITS

  def _info(self) -> tfds.core.DatasetInfo:
    return self._describe(
        'Named Unicode characters, in the faces of DejaVu and STIX, that move, turn, grow or fade.',
        {
            'pixels': tfds.features.Video(shape=(glyph_videos.FRAMES, glyphs.SIZE, glyphs.SIZE, 1)),
            'name': tfds.features.Text(),
            'face': tfds.features.Text(),
            'motion': tfds.features.ClassLabel(names=glyph_videos.MOTIONS),
        },
        supervised_keys=('pixels', 'motion'),
    )

  def _records(self, directory: str, split: str) -> Records:
    glyph_videos.build(directory)
    return glyph_videos.load(directory, split)


@dataclasses.dataclass(eq=False)
class TextConfig(SubsetConfig):
  """Which of the two sets of texts.

  Attributes:
    part: 'paragraphs' (text, package) or 'pairs' (text_a, text_b, label).
  """
  part: str = 'paragraphs'


class EmbeddedText(_EmbeddedBuilder):
  """Paragraphs with their packages, or pairs of a summary and a paragraph: see `data/embedded/docstring_texts.py`."""

  BUILDER_CONFIGS = [
      TextConfig('paragraphs', part='paragraphs'),
      TextConfig('pairs', part='pairs'),
  ]
  _splits = docstring_texts.SPLITS

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    if self.builder_config.part == 'pairs':
      label = tfds.features.ClassLabel(names=docstring_texts.ANSWERS)
      return self._describe(
          'Does this paragraph continue this summary? From the documentation of Python packages.',
          {'text_a': text, 'text_b': text, 'label': label},
          supervised_keys=('text_a', 'label'),
      )
    return self._describe(
        'Paragraphs of the documentation of Python packages.',
        {'text': text, 'package': tfds.features.ClassLabel(names=docstring_texts.PACKAGES)},
        supervised_keys=('text', 'package'),
    )

  def _records(self, directory: str, split: str) -> Records:
    docstring_texts.build(directory)
    load = docstring_texts.load_pairs if self.builder_config.part == 'pairs' else docstring_texts.load_paragraphs
    return load(directory, split)
