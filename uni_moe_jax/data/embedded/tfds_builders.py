"""The embedded data as TFDS datasets, prepared, versioned and loaded like any other.

    import tensorflow_datasets as tfds
    from uni_moe_jax.data.embedded import tfds_builders  # registers embedded_glyphs, _videos and _text

    builder = tfds.builder('embedded_glyphs', data_dir=..., file_format='array_record')
    builder.download_and_prepare(download_dir=DATA_DIR)
    source = builder.as_data_source('train')  # example i is record i of glyphs.load(DATA_DIR, 'train')

Nothing is downloaded: `download_dir` is the data directory of `uni-moe prepare-data`; records that do not exist there
are made first. A data source returns a video as a list of its frames.
"""

import dataclasses
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from uni_moe_jax.data.embedded import docstring_texts, glyph_classes, glyph_videos, glyphs
from uni_moe_jax.data.examples.records import Records

_NO_LABEL = -1  # as TFDS writes it


@dataclasses.dataclass(eq=False)
class SubsetConfig(tfds.core.BuilderConfig):
  """limit: at most this many records of every split, evenly spaced over it; 0 takes all."""
  limit: int = 0


class _EmbeddedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Writes the columns of Records in order; a subclass names their features and their module."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  BUILDER_CONFIGS = [SubsetConfig('full')]
  _module: types.ModuleType  # with SPLITS, build and load

  def _load(self, directory: str, split: str) -> Records:
    return self._module.load(directory, split)

  def _describe(self, description: str, label: str, classes: Sequence[str], **inputs: Any) -> tfds.core.DatasetInfo:
    """Returns the info of a dataset that is labeled for its first input."""
    return tfds.core.DatasetInfo(
        builder=self,
        description=description,
        features=tfds.features.FeaturesDict({**inputs, label: tfds.features.ClassLabel(names=classes)}),
        supervised_keys=(next(iter(inputs)), label),
        metadata=tfds.core.MetadataDict(),
        disable_shuffling=True,  # example i stays example i: training shuffles ids, not files
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    directory, generators = str(dl_manager.download_dir), {}
    self._module.build(directory)
    for split in self._module.SPLITS:
      records = self._load(directory, split)
      # The content depends on the installed packages, so the version alone does not identify it.
      self.info.metadata[f'fingerprint_{split}'] = records.fingerprint
      generators[split] = self._generate_examples(records)
    return generators

  def _generate_examples(self, records: Records) -> Iterator[tuple[int, dict[str, Any]]]:
    limit = min(self.builder_config.limit or records.size, records.size)
    for index in np.linspace(0, records.size - 1, limit).astype(int).tolist():
      example = {name: str(column[index]) if column.dtype.kind == 'U' else column[index][..., None]  # gray
                 for name, column in records.columns.items()}
      yield index, example | {name: example[name] or _NO_LABEL for name in records.classes}


class EmbeddedGlyphs(_EmbeddedBuilder):
  """Images of characters with their names, faces and classes: see `data/embedded/glyphs.py`."""

  _module = glyphs

  def _info(self) -> tfds.core.DatasetInfo:
    return self._describe(
        'Named Unicode characters, drawn in the faces of DejaVu and STIX.', 'class', glyph_classes.CLASSES,
        pixels=tfds.features.Image(shape=(glyphs.SIZE, glyphs.SIZE, 1), encoding_format='png'),
        name=tfds.features.Text(), face=tfds.features.Text())


class EmbeddedVideos(_EmbeddedBuilder):
  """Videos of characters with their names, faces and motions: see `data/embedded/glyph_videos.py`."""

  _module = glyph_videos

  def _info(self) -> tfds.core.DatasetInfo:
    return self._describe(
        'Named Unicode characters, in the faces of DejaVu and STIX, that move, turn, grow or fade.', 'motion',
        glyph_videos.MOTIONS, pixels=tfds.features.Video(shape=(glyph_videos.FRAMES, glyphs.SIZE, glyphs.SIZE, 1)),
        name=tfds.features.Text(), face=tfds.features.Text())


@dataclasses.dataclass(eq=False)
class TextConfig(SubsetConfig):
  """part: 'paragraphs' (text, package) or 'pairs' (text_a, text_b, label)."""
  part: str = 'paragraphs'


class EmbeddedText(_EmbeddedBuilder):
  """Paragraphs, or pairs of a summary and a paragraph: see `data/embedded/docstring_texts.py`."""

  BUILDER_CONFIGS = [TextConfig(part, part=part) for part in ('paragraphs', 'pairs')]
  _module = docstring_texts

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    if self.builder_config.part == 'pairs':
      return self._describe(
          'Does this paragraph continue this summary? From the documentation of Python packages.', 'label',
          docstring_texts.ANSWERS, text_a=text, text_b=text)
    return self._describe(
        'Paragraphs of the documentation of Python packages.', 'package', docstring_texts.PACKAGES, text=text)

  def _load(self, directory: str, split: str) -> Records:
    return getattr(docstring_texts, f'load_{self.builder_config.part}')(directory, split)
