"""Fields of tasks, target sets and evaluators: the entries of a config that have names of their own."""

import dataclasses
from typing import Any

import ml_collections

from uni_moe_jax.config import fields
from uni_moe_jax.config.fields import REQUIRED, field

VOCABULARY = 'vocabulary'  # as a target set's entries: every word id


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
  """A task: an instance of a task type."""
  type: str = field(REQUIRED, 'Row of `task_types.TASK_TYPES` or of config.task_types.')
  source: str = field(REQUIRED, "Embedded data ('glyphs', …), 'own:NAME' for your own prepared data, or "
                      "'tfds:NAME[/CONFIG]'.", path=True)
  split: str = field('train', 'Split of the source.')
  batch_size: int = field(REQUIRED, 'Examples per step, over devices and micro-steps; 0: only evaluated (zero-shot).')
  loss_weight: float = field(1.0, "Weight of the task's loss.", at_least=0)
  sampling_weight: float = field(0.0, "Relative rate at which mixture='one_task' draws the task; 0: loss_weight is the "
                                 'rate, and the loss has weight 1.', at_least=0)
  temperature: str = field('', "Temperature group: tasks of a group share a learned scale. '' = the task type.")
  target_set: str = field('', 'Entry of config.target_sets, for task types with a target family.')
  label_column: str = field(
      '', 'Column with the class name, for task types that choose among names, label words or answers; in files, it '
      "may be a list of answers. For text_mlm on files: the text column ('' = 'text').")
  caption_templates: tuple[str, ...] = field(
      (), "Templates over the source's columns, such as '{name}' or '{name} in {face}'; one is drawn per example. "
      "'{name|no_stop}' leaves out the period that ends a text; '{{' and '}}' are braces.", template=True)
  template: str = field(
      '', "For readout 'slot': a template such as '{text} <eot> it is <spe> . <eot>'.", template=True)
  max_len: int = field(0, 'Text tokens per example, `eot` included; a caption has as many queries.', at_least=0)
  max_predictions: int = field(
      0, 'M, maximum number of masked tokens per text (text_mlm), or of answers per question.', at_least=0)
  label_smoothing: float = field(0.0, 'Label smoothing.', at_least=0, below=1, off=0)
  max_shift: int = field(0, 'Pixels: random translation of training images and videos.', at_least=0, off=0)
  max_affine: float = field(
      0.0, 'Training images and videos: random rotation (radians), logarithms of scales, and half the shear, at most.',
      at_least=0, at_most=1, off=0)
  word_dropout: float = field(
      0.0, "Probability that a word of a text is left out in training, for readout 'slot'.", at_least=0, below=1, off=0)
  linear_head: bool = field(False, "Adds a linear head, which starts at zero, to the similarity with the target set's "
                            'entries; at most one task.')
  train_fraction: float = field(
      1.0, 'Fraction of training examples used, chosen by seed and example; taken per class if classes are known in '
      'advance (not in TFDS data). Larger subsets contain smaller ones.', above=0, at_most=1)
  shots: int = field(0, 'Training examples used per class, instead of train_fraction.', at_least=0, off=0)
  num_frames: int = field(
      0, 'T, frames sampled per video in files: one from each of T equal parts, or see frame_stride.', at_least=0)
  frame_stride: float = field(
      0.0, 'Distance between sampled frames of a video in files, in frames at 30 per second (published: 32); '
      'evaluation starts at the first frame. 0: one from each of T equal parts.', at_least=0)
  crop: str = field(
      'resize_crop', 'Crop of images and videos of files: resize_crop (the short side is resized to image_size, then a '
      'window), random_resized_crop (a random part, see min_crop_area; evaluation: the center of 256/224 of '
      'the size), jittered_crop (resize_crop with a short side of 256/224 to 320/224 of the size; published for '
      'videos).',
      choices=('resize_crop', 'random_resized_crop', 'jittered_crop'))
  min_crop_area: float = field(
      0.08, 'Smallest part of random_resized_crop, as a fraction of the area; published: 0.08.', above=0, at_most=1)
  random_flip: bool = field(False, 'Mirrors half of the training images and videos.')
  mirrored_words: tuple[tuple[str, ...], ...] = field(
      (), "Pairs of words that change places in the texts, answers and classes of a mirrored image or video of files, "
      "such as (('left', 'right'),).")
  single_answer: bool = field(
      False, 'Training on questions in files draws one answer by its soft score (published); False: each counts by '
      'the number of people who gave it.')
  randaugment: float = field(
      0.0, 'Magnitude of RandAugment of images of files; published: 9.', at_least=0, at_most=10, off=0)
  random_erasing: float = field(
      0.0, 'Probability that a rectangle of an image of files becomes noise.', at_least=0, at_most=1, off=0)
  mixup_alpha: float = field(0.0, 'α of mixup, which blends neighbors in a batch and their classes. With both mixup '
                             'and CutMix, each is used half of the time.', at_least=0, off=0)
  cutmix_alpha: float = field(
      0.0, 'α of the area fraction that CutMix pastes between neighbors in a batch.', at_least=0, off=0)

  @property
  def mixes(self) -> bool:
    """Whether neighbors in a batch are mixed, so that an example has two labels."""
    return bool(self.mixup_alpha or self.cutmix_alpha)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetSetConfig:
  """A target set: texts that serve as the answer space of tasks."""
  entries: str | tuple[str | tuple[str, ...], ...] = field(
      REQUIRED, "The texts; 'SOURCE/COLUMN' (the classes of a column: 'glyphs/class', 'own:pets/breed'); 'file:PATH' "
      "(a file of class names, data/text/class_names.py, relative to data.dir); or 'vocabulary' (every word id). A "
      "tuple in place of a text is the source's name of the class, then its name and synonyms.", path=True)
  family: str = field(REQUIRED, "Target family: 'names', 'words' or one of config.target_families.")
  softmax: str = field('full', "full; or sampled (vocabulary only): in training, over the step's positives and a "
                       'uniform sample.', choices=('full', 'sampled'))
  num_sampled: int = field(0, 'K, size of the sampled vocabulary, positives included.', at_least=0)
  max_len: int = field(16, 'Tokens of the longest text, `eot` included; a longer one is an error.', at_least=2)
  synonyms: bool = field(True, 'Uses every name of an entry; False: its first one.')
  label_prompts: bool = field(
      False, "Adds a learned token after each entry's <spe>. It starts at zero, but as an extra attention key it "
             'changes outputs slightly from the start.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatorConfig:
  """An evaluation with a fixed protocol; see `eval/evaluators.py`."""
  type: str = field(REQUIRED, 'classification, retrieval, mlm, caption, glue or vqa.')
  task: str = field(REQUIRED, 'Entry of config.tasks, trained or not (batch_size=0); its source and readout are used.')
  split: str = field(REQUIRED, 'Split that is evaluated.')
  num_examples: int = field(0, 'Examples; 0 = all.', at_least=0)
  num_draws: int = field(0, 'Retrieval: seeded draws of num_examples examples with distinct texts, whose mean is '
                         'reported; 0: every example and each of its texts, as published.', at_least=0)
  batch_size: int = field(128, 'Examples encoded at once, rounded up to a multiple of the batch shards.', at_least=1)
  beam_size: int = field(1, 'Caption: hypotheses kept per image; 1: greedy.', at_least=1)
  length_penalty: float = field(0.0, 'Caption: divides final scores by (words + 1)^length_penalty.', at_least=0, off=0)
  rerank_by: str = field('', 'Caption: retrieval task in config.tasks. Of the beam_size captions of an image, picks '
                         "the one with the largest sum of log p and this task's scaled similarity to the image; '', or "
                         'if no trained task has its temperature: the largest log p.')
  max_len: int = field(0, "Caption: tokens of the longest, `eot` included (published: 21); 0: the task's max_len.",
                       at_least=0)
  detokenize: bool = field(True, "Caption: joins what the vocabulary splits (digits, 's) before scoring; False: as "
                           'published.')
  num_views: int = field(1, 'Classification of videos of files: probabilities are averaged over num_views in time × '
                         'num_crops.', at_least=1)
  num_crops: int = field(1, 'Crops along the long side; see num_views.', at_least=1)
  baselines: bool = field(True, 'Also scores simple predictors, once per dataset '
                          '(eval/dataset_baselines.py).')
  during_training: bool = field(
      False, 'Runs every train.evaluate_every steps, without baselines; not on a test split, as its score could select '
      'a checkpoint.')


def task(type: str, source: str, *, batch_size: int, **values: Any) -> ml_collections.ConfigDict:
  """One task; `values` are other fields of `TaskConfig`."""
  return fields.to_config_dict(TaskConfig(type=type, source=source, batch_size=batch_size, **values))


def target_set(entries: str | tuple[str | tuple[str, ...], ...], *, family: str,
               **values: Any) -> ml_collections.ConfigDict:
  """One target set; `values` are other fields of `TargetSetConfig`."""
  return fields.to_config_dict(TargetSetConfig(entries=entries, family=family, **values))


def evaluator(type: str, task_name: str, *, split: str, **values: Any) -> ml_collections.ConfigDict:
  """One evaluator of a task; `values` are other fields of `EvaluatorConfig`."""
  return fields.to_config_dict(EvaluatorConfig(type=type, task=task_name, split=split, **values))
